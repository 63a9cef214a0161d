"""Muon (Jordan et al. 2024): momentum for the layers' matrices, made orthogonal before each step.

torch.optim.Muon computes in bfloat16, which takes a second a step, at a width of 128, on a CPU that has no instructions
for it. This is the same in float32, and for all matrices of a shape at once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # from any singular value in (0, 1] to about 1, in 5 steps


def orthogonalise(G: Tensor) -> Tensor:
    """The singular values of matrices (N, rows, columns) brought to 1, roughly: between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    X = G.mT if G.size(1) > G.size(2) else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.size(1) > G.size(2) else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; steps as large as AdamW's, 0.2 in root mean square (arXiv 2502.16982)."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum, of_shape = group["lr"], group["momentum"], defaultdict[torch.Size, list[Any]](list)
            for p in group["params"]:
                if p.grad is not None:
                    of_shape[p.shape].append(p)
                    if p not in self.state:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    self.state[p]["mean"].lerp_(p.grad, 1 - momentum)
            for shape, params in of_shape.items():
                ahead = [p.grad.lerp(self.state[p]["mean"], momentum) for p in params]  # Nesterov
                for p, update in zip(params, orthogonalise(torch.stack(ahead)), strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * 0.2 * math.sqrt(max(shape)))
