"""tools/bench.py: what its tables say; matrices input-major, which decode faster, give the same logits."""

import re

import pytest
import torch

from configurator import MODELS, build_model
from kit.fast import input_major
from kit.weights import settable
from tools.bench import Contender, compare

TINY = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}


def test_ratios_are_of_the_same_repeat_and_the_first_run_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A B A B: the machine is twice as slow in the second repeat, the ratio is the same."""
    order, clock = [], [0.0]
    seconds = {"plain": iter([9.0, 1.0, 2.0, 1.0]), "fast": iter([1.0, 1 / 3, 2 / 3, 1 / 4])}

    def work(name: str) -> None:
        order.append(name)
        clock[0] += next(seconds[name])

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    contenders = {
        "plain": Contender(lambda: work("plain"), 100),
        "fast": Contender(lambda: work("fast"), 100, to_reach="2.5"),
    }
    table = compare("work", contenders, repeats=3, device=torch.device("cpu"))
    assert order == ["plain", "fast"] * 4
    assert table["work"]["fast"]["ratios"] == pytest.approx([3, 3, 4])
    assert re.sub(" +", " ", capsys.readouterr().out).endswith("| fast | 300 | 3.00 | 3.00-4.00 | 2.5 |\n")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_input_major_matrices_give_the_same_logits(name: str) -> None:
    """Of a prompt and of single tokens; the weights keep names, shapes and values."""
    config_class, _ = MODELS[name]
    torch.manual_seed(0)
    sizes = {**TINY, "kv_dim": 16, "context_dim": 16}
    model = build_model(name, config_class(**{key: sizes[key] for key in settable(config_class) if key in sizes}))
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
