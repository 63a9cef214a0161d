"""Half an hour of training in the smallest size (pytest --long tests/damage/test_soak.py): the memory stays flat."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

MINUTES, COUNTED = 30, 5  # the resident size swings within a step, so its largest over minutes is what counts


def resident(pid: int) -> int:
    """Resident memory of a process in KiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None, "it has ended"
    return int(found[1])


def test_half_an_hour_of_training_keeps_its_memory(is_long: bool, data_dir: Path, tmp_path: Path) -> None:
    if not is_long:
        pytest.skip("takes half an hour: --long")
    words = [*TINY, f"--data_dir={data_dir}", "--dataset=own", "--device=cpu", f"--out_dir={tmp_path / 'run'}"]
    command = [sys.executable, "train.py", "config/pythia.py", *words, "--max_iters=1_000_000_000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        largest, started = [], time.monotonic()  # resident size in MiB, per minute
        try:
            for minute in range(1, MINUTES + 1):
                sizes = []
                while time.monotonic() < started + 60 * minute:
                    time.sleep(0.25)
                    sizes.append(resident(process.pid) / 1024)
                largest.append(max(sizes))
                print(f"minute {minute}: {largest[-1]:.1f} MiB", flush=True)
        finally:
            process.kill()
    after_start, in_the_end = max(largest[COUNTED : 2 * COUNTED]), max(largest[-COUNTED:])
    assert abs(in_the_end / after_start - 1) < 0.02
