"""bench.py: what its tables say, and that the fast training step is the plain one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configurator import MODELS, build_model, names
from pythia_base import PythiaConfig, PythiaModel, input_major, make_optimizer
from tools.bench import BenchSettings, Contender, compare, training_losses

TINY = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}


def test_ratios_are_of_the_same_repeat_and_the_first_run_is_not_counted() -> None:
    """A B A B: the machine is twice as slow in the second repeat, the ratio is the same."""
    order = []

    def contender(name: str, rates: list[float]) -> Callable[[], float]:
        left = iter(rates)

        def rate() -> float:
            order.append(name)
            return next(left)

        return rate

    contenders = {
        "plain": Contender(contender("plain", [1, 100, 50, 100])),
        "fast": Contender(contender("fast", [9, 300, 150, 400]), to_reach=2.5, note="same result"),
    }
    table = compare("work", "tokens/s", contenders, repeats=3)
    assert order == ["plain", "fast"] * 4
    assert [row.ratios for row in table.rows] == [[1, 1, 1], [3, 3, 4]]
    assert table.show().splitlines()[-1].split() == ["fast", "300", "3.00", "3.00-4.00", "2.5", "same", "result"]


def test_fast_training_has_the_losses_of_plain_training(data_dir: Path) -> None:
    """Float32 to 1e-4, bfloat16 to 1e-2, over 4 steps."""
    settings = BenchSettings(dataset="own", data_dir=str(data_dir), num_steps=4)
    losses = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = PythiaModel(PythiaConfig(**{**TINY, "vocab_size": 50304}))  # type: ignore[arg-type]
        optimizer: torch.optim.Optimizer = make_optimizer(model, 1e-3, 0.1, (0.9, 0.95))
        if dtype is None:
            optimizer = torch.optim.AdamW(optimizer.param_groups, fused=False, foreach=False)
        losses[dtype] = torch.tensor(list(training_losses(model, optimizer, dtype, settings, torch.device("cpu"))))
    assert (losses[torch.float32] - losses[None]).abs().mean() < 1e-4
    assert 0 < (losses[torch.bfloat16] - losses[None]).abs().mean() < 1e-2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_input_major_matrices_give_the_same_logits(name: str) -> None:
    """Of a prompt and of single tokens; the weights keep names, shapes and values."""
    config_class, _ = MODELS[name]
    torch.manual_seed(0)
    sizes = {**TINY, "kv_dim": 16, "context_dim": 16}
    model = build_model(name, config_class(**{key: sizes[key] for key in names(config_class) if key in sizes}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    idx = torch.randint(97, (2, 9))

    def logits() -> torch.Tensor:
        cache = model.init_cache(2, 9)
        return torch.cat([model(chunk, cache=cache)[0] for chunk in idx.split([7, 1, 1], dim=1)], dim=1)

    expected = logits()
    input_major(model)
    assert model.embed_in.weight.is_contiguous()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(module.weight.T.is_contiguous() for module in linears)
    torch.testing.assert_close(logits(), expected, atol=1e-5, rtol=1e-5)
