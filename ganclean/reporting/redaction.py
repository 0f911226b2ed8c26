"""One page that shows what redaction did to a generator, and what was paid for it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

from ganclean.plotting import InvalidityCurveDisplay, RedactionDisplay
from ganclean.redaction import GANRedactor, Invalidity, RedactionReport
from ganclean.redaction.report import LARGE_RECALL_DROP
from ganclean.reporting.page import figure_urls, write_page

N_SHOWN = 32
Row = tuple[str, str, list[tuple[str, str]]]
"""A quantity, which direction is better, and before and after each a value and its interval."""


def write_redaction(
    folder: str | Path, title: str, redactor: GANRedactor, report: RedactionReport, settings: dict[str, str]
) -> Path:
    """Write ``index.html``, ``report.json``, and the networks before and after as safetensors.

    Parameters
    ----------
    folder : path
    title : str
    redactor : GANRedactor
        Fitted.
    report : RedactionReport
        Of this redactor.
    settings : dict of str to str
        What was done, shown at the end of the page.

    Returns
    -------
    Path
        Of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = report.to_dict() | {"history": _json_history(redactor)}
    (folder / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf8")
    pairs = {
        "before": (redactor.generator, redactor.discriminator),
        "after": (redactor.generator_, redactor.discriminator_),
    }
    for when, networks in pairs.items():
        save_file(_tensors(*networks), folder / f"networks_{when}.safetensors")
    return write_page(
        folder,
        "redaction.html.j2",
        title=title,
        verdict=verdict(report),
        redacted=_is_redacted(report),
        price=price(report),
        rows=rows_of(report),
        report=report,
        figures=_figures(redactor),
        settings=settings,
    )


def verdict(report: RedactionReport) -> str:
    """Say in a sentence what became of the invalid samples, by the evaluator where there is one."""
    judge = "criterion" if report.evaluated is None else "evaluator"
    before, after = report.invalidity if report.evaluated is None else report.evaluated[:2]
    if not after.n_samples:
        return (
            "Whether samples are invalid was not measured: the criterion knows some invalid samples, and cannot judge "
            "others."
        )
    found = f"by the {judge}, {before} of the samples were invalid before redaction and {after} are after it."
    if _is_redacted(report):
        return f"Invalid samples have become rarer by {report.reduction:.0%}: {found}"
    if after.low > before.high:
        return f"Redaction has failed: {found}"
    return f"Whether invalid samples have become rarer cannot be told from {after.n_samples}: {found}"


def price(report: RedactionReport) -> str:
    """Say in a sentence what became of quality and variety."""
    before, after = report.quality
    lost = " The generator has lost variety." if report.recall_drop > LARGE_RECALL_DROP else ""
    return (
        f"The Fréchet distance to held-out valid data went from {before['frechet_distance']:.3g} to "
        f"{after['frechet_distance']:.3g}, and recall, the variety of the samples, from {before['recall']:.3g} to "
        f"{after['recall']:.3g}.{lost}"
    )


def rows_of(report: RedactionReport) -> list[Row]:
    """Return the rows of the table of all quantities."""
    rows = [("invalidity by the criterion", "lower is better", _shares(report.invalidity))]
    if report.evaluated is not None:
        rows.append(("invalidity by the evaluator", "lower is better", _shares(report.evaluated[:2])))
    distances = [(f"{values['frechet_distance']:.4g}", "") for values in report.quality]
    rows.append(("Fréchet distance", "lower is better", distances))
    for name in ("precision", "recall", "density", "coverage"):
        rows.append((name, "higher is better", [(f"{values[name]:.3f}", "") for values in report.quality]))
    return rows


def _shares(parts: Iterable[Invalidity]) -> list[tuple[str, str]]:
    """Return shares and their intervals as text."""
    texts = (str(part).partition(" [") if part.n_samples else (str(part), "", "") for part in parts)
    return [(rate, opening.strip() + interval) for rate, opening, interval in texts]


def _is_redacted(report: RedactionReport) -> bool:
    """Return whether the intervals before and after are apart, the latter lower."""
    before, after = report.invalidity if report.evaluated is None else report.evaluated[:2]
    return after.high < before.low


def _figures(redactor: GANRedactor) -> dict[str, str]:
    displays: dict[str, Any] = {}
    shape = redactor.before_and_after(1)[0].shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3):
        displays["samples"] = RedactionDisplay.from_estimator(redactor, n_shown=N_SHOWN)
    if not np.isnan(redactor.history_["invalidity"]).all():
        displays["curve"] = InvalidityCurveDisplay.from_estimator(redactor)
    return figure_urls(displays)


def _json_history(redactor: GANRedactor) -> dict[str, list]:
    """Return the history with None where nothing was measured."""
    return {name: [None if np.isnan(x) else x for x in values] for name, values in redactor.history_.items()}


def _tensors(generator: nn.Module, discriminator: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of both networks by player and name."""
    players = (("generator", generator), ("discriminator", discriminator))
    return {f"{player}.{name}": tensor.contiguous() for player, m in players for name, tensor in m.state_dict().items()}
