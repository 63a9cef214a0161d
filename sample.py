"""Generates text from a trained model, as it is drawn, and shows what its cache holds.

python sample.py out/mla_kv128-laptop --prompt="The capital of France"
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from configurator import baseline_cache_bytes, load_source, parse_settings
from kit.fast import prepare_decoding, round_weights
from kit.files import InputError, run
from kit.runs import pick_device
from kit.text import load_tokenizer
from pythia_base import stream_tokens


@dataclass(frozen=True)
class SampleSettings:
    """sample.py"""

    prompt: str = ""  # the text to continue; empty starts from the end-of-text token
    max_new_tokens: PositiveInt = 128  # tokens to generate
    temperature: NonNegativeFloat = 0.8  # 0 is greedy
    top_k: PositiveInt | None = 50  # draw from the k likeliest tokens; None: from all
    num_samples: PositiveInt = 1  # how many texts
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that are read; the arithmetic is float32
    data_dir: str = "data"  # where the tokenizer is kept
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    seed: NonNegativeInt = 1337  # of the draws


def main() -> None:
    s, sources = parse_settings(SampleSettings, sys.argv[1:], takes="RUN")
    if len(sources) != 1:
        raise InputError("name one run: python sample.py out/mla_kv128-laptop")
    model, checkpoint = load_source(sources[0])
    model = model.to(device := pick_device(s.device)).eval()
    if s.dtype == "bfloat16":
        round_weights(model)
    prepare_decoding(model)
    tokenizer = load_tokenizer(checkpoint["data"]["tokenizer"] if checkpoint else "neox", s.data_dir)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise InputError(f"{sources[0]} has {model.config.vocab_size} rows for the {tokenizer.n_vocab} tokens of text")
    prompt = tokenizer.encode(s.prompt) or [tokenizer.end_of_text]
    idx, length = torch.tensor([prompt], device=device), len(prompt) + s.max_new_tokens
    baseline = baseline_cache_bytes(model.config, length)
    temperature = round(s.temperature, 6)  # less is greedy as well, but nothing that float32 can divide by
    torch.manual_seed(s.seed)
    for _ in range(s.num_samples):
        cache, started = model.init_cache(1, length), time.perf_counter()
        print(s.prompt, end="", flush=True)
        pending: list[int] = []  # a character that several tokens share waits for the last of them
        for token in stream_tokens(model, idx, cache, s.max_new_tokens, temperature, s.top_k, tokenizer.n_vocab):
            pending.append(int(token))
            if not (text := tokenizer.decode(pending)).endswith("\ufffd"):
                print(text, end="", flush=True)
                pending = []
        print(tokenizer.decode(pending))
        print(f"---\n{s.max_new_tokens / (time.perf_counter() - started):.0f} tokens/s | cache", end=" ")
        print(f"for {length} tokens: {cache.nbytes:,} bytes, {cache.nbytes / length:,.0f} a token;", end=" ")
        print(f"the baseline's {baseline:,} ({1 - cache.nbytes / baseline:.1%} saved)\n")


if __name__ == "__main__":
    run(main)
