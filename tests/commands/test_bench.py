"""tools/bench.py: what its tables say."""

import re

import pytest
import torch

from tools import bench
from tools.bench import Contender, compare


@pytest.mark.parametrize("busy", [False, True])
def test_ratios_are_of_the_same_repeat_and_the_first_run_is_not_counted(
    busy: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A B A B: the machine is twice as slow in the second repeat, the ratio is the same; a limit is the longer one."""
    order, clock, peaks = [], [0.0], iter([10_000.0, 7_000.0 if busy else 9_000.0])
    seconds = {"plain": iter([9.0, 1.0, 2.0, 1.0]), "fast": iter([1.0, 1 / 3, 2 / 3, 1 / 4])}

    def work(name: str) -> None:
        order.append(name)
        clock[0] += next(seconds[name])

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench, "speeds", lambda device: {"read": 1000.0, "float32": 1.0, "bfloat16": next(peaks)})
    contenders = {
        "plain": Contender(lambda: work("plain"), 100),
        "fast": Contender(lambda: work("fast"), 100, bytes=150, operations=1000, dtype=torch.bfloat16),
    }
    table = compare("work", contenders, repeats=3, device=torch.device("cpu"))["work"]
    assert order == ["plain", "fast"] * 4
    assert table["rows"]["fast"]["seconds"] == pytest.approx([1 / 3, 2 / 3, 1 / 4])
    assert table["busy"] == busy
    lines = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert lines[1].startswith("| work (busy) | ms" if busy else "| work | ms")
    assert lines[4] == "| fast | 333.33 | 300 | 3.00 | 3.00-4.00 | 150.00 | 45% |"
