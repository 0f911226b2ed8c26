"""One page that shows which training instances generated samples resemble."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import save_npz

from ganclean.plotting import AttributionDisplay, CreditShareDisplay, ImageGridDisplay
from ganclean.plotting.style import COLORS
from ganclean.reporting.page import figure_urls, write_page
from ganclean.valuation import GMValuator

N_SHOWN = 32
N_ROWS = 12


def write_valuation(
    folder: str | Path,
    title: str,
    X: np.ndarray,
    valuator: GMValuator,
    settings: dict[str, str],
    files: list[str] | None = None,
) -> Path:
    """Write ``index.html``, ``values.csv``, ``kept.npy`` and the credits as ``attributions.npz``.

    Parameters
    ----------
    folder : path
    title : str
    X : ndarray of shape (n_samples, *sample_shape)
        The training data.
    valuator : GMValuator
        Fitted to them.
    settings : dict of str to str
        What was done, shown at the end of the page.
    files : list of str, optional
        Where each instance came from.

    Returns
    -------
    Path
        Of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(i) for i in range(len(X))] if files is None else files
    with open(folder / "values.csv", "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "value", "harmfulness", "kept", *(["file"] if files else [])])
        columns = [valuator.values_.tolist(), valuator.harmfulness_.tolist(), valuator.support_.astype(int).tolist()]
        writer.writerows(zip(range(len(X)), *columns, *([files] if files else [])))
    np.save(folder / "kept.npy", valuator.sample_indices_)
    save_npz(folder / "attributions.npz", valuator.attributions_)
    most, least = np.argsort(-valuator.values_, kind="stable"), np.argsort(-valuator.harmfulness_, kind="stable")
    return write_page(
        folder,
        "valuation.html.j2",
        title=title,
        summary=summary(valuator),
        figures=_figures(X, valuator, most, least),
        most=[(names[i], valuator.values_[i]) for i in most[:N_ROWS]],
        least=[(names[i], valuator.values_[i]) for i in least[:N_ROWS]],
        settings=settings,
    )


def summary(valuator: GMValuator) -> str:
    """Say in a sentence how credit is distributed."""
    values = valuator.values_
    tenth = max(1, len(values) // 10)
    top = np.sort(values)[-tenth:].sum() / values.sum()
    of_what = "held-out real instances" if valuator.query == "reference" else "samples"
    return (
        f"Of the credit that {len(valuator.quality_)} {of_what} give, {top:.0%} goes to a tenth of the {len(values)} "
        f"training instances; {(values == 0).sum()} of them get none."
    )


def _figures(X: np.ndarray, valuator: GMValuator, most: np.ndarray, least: np.ndarray) -> dict[str, str]:
    displays: dict[str, Any] = {"shares": CreditShareDisplay.from_estimator(valuator)}
    if X.ndim == 4 and X.shape[1] in (1, 3):
        displays["attributions"] = AttributionDisplay.from_estimator(valuator, X, n_shown=8)
        for name, order, color in (("most", most, "helpful"), ("least", least, "faint")):
            rows = order[:N_SHOWN]
            captions = [f"{valuator.values_[row]:.2g}" for row in rows]
            displays[name] = ImageGridDisplay(X[rows], captions, frame=COLORS[color]).plot()
    return figure_urls(displays)
