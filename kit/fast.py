"""Fast forms beside the plain ones that they equal: the loss that never holds the logits, decoding on a CPU."""

import functools
import hashlib
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LOSS_ROWS = 256  # rows of logits that exist at a time in loss and scores, 51 MB in float32
GPU_LOSS_ROWS = 4096  # fewer leave a GPU idle between kernels; 824 MB in float32
LOSS_COLUMNS = 8192  # rows of the head's gradient that a chunk is added to at a time, 16 MB that malloc keeps at hand


def loss_rows(h: Tensor) -> int:
    return GPU_LOSS_ROWS if h.is_cuda else LOSS_ROWS


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in float32 of logits (..., V) against targets (...), -100 left out; 0 if that leaves none."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


class HeadLoss(torch.autograd.Function):
    """next_token_loss(h W^T, targets) without ever holding the (N, V) logits: loss_rows(h) rows at a time.

    With p = softmax(h W^T) and y the one-hot targets, the gradient of a row's loss for its logits is p - y, so each
    chunk yields its share of dh = (p - y) W and dW = (p - y)^T h while its logits are at hand; backward only scales.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h (N, C), weight (V, C), targets (N,) -> scalar loss in float32; the products are in the dtype of h."""
        kept = (targets != -100)[:, None]
        targets = targets.masked_fill(targets == -100, 0)[:, None]
        dh, W = torch.empty_like(h), weight.to(h.dtype)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # of a frozen W, none
        total = torch.zeros((), device=h.device)
        chunk = loss_rows(h)
        # on a CPU, memory that is new costs more than what is done with it: one chunk's is used for all
        product = h.new_empty(min(len(h), chunk), len(weight))
        wide = None if h.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
        for rows, y, keep, out in zip(*(x.split(chunk) for x in (h, targets, kept, dh)), strict=True):
            logits = torch.mm(rows, W.T, out=product[: len(rows)])  # the last chunk may be shorter
            p = logits if wide is None else wide[: len(rows)].copy_(logits)
            torch.log_softmax(p, dim=-1, out=p)
            total -= (p.gather(1, y) * keep).sum()
            p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=torch.float32))
            grad = p if wide is None else logits.copy_(p)  # p - y
            torch.mul(grad @ W, keep, out=out)
            if dw is not None:
                for part, columns in zip(dw.split(LOSS_COLUMNS), grad.split(LOSS_COLUMNS, dim=1), strict=True):
                    part += columns.T @ (rows * keep)
        ctx.count = kept.sum().clamp(min=1)
        ctx.save_for_backward(dh, None if dw is None else dw.to(weight.dtype))
        return total / ctx.count

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dh, dw = ctx.saved_tensors
        scale = grad_output / ctx.count
        return dh.mul_(scale), None if dw is None else dw.mul_(scale), None


