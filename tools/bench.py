"""Speed, measured side by side in one run: A B A B, medians, ratios.

    python -m tools.bench                                 # every table
    python -m tools.bench --what=decode --quick=True      # models four times narrower, rougher

Machines are noisy and differ: a ratio of two forms that ran in turn carries over, a time does not. The first row of a
table is what the others are held against, with the ratio to reach beside the ratio reached. Hugging Face's
transformers (requirements-dev.txt) stands beside this project's forms where it is installed.
"""

import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from configurator import MODELS, build_model, make, parse_settings
from kit.contexts import exact_contexts
from kit.fast import compile_step, input_major, next_token_loss
from kit.files import InputError, make_folder, replacing, run
from kit.report import format_bytes, format_table
from kit.runs import pick_device
from kit.tokens import load_tokens
from model_mla import ALiBiPositionEncoding, LatentAttention, alibi_attention
from pythia_base import stream_tokens
from train import make_optimizer

QUICK_DIVISOR = 4  # of the models' widths, as in config/laptop.py
LENGTHS, LONG, BATCHES = (256, 2048, 8192), 32_768, (1, 8)  # tokens in the cache, rows
LONG_MODELS = ("pythia", "mla", "context")  # timed at LONG too
CONTEXT_TOKENS, PLAIN_SHARE = 500_000, 50  # of the fast recurrence; the plain one takes so much less


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


# ---------------------------------------------------------------------------------------------------- measuring

Work = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a table."""

    work: Work
    amount: float  # units of work that it does, tokens
    to_reach: float | None = None  # times the first contender's rate
    note: str = ""


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
        median, ratios = statistics.median(mine), [a / b for a, b in zip(mine, first, strict=True)]
        contender, ratio = contenders[name], statistics.median(ratios)
        target = "" if contender.to_reach is None else f"{contender.to_reach:g}"
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        rows.append([name, f"{median:,.4g}", f"{ratio:.2f}", spread, target, contender.note])
        results[name] = {"tokens_per_s": mine, "ratios": ratios, "to_reach": contender.to_reach}
    print("\n" + format_table([title, "tokens/s", "ratio", "spread", "to reach", ""], rows), flush=True)
    return {title: results}


def has_transformers() -> bool:
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed (pip install -r requirements-dev.txt): its rows are left out")
        return False
    return True


def text_batch(settings: BenchSettings, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """idx and targets (B, T), the first tokens of the training data."""
    tokens = load_tokens(Path(settings.data_dir, settings.dataset), "train").tokens
    if len(tokens) <= batch_size * length:
        raise InputError(f"{settings.dataset} has {len(tokens)} training tokens, {batch_size * length + 1} are needed")
    rows = torch.from_numpy(tokens[: batch_size * length + 1].astype("int64"))
    return rows[:-1].view(batch_size, length), rows[1:].view(batch_size, length)


def model_config(name: str, settings: BenchSettings) -> Any:
    """The default config of a model, narrower if it has to be quick."""
    config_class, _ = MODELS[name]
    return make(config_class, {}, QUICK_DIVISOR if settings.quick else 1)


def seeded_model(name: str, settings: BenchSettings) -> Any:
    torch.manual_seed(0)
    return build_model(name, model_config(name, settings))


def transformers_model(settings: BenchSettings) -> Any:
    """GPTNeoXForCausalLM of the baseline's shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    c = model_config("pythia", settings)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, intermediate_size=c.intermediate_size, rotary_pct=c.rotary_pct,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


# ----------------------------------------------------------------------------------------------------- training


