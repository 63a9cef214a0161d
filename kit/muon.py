"""Muon (Jordan et al. 2024): momentum for the layers' matrices, made orthogonal before each step.

torch.optim.Muon computes in bfloat16, which takes a second a step, at a width of 128, on a CPU that has no instructions
for it. This is the same in float32, and for all matrices of a shape at once.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


def orthogonalise(G: Tensor, a: float, b: float, c: float) -> Tensor:
    """By Newton-Schulz, the singular values of matrices (N, rows, columns) brought to 1, or between 0.7 and 1.2."""
    X = G.mT if G.size(1) > G.size(2) else G
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if G.size(1) > G.size(2) else X


class Muon(torch.optim.Muon):
    """Nesterov momentum, orthogonalised; steps as large as AdamW's, 0.2 in root mean square (arXiv 2502.16982)."""

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
                ahead = torch.stack([p.grad.lerp(self.state[p]["mean"], momentum) for p in params])  # Nesterov
                for p, update in zip(params, orthogonalise(ahead, *self.defaults["ns_coefficients"]), strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr * 0.2 * math.sqrt(max(shape)))
