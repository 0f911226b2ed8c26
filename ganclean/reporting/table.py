"""The tables of a report: effects of removal, and one metric of each family beside its value for real data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ganclean.plotting.style import selector_label
from ganclean.reporting.case import CleansingCase, Effect

PANEL_LABELS = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "inception score",
    "ct": "C_T",
    "fld": "FLD",
    "fld_gap": "FLD gap",
}


@dataclass(frozen=True)
class Cell:
    """One metric after one removal, as text.

    Parameters
    ----------
    value : str
        Mean and standard deviation.
    change : str
        The paired improvement and its p-value; empty where nothing was removed.
    kind : str
        "better", "worse" or "".
    interval : str
        Of the improvement.
    """

    value: str
    change: str
    kind: str
    interval: str


def table_of(case: CleansingCase) -> tuple[list[tuple[str, str]], list[tuple[str, list[Cell]]]]:
    """Return the columns, (metric, which direction is better), and the rows, (what was removed, cells)."""
    effects, better = case.effects(), case.curve.greater_is_better
    columns = [(metric, "higher is better" if better[metric] else "lower is better") for metric in case.curve.values]
    decimals = {metric: _decimals([row[metric].mean for row in effects.values()]) for metric, _ in columns}
    rows = [
        (
            "nothing" if selector == "none" else selector_label(selector),
            [_cell(row[metric], decimals[metric]) for metric, _ in columns],
        )
        for selector, row in effects.items()
    ]
    return columns, rows


def panel_rows(case: CleansingCase) -> list[tuple[str, ...]]:
    """Return (metric, which values are good, real data, before removal, after it) of a case's panels, if it has any."""
    if case.panels is None:
        return []
    both = before, _ = [case.panels[name].to_dict() for name in ("none", "influence")]
    rows = []
    for name, row in before.items():
        columns = [(row["null_mean"], row["null_sd"]), *((values[name]["mean"], values[name]["sd"]) for values in both)]
        decimals = _decimals([mean for mean, _ in columns])
        texts = [f"{_number(mean, decimals)} ({_number(deviation, decimals)})" for mean, deviation in columns]
        rows.append((PANEL_LABELS.get(name, name), row["better"], *texts))
    return rows


def p_text(p: float) -> str:
    """Return a p-value as text, exact enough to tell on which side of 0.05 it is."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _cell(effect: Effect, decimals: int) -> Cell:
    def number(value: float, sign: str = "") -> str:
        return _number(value, decimals, sign)

    value = number(effect.mean) + ("" if math.isnan(effect.deviation) else f" ({number(effect.deviation)})")
    if math.isnan(effect.improvement):
        return Cell(value, "", "", "")
    return Cell(
        value,
        f"{number(effect.improvement, '+')}, {p_text(effect.p_value)}",
        "better" if effect.better else "worse" if effect.worse else "",
        f"95% interval {number(effect.low, '+')} to {number(effect.high, '+')}",
    )


def _number(value: float, decimals: int, sign: str = "") -> str:
    # Without the sign of what rounds to zero from below.
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


def _decimals(values: list[float]) -> int:
    """Return how many decimals show four digits of the largest value, or three below one."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 3 if largest == 0 else max(0, (3 if largest >= 1 else 2) - math.floor(math.log10(largest)))