def bench_train(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """One step of 4 x 256 tokens (CUDA: 16 x 2,048), AdamW: this project's fused one, transformers' as it comes."""
    idx, targets = (x.to(device) for x in text_batch(settings, *((16, 2048) if device.type == "cuda" else (4, 256))))

    def step(model: Any, optimizer: Any, dtype: torch.dtype, theirs: bool) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = next_token_loss(model(idx).logits, targets) if theirs else model(idx, targets)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    contenders, dtypes = {}, {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if has_transformers():
        model = transformers_model(settings).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for name, dtype in dtypes.items():
            contenders[f"transformers {name}"] = Contender(partial(step, model, optimizer, dtype, True), idx.numel())
    model = seeded_model("pythia", settings).to(device)
    optimizer = make_optimizer(model, 1e-4, 0.1, (0.9, 0.95))
    for (name, dtype), to_reach in zip(dtypes.items(), (1.0, 2.0), strict=True):
        work = partial(step, model, optimizer, dtype, False)
        contenders[f"ours {name}"] = Contender(work, idx.numel(), to_reach)
    yield compare("training step", contenders, settings.repeats, device)


# ------------------------------------------------------------------------------------------------------ decoding


def bench_decode(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    for dtype, to_reach in ((torch.float32, 2.5), (torch.bfloat16, 1.8)):
        yield bench_generate(dtype, to_reach, settings, device)
    yield bench_absorbed(settings, device)
    torch._dynamo.config.recompile_limit = 64  # programs of one function, which compile_step has one of per model
    for batch_size in BATCHES:
        lengths = LENGTHS[:2] if settings.quick else LENGTHS if batch_size > 1 else (*LENGTHS, LONG)
        yield from bench_steps(batch_size, lengths, settings, device)


@torch.no_grad()
def bench_generate(
    dtype: torch.dtype, to_reach: float, settings: BenchSettings, device: torch.device
) -> dict[str, Any]:
    """Greedy decoding of one row, prompt 128 + 256 new tokens."""
    new_tokens = 32 if settings.quick else 256
    idx = text_batch(settings, 1, 128)[0].to(device)
    plain, prepared, compiled = (seeded_model("pythia", settings).to(device, dtype).eval() for _ in range(3))
    input_major(prepared)
    contenders = {}
    if has_transformers():
        theirs = transformers_model(settings).to(device, dtype).eval()
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        work: Work = partial(theirs.generate, idx, attention_mask=torch.ones_like(idx), **options)
        contenders["transformers generate"] = Contender(work, new_tokens)

    def generate(model: Any, step: Any = None) -> None:
        for _ in stream_tokens(model, idx, model.init_cache(1, 128 + new_tokens), new_tokens, temperature=0, step=step):
            pass

    contenders["ours"] = Contender(partial(generate, plain), new_tokens)
    contenders["ours, matrices input-major"] = Contender(partial(generate, prepared), new_tokens)
    contenders["ours, compiled"] = Contender(partial(generate, compiled, compile_step(compiled)), new_tokens, to_reach)
    title = f"decode, {str(dtype).removeprefix('torch.')}, 128 + {new_tokens} tokens"
    return compare(title, contenders, settings.repeats, device)


def filled_cache(model: Any, batch_size: int, length: int) -> Any:
    """A cache of that length with numbers in it: pages that were never written are read from one page of zeros."""
    model_cache = model.init_cache(batch_size, length)
    for tensor in model_cache.tensors():
        if tensor.is_floating_point():
            tensor.normal_()
    return model_cache


def decode_steps(step: Any, model_cache: Any, tokens: Tensor) -> None:
    """Decoding steps of tokens (B, steps) at the end of a cache.

    It is set to its length, not fed: how long a step takes depends on how much it reads, not on what.
    """
    model_cache.length = model_cache.max_len - tokens.size(1)
    for token in tokens.split(1, dim=1):
        step(token, cache=model_cache)[0].argmax(dim=-1)


@torch.no_grad()
def bench_steps(
    batch_size: int, lengths: tuple[int, ...], settings: BenchSettings, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Decoding steps of every model, compiled unless it has to be quick; the baseline is the ordinary K/V cache."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = text_batch(settings, batch_size, 4)[0].to(device)
    models = {name: seeded_model(name, settings).to(device, dtype).eval() for name in MODELS}
    steps = models if settings.quick else {name: compile_step(model) for name, model in models.items()}
    for length in lengths:
        contenders = {}
        for name in LONG_MODELS if length == LONG else models:
            model_cache = filled_cache(models[name], batch_size, length)
            to_reach = (1.0 if batch_size > 1 else 0.85) if name == "mla" and length >= 2048 else None
            work = partial(decode_steps, steps[name], model_cache, tokens)
            contenders[name] = Contender(work, tokens.numel(), to_reach, f"cache {format_bytes(model_cache.nbytes)}")
        yield compare(f"decode, {length:,} tokens, batch {batch_size}", contenders, settings.repeats, device)


@torch.no_grad()
def bench_absorbed(settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """A layer of MLA, one query to 2,048 latents, sixteen times: every key and value rebuilt, or none."""
    config = model_config("mla", settings)
    attention = LatentAttention(config).to(device)
    q = torch.randn(1, config.num_heads, 1, config.head_size, device=device)
    c_kv = torch.randn(1, 2048, config.kv_dim, device=device)

    def attend(form: Callable[..., Tensor]) -> None:
        for _ in range(16):
            form(q, c_kv)

    forms = {"MLA, expanded": attention.expanded, "MLA, absorbed": attention.absorbed}
    contenders = {name: Contender(partial(attend, form), 16) for name, form in forms.items()}
    return compare("one layer, 2,048 tokens, batch 1", contenders, settings.repeats, device)


# ----------------------------------------------------------------------------------- attention, and the recurrence


def bench_attention(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """Attention with ALiBi, forward and backward, B 4, H 8, D 64, T 2,048."""
    B, T, slope = (1 if settings.quick else 4), 2048, 0.0625
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    qkv = [torch.randn(B, 8, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    alibi = ALiBiPositionEncoding(slope)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return alibi.apply_to_scores(q @ k.transpose(2, 3) / math.sqrt(64), T).softmax(dim=-1).to(v.dtype) @ v

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = alibi.apply_to_scores(torch.zeros(T, T, device=device), T).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def step(form: Callable[..., Tensor]) -> None:
        form(*qkv).sum().backward()

    forms: dict[str, tuple[Callable[..., Tensor], float | None]] = {
        "matmul, bias, softmax": (naive, None),
        "SDPA with a float mask": (masked, None),
        "bias as extra dimensions": (lambda q, k, v: alibi_attention(q, k, v, slope), 3.0),
    }
    with torch.no_grad():
        expected = naive(*qkv)
        difference = {name: (form(*qkv) - expected).abs().max().item() for name, (form, _) in forms.items()}
    contenders = {
        name: Contender(partial(step, form), B * T, to_reach, f"difference {difference[name]:.0e}")
        for name, (form, to_reach) in forms.items()
    }
    yield compare(f"attention with ALiBi, {B} x 8 x {T:,}", contenders, settings.repeats, device)


@torch.no_grad()
def bench_contexts(settings: BenchSettings, device: torch.device) -> Iterator[dict[str, Any]]:
    """The exact context cache: a module call per token against lanes in lockstep."""
    model = seeded_model("context", settings).to(device)
    block, table = model.context_block, model.embed_in.weight
    num_tokens = CONTEXT_TOKENS // (5 if settings.quick else 1)
    tokens = text_batch(settings, 1, num_tokens)[0][0]
    few = tokens[: num_tokens // PLAIN_SHARE]

    def plain() -> Tensor:
        c, contexts = table.new_zeros(1, block.context_dim), []
        for token in few.to(device):
            c = block(c, table[token][None])
            contexts.append(c[0])
        return torch.stack(contexts).cpu()

    difference = (plain() - exact_contexts(block, table, tokens)[: len(few)]).abs().max()
    lanes = partial(exact_contexts, block, table, tokens)
    contenders = {
        "plain loop of module calls": Contender(plain, len(few)),
        "lanes in lockstep": Contender(lanes, num_tokens, 25, f"difference {difference:.0e}"),
    }
    yield compare("exact context cache", contenders, settings.repeats, device)


# --------------------------------------------------------------------------------------------------- the command

BENCHES = {"train": bench_train, "decode": bench_decode, "attention": bench_attention, "contexts": bench_contexts}


def describe_machine(device: torch.device) -> str:
    """The processor, its cores, the threads in use, torch, and the card."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = found[0] if found else platform.processor() or platform.machine()
    card = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    raised = ", malloc's thresholds raised" if "MALLOC_MMAP_THRESHOLD_" in os.environ else ""
    return f"{card}{processor}, {threads}, torch {torch.__version__}{raised}"


def main() -> None:
    settings, _ = parse_settings(BenchSettings, sys.argv[1:])
    device = pick_device(settings.device)
    machine, folder = describe_machine(device), Path(settings.out_dir)
    print(machine, flush=True)
    make_folder(folder)
    results: dict[str, Any] = {"machine": machine, "settings": asdict(settings)}
    for name in BENCHES if settings.what == "all" else [settings.what]:
        for table in BENCHES[name](settings, device):
            results |= table
            with replacing(folder / "bench.json") as file:
                file.write(json.dumps(results, indent=2).encode())
    print(f"\nall figures are in {folder / 'bench.json'}")


if __name__ == "__main__":
    run(main)
