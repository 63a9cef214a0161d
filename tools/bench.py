"""Speed, measured side by side in one run: A B A B, medians, the share of what the machine could do.

    python -m tools.bench                                    # every table, on a machine that does nothing else
    python -m tools.bench --what=steps --models=pythia,mla   # or train, prefill, decode, rows, attention, contexts
    python -m tools.bench --what=decode --gguf=pythia.gguf --ct2=pythia-ct2

Ratios are to the first row of a table: that of two forms that ran in turn carries over to another machine, a time does
not. limit: the longer of bytes / bandwidth and operations / peak, both measured around the table; share: limit / time.
A table is busy if they differ by more than a quarter before and after it. transformers, llama.cpp and CTranslate2 stand
beside this project where they are installed (docs/speed.md).
"""

import copy
import importlib
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
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from configurator import MODELS, make, parse_settings
from kit.contexts import exact_contexts
from kit.fast import next_token_loss, prepare_decoding, round_weights
from kit.files import InputError, replacing, run
from kit.report import format_table
from kit.runs import pick_device
from kit.tokens import load_tokens
from model_mla import ALiBiPositionEncoding, alibi_attention
from pythia_base import Cache, stream_tokens
from train import LMSettings, make_optimizers, pick_dtype

QUICK_DIVISOR = 4  # of the models' widths, as in config/laptop.py
STEPS = ((1, 256), (1, 8192), (1, 32768), (8, 2048), (8, 8192))  # rows and tokens in the cache
BUDGET, ROWS = 2**30, (1, 8, 32, 128)  # bytes for weights and caches; rows that are decoded together if they fit
GPU_BUDGET, GPU_ROWS = 2**33, (*ROWS, 512, 2048)  # on a GPU, in bfloat16
CONTEXT_TOKENS, PLAIN_SHARE = 500_000, 50  # of the fast recurrence; the plain one takes so much less
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUSY = 1.25  # how far speeds of the machine before and after a table may be apart


