"""Speed, measured side by side in one run: A B A B, medians, ratios.

    python -m tools.bench                                 # every table
    python -m tools.bench --what=decode --quick=True      # models four times narrower, rougher

A ratio of two forms that ran in turn carries over to another machine, a time does not. The first row of a table is what
the others are held against. Hugging Face's transformers stands beside this project's forms where it is installed.
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from pydantic import PositiveInt
from torch import Tensor

from configurator import MODELS, build_model, make, parse_settings
from kit.contexts import exact_contexts
from kit.fast import compile_step, next_token_loss
from kit.files import make_folder, replacing, run
from kit.report import format_table
from kit.runs import pick_device
from kit.tokens import load_tokens
from model_mla import ALiBiPositionEncoding, alibi_attention
from pythia_base import stream_tokens
from train import LMSettings, make_optimizers

QUICK_DIVISOR = 4  # of the models' widths, as in config/laptop.py
LENGTHS, BATCHES = (256, 2048, 8192), (1, 8)  # tokens in the cache, rows
CONTEXT_TOKENS, PLAIN_SHARE = 500_000, 50  # of the fast recurrence; the plain one takes so much less
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class BenchSettings:
    """tools/bench.py"""

    what: Literal["all", "train", "decode", "attention", "contexts"] = "all"  # to time
    quick: bool = False  # narrower models, less work, decoding steps not compiled: minutes, and rougher ratios
    repeats: PositiveInt = 3  # interleaved, after one to warm up; medians are shown
    dataset: str = "mini"  # whose text the work is done on
    data_dir: str = "data"  # where the token files are
    out_dir: str = "out/bench"  # where bench.json goes
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a table."""

    work: Callable[[], Any]
    amount: float  # units of work that it does, tokens
    to_reach: str = ""  # times the first contender's rate


def compare(title: str, contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, Any]:
    """Run the contenders in turn, once to warm up and then repeats times; prints and returns the table, tokens/s."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender.work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                rates[name].append(contender.amount / (time.perf_counter() - started))
    first, rows, results = next(iter(rates.values())), [], {}
    for name, mine in rates.items():
        ratios = [a / b for a, b in zip(mine, first, strict=True)]
        row = [name, f"{statistics.median(mine):,.4g}", f"{statistics.median(ratios):.2f}"]
        rows.append([*row, f"{min(ratios):.2f}-{max(ratios):.2f}", contenders[name].to_reach])
        results[name] = {"tokens_per_s": mine, "ratios": ratios, "to_reach": contenders[name].to_reach}
    print("\n" + format_table([title, "tokens/s", "ratio", "spread", "to reach"], rows), flush=True)
    return {title: results}


def text_batch(settings: BenchSettings, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """idx and targets (B, T), the first tokens of the training data, again and again if these are few."""
    tokens = load_tokens(Path(settings.data_dir, settings.dataset), "train").tokens
    rows = torch.from_numpy(np.resize(tokens[: batch_size * length + 1], batch_size * length + 1).astype(np.int64))
    return rows[:-1].view(batch_size, length), rows[1:].view(batch_size, length)


def seeded_model(name: str, settings: BenchSettings) -> Any:
    """A model of the default config, narrower if it has to be quick."""
    config: Any = make(MODELS[name][0], {}, QUICK_DIVISOR if settings.quick else 1)
    torch.manual_seed(0)
    return build_model(name, config)


def transformers_model(settings: BenchSettings) -> Any:
    """GPTNeoXForCausalLM of the baseline's shape, None where transformers is not installed."""
    try:
        from transformers import GPTNeoXForCausalLM
    except ImportError:
        print("transformers is not installed (pip install -r requirements-dev.txt): its rows are left out")
        return None
    with tempfile.TemporaryDirectory() as folder:
        seeded_model("pythia", settings).save_pretrained(folder)
        return GPTNeoXForCausalLM.from_pretrained(folder)


