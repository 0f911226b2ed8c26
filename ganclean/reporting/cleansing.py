"""One page that shows what was removed, whether it helped, and how far that can be trusted."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from ganclean.plotting import (
    CleansingCurveDisplay,
    HarmfulnessScatterDisplay,
    ImageGridDisplay,
    InfluenceHistogramDisplay,
    InfluenceScatterDisplay,
)
from ganclean.reporting.case import CleansingCase
from ganclean.reporting.page import figure_urls, write_page
from ganclean.reporting.table import panel_rows, table_of


def write_report(folder: str | Path, cases: list[CleansingCase], settings: dict[str, str]) -> Path:
    """Write ``index.html`` and, for the first case, scores, kept rows and generators.

    Parameters
    ----------
    folder : path
    cases : list of CleansingCase
    settings : dict of str to str
        What was done, shown at the end of the page.

    Returns
    -------
    Path
        Of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    main = cases[0]
    write_scores(folder / "scores.csv", main)
    np.save(folder / "kept.npy", main.rows[main.cleanser.support_])
    for name, label in (("none", "before"), ("influence", "after")):
        state = {k: v.detach().clone().contiguous() for k, v in main.curve.generators[name].state_dict().items()}
        save_file(state, folder / f"generator_{label}.safetensors")
    return write_page(
        folder,
        "cleansing.html.j2",
        title=main.title,
        cases=cases,
        tables=[table_of(case) for case in cases],
        panels=[panel_rows(case) for case in cases],
        figures=[_figures(case) for case in cases],
        settings=settings,
    )


def write_scores(path: Path, case: CleansingCase) -> None:
    """Write index, influence, harmfulness and whether it was kept, for each instance, and its file where it has one."""
    cleanser = case.cleanser
    header = ["index", "influence", "harmfulness", "kept", *(["file"] if case.files else [])]
    columns = [case.rows, cleanser.influence_, cleanser.harmfulness_, cleanser.support_.astype(int)]
    if case.files:
        columns.append(np.array(case.files))
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*(column.tolist() for column in columns)))


def _figures(case: CleansingCase) -> dict[str, str]:
    """Return the case's figures as data URLs."""
    displays: dict[str, Any] = {
        "curve": CleansingCurveDisplay.from_curve(case.curve, relative=True),
        "histogram": InfluenceHistogramDisplay.from_estimator(case.cleanser),
    }
    if case.trust is not None:
        displays["trust"] = InfluenceScatterDisplay.from_agreement(case.trust, metric=case.curve.metric)
    if case.X.ndim == 4 and case.X.shape[1] in (1, 3):
        for which in ("harmful", "helpful"):
            displays[which] = ImageGridDisplay.from_estimator(case.cleanser, case.X, which=which, n_shown=32)
        for name in ("none", "influence"):
            displays[f"samples_{name}"] = ImageGridDisplay(case.samples(name, 64), n_columns=8).plot()
    elif case.X.ndim == 2 and case.X.shape[1] == 2:
        displays["points"] = HarmfulnessScatterDisplay.from_estimator(case.cleanser, case.X)
    return figure_urls(displays)