@dataclass(frozen=True)
class BenchSettings:
    """tools/bench.py"""

    what: Literal["all", "train", "prefill", "decode", "steps", "rows", "attention", "contexts"] = "all"  # to time
    models: str = ",".join(MODELS)  # architectures in the tables that have them, names from configurator.MODELS
    quick: bool = False  # narrower models, less work: a minute, and rougher
    repeats: PositiveInt = 5  # interleaved, after one to warm up; medians are shown
    gguf: str | None = None  # the baseline as llama.cpp reads it, one file or several with a comma between
    ct2: str | None = None  # the baseline as CTranslate2 reads it, a folder
    dataset: str = "mini"  # whose text the work is done on
    data_dir: str = "data"  # where the token files are
    out_dir: str = "out/bench"  # where bench.json goes
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu

    def __post_init__(self) -> None:
        for name in self.models.split(","):
            if name not in MODELS:
                raise InputError(f"models={self.models!r}: {name!r} is none of {', '.join(MODELS)}")


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a table."""

    work: Callable[[], Any]
    tokens: float  # that it works on
    bytes: float = 0  # that it has to read
    operations: float = 0  # floating-point operations that it has to do
    dtype: torch.dtype = torch.float32  # in which it does them


def speeds(device: torch.device) -> dict[str, float]:
    """Bytes a second that are read, operations a second of a product in each dtype of training: the best of a few."""
    n = 8192 if device.type == "cuda" else 1024
    numbers, square = torch.ones(2**26, device=device), torch.randn(n, n, device=device)
    best = {"read": numbers.nbytes / min(seconds_of(numbers.sum, device) for _ in range(5))}
    for name, dtype in (training_dtypes(device) if device.type == "cpu" else DTYPES).items():
        work = partial(torch.mm, square.to(dtype), square.to(dtype))
        best[name] = 2 * n**3 / min(seconds_of(work, device) for _ in range(5))
    return best


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def compare(title: str, contenders: dict[str, Contender], repeats: int, device: torch.device) -> dict[str, Any]:
    """Run the contenders in turn, once to warm up and then repeats times; prints and returns the table."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    before = speeds(device)
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            elapsed = seconds_of(contender.work, device)
            if repeat:
                seconds[name].append(elapsed)
    after = speeds(device)
    busy = any(max(before[k], after[k]) > BUSY * min(before[k], after[k]) for k in before)
    best = {k: max(before[k], after[k]) for k in before}
    rates = {name: [c.tokens / s for s in seconds[name]] for name, c in contenders.items()}
    first, rows, results = next(iter(rates.values())), [], {}
    for name, c in contenders.items():
        ratios = [a / b for a, b in zip(rates[name], first, strict=True)]
        peak = best[str(c.dtype).removeprefix("torch.")] if c.operations else math.inf
        limit, median = max(c.bytes / best["read"], c.operations / peak), statistics.median(seconds[name])
        row = [name, f"{1000 * median:,.2f}", f"{statistics.median(rates[name]):,.4g}"]
        row += [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"]
        rows.append([*row, *([f"{1000 * limit:,.2f}", f"{limit / median:.0%}"] if limit else ["", ""])])
        results[name] = {"seconds": seconds[name], "tokens": c.tokens, "limit": limit}
    header = [title + (" (busy)" if busy else ""), "ms", "tokens/s", "ratio", "spread", "limit ms", "share"]
    print("\n" + format_table(header, rows))
    peaks = ", ".join(f"{best[name] / 1e9:,.0f} GFLOP/s of {name}" for name in DTYPES if name in best)
    print(f"{best['read'] / 1e9:,.1f} GB/s, {peaks}", flush=True)
    return {title: {"busy": busy, "speeds": best, "rows": results}}


def text_batch(settings: BenchSettings, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """idx and targets (B, T), the first tokens of the training data, again and again if these are few."""
    tokens = load_tokens(Path(settings.data_dir, settings.dataset), "train").tokens
    rows = torch.from_numpy(np.resize(tokens[: batch_size * length + 1], batch_size * length + 1).astype(np.int64))
    return rows[:-1].view(batch_size, length), rows[1:].view(batch_size, length)


def seeded_model(name: str, settings: BenchSettings) -> Any:
    """A model of the default config, narrower if it has to be quick."""
    config_class, model_class = MODELS[name]
    torch.manual_seed(0)
    return model_class(make(config_class, {}, QUICK_DIVISOR if settings.quick else 1))


def decoding_model(name: str, settings: BenchSettings, device: torch.device, *, rounded: bool) -> Any:
    """A model as it decodes: on a CPU by the kernels, weights float32 or rounded to bfloat16; else in that dtype."""
    model = seeded_model(name, settings).to(device).eval()
    prepare_decoding(model)
    if rounded:
        round_weights(model) if device.type == "cpu" else model.bfloat16()
    return model


def transformers_model(settings: BenchSettings) -> Any:
    """GPTNeoXForCausalLM of the baseline's shape, None where transformers is not installed."""
    try:
        from transformers import GPTNeoXForCausalLM
    except ImportError:
        print("transformers is not installed (pip install -r requirements-dev.txt): its rows are left out")
        return None
    with tempfile.TemporaryDirectory() as folder:
        seeded_model("pythia", settings).save_pretrained(folder)
        return GPTNeoXForCausalLM.from_pretrained(folder).eval()


def training_dtypes(device: torch.device) -> dict[str, torch.dtype]:
    """Those whose products are fast here: bfloat16 only where there are instructions for it."""
    return {name: d for name, d in DTYPES.items() if d in (torch.float32, pick_dtype("auto", device))}


def operations_of(work: Callable[[], Any]) -> int:
    """Floating-point operations of the products in work, done without the kernels, which are not counted."""
    with mock.patch("kit.fast.kernels", None), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def weight_bytes(model: Any, *, rounded: bool) -> int:
    """Bytes of weights that one decoding step reads: all but an embedding table that is not the head as well."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {id(model.head_weight)}
    numbers = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    return numbers * (2 if rounded else 4)


def bench_train(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """One step of 4 x 256 tokens (CUDA: 16 x 2,048), AdamW: ours as train.py does it, transformers' as it comes."""
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
        optimizer = torch.optim.AdamW(theirs.to(device).train().parameters(), lr=1e-4)
        for name, dtype in training_dtypes(device).items():
            work = partial(step, theirs, optimizer, dtype, lambda model: next_token_loss(model(idx).logits, targets))
            contenders[f"transformers {name}"] = Contender(work, idx.numel())
    ours = seeded_model("pythia", settings).to(device)
    operations = operations_of(lambda: ours(idx, targets)[1].backward())
    fused, trained = make_optimizers(ours, LMSettings())["optimizer"], ours
    if device.type == "cuda":
        trained = torch.compile(ours)
    for name, dtype in training_dtypes(device).items():
        work = partial(step, trained, fused, dtype, lambda model: model(idx, targets)[1])
        contenders[f"ours {name}"] = Contender(work, idx.numel(), operations=operations, dtype=dtype)
    yield compare("training step", contenders, settings.repeats, device)


@torch.no_grad()
def bench_prefill(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """A prompt of 2,048 tokens through the cache, to the logits of its last token."""
    idx = text_batch(settings, 1, 2048 // (4 if settings.quick else 1))[0].to(device)

    def prefill(model: Any) -> None:
        next(stream_tokens(model, idx, model.init_cache(1, idx.size(1)), 1, temperature=0))

    for name, dtype in training_dtypes(device).items():
        contenders = {}
        if theirs := transformers_model(settings):
            theirs = theirs.to(device, dtype)
            contenders["transformers"] = Contender(partial(theirs, idx, use_cache=True, logits_to_keep=1), idx.numel())
        for model_name in settings.models.split(","):
            model = decoding_model(model_name, settings, device, rounded=False).to(dtype)
            work = partial(prefill, model)
            contenders[model_name] = Contender(work, idx.numel(), operations=operations_of(work), dtype=dtype)
        yield compare(f"prompt of {idx.size(1):,} tokens, {name}", contenders, settings.repeats, device)


@torch.no_grad()
def bench_decode(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Greedy decoding of one row, prompt 128 + 256 new tokens, beside what a user would take instead."""
    new, idx = 32 if settings.quick else 256, text_batch(settings, 1, 128)[0].to(device)
    contenders = {}
    if theirs := transformers_model(settings):
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        for name, dtype in training_dtypes(device).items():
            model = copy.deepcopy(theirs).to(device, dtype)
            work = partial(model.generate, idx, attention_mask=torch.ones_like(idx), **options)
            contenders[f"transformers {name}"] = Contender(work, new)
    for path in settings.gguf.split(",") if settings.gguf else []:
        contenders[f"llama.cpp {Path(path).name}"] = Contender(llama_cpp_work(path, idx[0].tolist(), new), new)
    if settings.ct2:
        contenders["CTranslate2 float32"] = Contender(ctranslate2_work(settings.ct2, idx[0].tolist(), new), new)
    for weights, rounded in (("float32", False), ("bfloat16", True)):
        model = decoding_model("pythia", settings, device, rounded=rounded)
        cache = model.init_cache(1, 128 + new)

        def generate(model: Any = model, cache: Cache = cache) -> None:
            cache.length = 0
            list(stream_tokens(model, idx, cache, new, temperature=0))

        read = new * (weight_bytes(model, rounded=rounded) + cache.nbytes * (128 + new / 2) / (128 + new))
        contenders[f"ours, weights {weights}"] = Contender(generate, new, read)
    yield compare(f"128 + {new} tokens", contenders, settings.repeats, device)


def llama_cpp_work(path: str, prompt: list[int], new: int) -> Callable[[], Any]:
    threads = torch.get_num_threads()
    model = peer("llama_cpp", "llama-cpp-python", path).Llama(path, n_ctx=512, n_threads=threads, verbose=False)

    def work() -> None:
        model.reset()
        tokens = prompt
        for _ in range(new):
            model.eval(tokens)
            tokens = [model.sample(temp=0.0)]

    return work


def ctranslate2_work(folder: str, prompt: list[int], new: int) -> Callable[[], Any]:
    threads = torch.get_num_threads()
    model = peer("ctranslate2", "ctranslate2", folder).Generator(folder, compute_type="float32", intra_threads=threads)
    vocabulary = json.loads(Path(folder, "vocabulary.json").read_text())
    tokens = [[vocabulary[i] for i in prompt]]
    return lambda: model.generate_batch(tokens, max_length=new, min_length=new, include_prompt_in_result=False)


def peer(module: str, package: str, path: str) -> Any:
    """What reads the model at path. Raises InputError if either is not there."""
    if not Path(path).exists():
        raise InputError(f"{path} is not there: docs/speed.md says how to make it")
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{path} is read by {package}: pip install {package}") from None


@torch.no_grad()
def bench_steps(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """One decoding step of every model at the end of its cache; the baseline is the ordinary K/V cache."""
    for dtype_name, dtype in DTYPES.items():
        rounded, computed = dtype == torch.bfloat16, torch.float32 if device.type == "cpu" else dtype
        models = {n: decoding_model(n, settings, device, rounded=rounded) for n in settings.models.split(",")}
        for batch_size, length in STEPS[::3] if settings.quick else STEPS:
            contenders = {}
            for name, model in models.items():
                cache = filled_cache(model, batch_size, length, dtype)
                token = text_batch(settings, batch_size, 1)[0].to(device)
                work = partial(decode_step, model, token, cache)
                operations = operations_of(work)
                read = weight_bytes(model, rounded=rounded) + cache.nbytes
                label = f"{name}, cache {cache.nbytes / 2**20:,.1f} MiB"
                contenders[label] = Contender(work, batch_size, read, operations, computed)
            yield compare(f"{length:,} tokens, batch {batch_size}, {dtype_name}", contenders, settings.repeats, device)


def filled_cache(model: Any, batch_size: int, length: int, dtype: torch.dtype) -> Cache:
    """A full cache of any numbers: how long a step takes depends on how much it reads, not on what."""
    cache = copy.deepcopy(model).to(dtype).init_cache(batch_size, length)
    for tensor in cache.tensors():
        if tensor.is_floating_point():
            tensor.normal_()  # pages that were never written are read from one page of zeros
    return cache


def decode_step(model: Any, token: Tensor, cache: Cache) -> None:
    cache.length = cache.max_len - 1
    model(token, cache=cache)[0].argmax(dim=-1)


@torch.no_grad()
def bench_rows(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """What a smaller cache is for: rows that fit into a budget, and tokens/s of all rows together, as many as fit."""
    on_gpu = device.type == "cuda"
    budget, counts, dtype = (GPU_BUDGET, GPU_ROWS, torch.bfloat16) if on_gpu else (BUDGET, ROWS, torch.float32)
    for length in (2048, 32768):
        contenders, fits = {}, []
        for name in settings.models.split(","):
            model = decoding_model(name, settings, device, rounded=on_gpu)
            weights = sum(p.nbytes for p in model.parameters())
            with torch.device("meta"):
                row = seeded_model(name, settings).to(dtype).init_cache(1, length).nbytes
            fits.append([name, *(f"{max(size - weights, 0) // row:,}" for size in (budget, 80 * 2**30))])
            for rows in [rows for rows in counts if weights + rows * row <= budget]:
                cache = filled_cache(model, rows, length, dtype)
                token = text_batch(settings, rows, 1)[0].to(device)
                contenders[f"{name} x {rows}"] = Contender(partial(decode_step, model, token, cache), rows)
        size = f"{budget / 2**30:.0f} GiB"
        print("\n" + format_table([f"rows of {length:,} tokens that fit", size, "80 GiB"], fits))
        yield compare(f"all rows at {length:,} tokens, {size}", contenders, settings.repeats, device)


def bench_attention(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Attention with ALiBi, forward and backward, B 4, H 8, D 64, T 2,048."""
    B, T, alibi = (1 if settings.quick else 4), 2048, ALiBiPositionEncoding(slope=0.0625)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, 8, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    def plain() -> Tensor:
        return alibi.apply_to_scores(q @ k.transpose(2, 3) / math.sqrt(64), T).softmax(dim=-1).to(v.dtype) @ v

    causal = 3 * 4 * B * 8 * 64 * T * T // 2  # operations of what a causal mask leaves; backward twice the forward
    works = {
        "matmul, bias, softmax": lambda: plain().sum().backward(),
        "bias as extra dimensions": lambda: alibi_attention(q, k, v, alibi.slope).sum().backward(),
    }
    contenders = {name: Contender(work, B * T, operations=causal, dtype=dtype) for name, work in works.items()}
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
        "lanes in lockstep": Contender(partial(exact_contexts, block, table, tokens), num_tokens),
    }
    yield compare("exact context cache", contenders, settings.repeats, device)


BENCHES = {
    "train": bench_train,
    "prefill": bench_prefill,
    "decode": bench_decode,
    "steps": bench_steps,
    "rows": bench_rows,
    "attention": bench_attention,
    "contexts": bench_contexts,
}


def main() -> None:
    settings, _ = parse_settings(BenchSettings, sys.argv[1:])
    device = pick_device(settings.device)
    peers = ("llama_cpp", "llama-cpp-python", settings.gguf), ("ctranslate2", "ctranslate2", settings.ct2)
    for module, package, paths in peers:
        for path in paths.split(",") if paths else []:
            peer(module, package, path)  # before the work, not after minutes of it
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = f"{card} {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    machine += f", {torch.backends.cpu.get_cpu_capability()}"
    machine += ", malloc's thresholds raised" if "MALLOC_MMAP_THRESHOLD_" in os.environ else ""
    print(machine, flush=True)
    (folder := Path(settings.out_dir)).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine, "settings": asdict(settings)}
    for name in BENCHES if settings.what == "all" else [settings.what]:
        for table in BENCHES[name](settings, device):
            results |= table
            with replacing(folder / "bench.json") as file:
                file.write(json.dumps(results, indent=2).encode())
    print(f"\nall figures are in {folder / 'bench.json'}")


if __name__ == "__main__":
    run(main)
