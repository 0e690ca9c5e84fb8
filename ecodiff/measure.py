"""Time and size, measured."""

import statistics
import time
from collections.abc import Callable

import torch


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Median wall-clock time of `run` in ms, after one warm-up call."""
    run()
    times = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        run()
        _synchronise()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def parameters(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
