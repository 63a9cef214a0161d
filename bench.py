"""Speed, measured side by side in one run: A B A B, medians, ratios.

    python bench.py --what=contexts --init_from=out/phase1

Machines are noisy and differ: a ratio of two forms that ran in turn carries over, a time does not.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configurator import BenchSettings, InputError, build_model, load_source, parse_settings, pick_device, run
from model_context import ContextBlock, ContextPythiaConfig
from prep import exact_contexts, load_tokens
from report import format_table

PLAIN_SHARE = 50  # the plain form takes this much less of the same work
DISPLAYED = ("min", "median", "max")


def interleave(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run the contenders in turn, once to warm up and then repeats times; each returns its units of work a second."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, work in contenders.items():
            rate = work()
            if repeat:
                rates[name].append(rate)
    return rates


def rate_of(work: Callable[[], Any], amount: int, device: torch.device) -> float:
    """Units of work a second."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return amount / (time.perf_counter() - started)


@torch.no_grad()
def plain_contexts(block: ContextBlock, table: Tensor, tokens: Tensor) -> Tensor:
    """The recurrence as a module call per token, (N,) -> (N, E)."""
    c, contexts = table.new_zeros(1, block.context_dim), []
    for token in tokens.to(table.device):
        c = block(c, table[token][None])
        contexts.append(c[0])
    return torch.stack(contexts).cpu()


def bench_contexts(settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """The exact context cache: a module call per token against lanes in lockstep. To reach: 25 times as fast."""
    if settings.init_from:
        model, _ = load_source(settings.init_from)
    else:
        torch.manual_seed(0)
        model = build_model("context", ContextPythiaConfig())
    if not hasattr(model, "context_blocks"):
        raise InputError(f"{settings.init_from} has no ContextBlock: name a run of config/phase1.py")
    block, table = model.to(device).context_blocks[0], model.embed_in.weight
    stream = load_tokens(Path(settings.data_dir, settings.dataset), "train").tokens[: settings.num_tokens]
    tokens = torch.from_numpy(stream.astype("int64"))
    few = tokens[: len(tokens) // PLAIN_SHARE]
    difference = (plain_contexts(block, table, few) - exact_contexts(block, table, tokens)[: len(few)]).abs().max()
    rates = interleave(
        {
            "plain loop of module calls": lambda: rate_of(lambda: plain_contexts(block, table, few), len(few), device),
            "lanes in lockstep": lambda: rate_of(lambda: exact_contexts(block, table, tokens), len(tokens), device),
        },
        settings.repeats,
    )
    return {"unit": "tokens/s", "to_reach": 25, "largest_difference": difference.item(), "rates": rates}


def show(result: dict[str, Any]) -> str:
    """A row per contender: its rates, and the median against the first one's."""
    first = statistics.median(next(iter(result["rates"].values())))
    rows = []
    for name, rates in result["rates"].items():
        spread = [min(rates), statistics.median(rates), max(rates)]
        rows.append([name, *(f"{rate:,.0f}" for rate in spread), f"{spread[1] / first:.1f}"])
    return format_table([result["unit"], *DISPLAYED, "ratio"], rows)


def main() -> None:
    settings, _ = parse_settings(BenchSettings, sys.argv[1:], takes="")
    device = pick_device(settings.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    result = bench_contexts(settings, device)
    print(f"{machine}\n\n{show(result)}")
    print(f"\nto reach: {result['to_reach']}; largest difference of the outputs: {result['largest_difference']:.1e}")
    Path(settings.out).write_text(json.dumps({"machine": machine, settings.what: result}, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
