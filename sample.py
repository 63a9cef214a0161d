"""Generates text from a trained model, as it is drawn, and shows what its cache holds.

python sample.py out/mla_kv128-laptop --prompt="The capital of France"
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from configurator import baseline_config, build_model, load_source, parse_settings
from kit.fast import compile_step, input_major
from kit.files import InputError, run
from kit.runs import pick_device
from kit.text import Tokenizer, load_tokenizer
from pythia_base import Cache, stream_tokens


@dataclass(frozen=True)
class SampleSettings:
    """sample.py"""

    prompt: str = ""  # the text to continue; empty starts from the end-of-text token
    max_new_tokens: PositiveInt = 128  # tokens to generate
    temperature: NonNegativeFloat = 0.8  # 0 is greedy
    top_k: PositiveInt | None = 50  # draw from the k likeliest tokens; None: from all
    num_samples: PositiveInt = 1  # how many texts
    compile: bool = False  # compile the decoding step: half a minute first, then faster; it needs a C++ compiler
    data_dir: str = "data"  # where the tokenizer is kept
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu
    seed: NonNegativeInt = 1337  # of the draws


def print_pieces(tokenizer: Tokenizer, tokens: Iterator[torch.Tensor]) -> None:
    """Print tokens (1, 1) as they come; a character that several tokens share waits for the last of them."""
    pending: list[int] = []
    for token in tokens:
        pending.append(int(token))
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            pending = []
    print(tokenizer.decode(pending))


def describe_cache(model: Any, cache: Cache) -> str:
    """Bytes of the cache beside those that the baseline of the same widths would hold."""
    with torch.device("meta"):
        baseline = build_model("pythia", baseline_config(model.config)).init_cache(1, cache.max_len)
    return (
        f"cache for {cache.max_len} tokens: {cache.nbytes:,} bytes, {cache.nbytes / cache.max_len:,.0f} a token; "
        f"the baseline's {baseline.nbytes:,} ({1 - cache.nbytes / baseline.nbytes:.1%} saved)"
    )


def main() -> None:
    settings, sources = parse_settings(SampleSettings, sys.argv[1:], takes="RUN")
    if len(sources) != 1:
        raise InputError("name one run: python sample.py out/mla_kv128-laptop")
    model, checkpoint = load_source(sources[0])
    model = model.to(pick_device(settings.device)).eval()
    step = compile_step(model) if settings.compile else model
    if not settings.compile:
        input_major(model)
    tokenizer = load_tokenizer(checkpoint["data"]["tokenizer"] if checkpoint else "neox", settings.data_dir)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise InputError(f"{sources[0]} has {model.config.vocab_size} rows for the {tokenizer.n_vocab} tokens of text")
    prompt = tokenizer.encode(settings.prompt) or [tokenizer.end_of_text]
    idx = torch.tensor([prompt], device=next(model.parameters()).device)
    torch.manual_seed(settings.seed)
    for _ in range(settings.num_samples):
        cache = model.init_cache(1, len(prompt) + settings.max_new_tokens)
        started = time.perf_counter()
        print(settings.prompt, end="", flush=True)
        tokens = stream_tokens(
            model, idx, cache, settings.max_new_tokens, settings.temperature, settings.top_k, tokenizer.n_vocab, step
        )
        print_pieces(tokenizer, tokens)
        speed = settings.max_new_tokens / (time.perf_counter() - started)
        print(f"---\n{speed:.0f} tokens/s | {describe_cache(model, cache)}\n")


if __name__ == "__main__":
    run(main)
