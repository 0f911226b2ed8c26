"""Things that run in turn, so that what the machine does besides falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

WARM_UP = 2


def in_turn(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, np.ndarray]:
    """Return the seconds of processor time that each run took, turn by turn, after two turns of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + WARM_UP):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            if turn >= WARM_UP:
                seconds[name].append(time.process_time() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(ratios: np.ndarray) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return [float(q) for q in np.quantile(ratios, [0.25, 0.5, 0.75])]


def shown(ratios: np.ndarray) -> str:
    """Return the median and the quartiles of ratios as text."""
    low, median, high = quartiles(ratios)
    return f"{median:.2f} ({low:.2f}, {high:.2f})"