def bench_train(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """One step of 4 x 256 tokens (CUDA: 16 x 2,048), AdamW: this project's fused one, transformers' as it comes."""
    idx, targets = (x.to(device) for x in text_batch(settings, *((16, 2048) if device.type == "cuda" else (4, 256))))

    def step(model: Any, optimizer: Any, dtype: torch.dtype, loss_of: Callable[[Any], Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    contenders = {}
    if theirs := transformers_model(settings):
        optimizer = torch.optim.AdamW(theirs.to(device).parameters(), lr=1e-4)
        for name, dtype in DTYPES.items():
            work = partial(step, theirs, optimizer, dtype, lambda model: next_token_loss(model(idx).logits, targets))
            contenders[f"transformers {name}"] = Contender(work, idx.numel())
    ours = seeded_model("pythia", settings).to(device)
    fused = make_optimizers(ours, LMSettings())["optimizer"]
    for (name, dtype), to_reach in zip(DTYPES.items(), ("1.0", "2.0"), strict=True):
        work = partial(step, ours, fused, dtype, lambda model: model(idx, targets)[1])
        contenders[f"ours {name}"] = Contender(work, idx.numel(), to_reach)
    yield compare("training step", contenders, settings.repeats, device)


@torch.no_grad()
def bench_decode(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Greedy decoding of one row, prompt 128 + 256 new tokens; then steps of every model at the end of long caches."""
    new_tokens, idx = 32 if settings.quick else 256, text_batch(settings, 1, 128)[0].to(device)

    def generate(model: Any, step: Any = None) -> None:
        list(stream_tokens(model, idx, model.init_cache(1, 128 + new_tokens), new_tokens, temperature=0, step=step))

    for (name, dtype), to_reach in zip(DTYPES.items(), ("2.5", "1.8"), strict=True):
        contenders = {}
        if theirs := transformers_model(settings):
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            work = partial(theirs.to(device, dtype).generate, idx, attention_mask=torch.ones_like(idx), **options)
            contenders["transformers generate"] = Contender(work, new_tokens)
        plain, compiled = (seeded_model("pythia", settings).to(device, dtype).eval() for _ in range(2))
        contenders["ours"] = Contender(partial(generate, plain), new_tokens)
        work = partial(generate, compiled, compile_step(compiled))
        contenders["ours, compiled"] = Contender(work, new_tokens, to_reach)
        yield compare(f"decode, {name}, 128 + {new_tokens} tokens", contenders, settings.repeats, device)
    torch._dynamo.config.recompile_limit = 64  # programs of one function, which compile_step has one of per model
    for batch_size in BATCHES:
        yield from bench_steps(batch_size, settings, device)


def bench_steps(batch_size: int, settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Decoding steps of every model, compiled unless it has to be quick; the baseline is the ordinary K/V cache."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = text_batch(settings, batch_size, 4)[0].to(device)
    models = {name: seeded_model(name, settings).to(device, dtype).eval() for name in MODELS}
    steps = models if settings.quick else {name: compile_step(model) for name, model in models.items()}

    def decode(step: Any, cache: Any) -> None:
        cache.length = cache.max_len - tokens.size(1)  # how long a step takes depends on how much it reads, not on what
        for token in tokens.split(1, dim=1):
            step(token, cache=cache)[0].argmax(dim=-1)

    for length in LENGTHS[:2] if settings.quick else LENGTHS:
        contenders = {}
        for name, model in models.items():
            cache = model.init_cache(batch_size, length)
            for tensor in cache.tensors():
                if tensor.is_floating_point():
                    tensor.normal_()  # pages that were never written are read from one page of zeros
            work = partial(decode, steps[name], cache)
            contenders[f"{name}, cache {cache.nbytes / 2**20:,.1f} MiB"] = Contender(work, tokens.numel())
        yield compare(f"decode, {length:,} tokens, batch {batch_size}", contenders, settings.repeats, device)


def bench_attention(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Attention with ALiBi, forward and backward, B 4, H 8, D 64, T 2,048."""
    B, T, alibi = (1 if settings.quick else 4), 2048, ALiBiPositionEncoding(slope=0.0625)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, 8, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def plain() -> Tensor:
        return alibi.apply_to_scores(q @ k.transpose(2, 3) / math.sqrt(64), T).softmax(dim=-1).to(v.dtype) @ v

    contenders = {
        "matmul, bias, softmax": Contender(lambda: plain().sum().backward(), B * T),
        "bias as extra dimensions": Contender(lambda: alibi_attention(q, k, v, 0.0625).sum().backward(), B * T, "3.0"),
    }
    yield compare(f"attention with ALiBi, {B} x 8 x {T:,}", contenders, settings.repeats, device)


@torch.no_grad()
def bench_contexts(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """The exact context cache: a module call per token against lanes in lockstep."""
    model = seeded_model("context", settings).to(device)
    block, table = model.context_block, model.embed_in.weight
    num_tokens = CONTEXT_TOKENS // (5 if settings.quick else 1)
    tokens = text_batch(settings, 1, num_tokens)[0][0]

    def plain() -> None:
        c = table.new_zeros(1, block.context_dim)
        for token in tokens[: num_tokens // PLAIN_SHARE].to(device):
            c = block(c, table[token][None])

    contenders = {
        "plain loop of module calls": Contender(plain, num_tokens // PLAIN_SHARE),
        "lanes in lockstep": Contender(partial(exact_contexts, block, table, tokens), num_tokens, "25"),
    }
    yield compare("exact context cache", contenders, settings.repeats, device)


BENCHES = {"train": bench_train, "decode": bench_decode, "attention": bench_attention, "contexts": bench_contexts}


def main() -> None:
    settings, _ = parse_settings(BenchSettings, sys.argv[1:])
    device = pick_device(settings.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = f"{card} {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    machine += ", malloc's thresholds raised" if "MALLOC_MMAP_THRESHOLD_" in os.environ else ""
    print(machine, flush=True)
    make_folder(folder := Path(settings.out_dir))
    results: dict[str, Any] = {"machine": machine, "settings": asdict(settings)}
    for name in BENCHES if settings.what == "all" else [settings.what]:
        for table in BENCHES[name](settings, device):
            results |= table
            with replacing(folder / "bench.json") as file:
                file.write(json.dumps(results, indent=2).encode())
    print(f"\nall figures are in {folder / 'bench.json'}")


if __name__ == "__main__":
    run(main)