def score_tokens(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats of every token, and whether it beats all others: (B, T) float32 and bool, for h (B, T, C)."""
    kept, losses, right, chunk = targets != -100, [], [], loss_rows(h)
    ys = targets.where(kept, 0).flatten()[:, None].split(chunk)
    product = h.new_empty(min(targets.numel(), chunk), len(weight))  # one memory for all chunks, as in HeadLoss
    for rows, y in zip(h.flatten(0, 1).split(chunk), ys, strict=True):
        logits = torch.mm(rows, weight.T, out=product[: len(rows)]).float()  # (chunk, V)
        of_target = torch.log_softmax(logits, dim=-1, out=logits).gather(1, y)
        losses.append(-of_target)
        right.append(of_target > logits.scatter_(1, y, -math.inf).amax(dim=-1, keepdim=True))
    return torch.cat(losses).view_as(targets).where(kept, 0), torch.cat(right).view_as(targets) & kept


def head_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """next_token_loss of the head's logits for h (B, T, C), in the dtype of autocast where that is on."""
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    if not torch.is_grad_enabled():
        return score_tokens(h, weight.to(h.dtype), targets)[0].sum() / (targets != -100).sum().clamp(min=1)
    return HeadLoss.apply(h.flatten(0, 1), weight, targets.flatten())


# --------------------------------------------------------------------------- decoding on a CPU, by kit/decode.cpp
MOST_ROWS = 8  # up to which it takes longer to read W than to multiply with it
TURNED_ROWS = 32  # up to which the BLAS has a faster kernel for (W x^T)^T: a step gains 8 to 51% (AVX2, 2 cores)
SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ["-O3", "-march=native", "-ffast-math", "-std=c++20", "-fPIC", "-Wno-psabi"]
kernels: Any = None  # what SOURCE defines, once it is loaded


def prepare_decoding(model: nn.Module) -> None:
    """Let a model on a CPU decode by kit/decode.cpp, compiled for this machine once, in some ten seconds.

    Where there is no compiler, it says so, and the model decodes as it did.
    """
    global kernels
    if next(model.parameters()).device.type != "cpu":
        return
    try:
        torch.ops.load_library(compile_kernels())
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        print(f"decoding is slower without kit/decode.cpp, which cannot be compiled: {reason.strip()[:120]!r}")
        return
    kernels = torch.ops.decode
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear


def compile_kernels() -> Path:
    """The library of SOURCE for this machine and this PyTorch; never half a file, whatever interrupts it."""
    from torch.utils import cpp_extension

    made_for = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {FLAGS}"
    digest = hashlib.sha256(SOURCE.read_bytes() + made_for.encode()).hexdigest()
    library = Path(cpp_extension.get_default_build_root(), f"decode-{digest[:16]}.so")
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            compiler, compiled, linked = os.environ.get("CXX", "c++"), f"{folder}/decode.o", f"{folder}/decode.so"
            # in two steps: a library that is linked with -ffast-math changes how the whole process rounds
            run([compiler, *FLAGS, *includes, "-c", SOURCE, "-o", compiled])
            run([compiler, "-shared", compiled, *libraries, "-o", linked])
            Path(linked).replace(library)
    return library


def round_weights(model: nn.Module) -> None:
    """Round every matrix to bfloat16 and keep it in both forms: the kernels then read half as many bytes.

    The arithmetic stays float32, that of prompts too, so that the text is that of float32 with the rounded weights.
    """
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.__dict__["rounded"] = weight.data.bfloat16()
            weight.data = weight.data.bfloat16().float()


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels are there for x: float32, on a CPU, without gradients."""
    return kernels is not None and not torch.is_grad_enabled() and x.is_cpu and x.dtype is torch.float32


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; where x has few rows, by a kernel that reads W, or its rounded form, as fast as memory gives it."""
    rows = x.numel() // x.size(-1)
    if rows > TURNED_ROWS or not has_kernels(x):
        return F.linear(x, weight, bias)
    if rows > MOST_ROWS:  # (W x^T)^T, the same
        y = F.linear(weight, x.flatten(0, -2)).T.contiguous().unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias
    return kernels.linear.default(x.contiguous(), weight.__dict__.get("rounded", weight), bias)


class RowLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return row_linear(x, self.weight, self.bias)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU; of few rows by a kernel, since PyTorch's takes 30 to 100 microseconds before it begins."""
    few = x.numel() <= MOST_ROWS * x.size(-1)
    return kernels.gelu.default(x.contiguous()) if few and has_kernels(x) else F.gelu(x)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v of one token: q (B, H, 1, D), k, v (B, G, P, D or Dv), bias (B, H, P).

    H / G heads share a key. Keys and values, float32 or bfloat16, are read once, block by block, as in flash decoding.
    """
    return kernels.attend.default(q, k, v, scale, bias)


def attend_latents(q: Tensor, latents: Tensor, bias: Tensor) -> Tensor:
    """softmax(q c^T + bias) c, (B, H, T, L): latents c (B, P, L) are key and value of all heads, bias (B, H, T, P)."""
    if q.size(2) == 1 and has_kernels(q):
        return attend(q, latents[:, None], latents[:, None], 1.0, bias[:, :, 0])
    c = latents.to(q.dtype)
    scores = (q.flatten(1, 2) @ c.transpose(1, 2)).view_as(bias) + bias  # all heads are rows of one product
    return (scores.softmax(dim=-1).to(c.dtype).flatten(1, 2) @ c).view_as(q)
