"""tools/bench.py: what its tables say."""

import re

import pytest
import torch

from tools.bench import Contender, compare


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
