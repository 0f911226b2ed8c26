"""One page that shows what was removed, whether it helped, and how that was found out."""

from __future__ import annotations

import base64
import csv
import io
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ganclean._version import __version__
from ganclean.cleansing import GANInfluence
from ganclean.exceptions import missing_extra
from ganclean.plotting import CleansingCurveDisplay, ImageGridDisplay, InfluenceHistogramDisplay
from ganclean.validation import CleansingCurve, PairedComparison


@dataclass(frozen=True)
class CleansingCase:
    """One data set that was cleansed.

    Parameters
    ----------
    title : str
    X : ndarray of shape (n_samples, *sample_shape)
        What was trained on.
    rows : ndarray of shape (n_samples,), int64
        Where these instances are in the data that the user gave.
    cleaner : GANInfluence
        Fitted on X.
    curve : CleansingCurve
    is_foreign : ndarray of shape (n_samples,) of bool, optional
        Which instances are known to be foreign.
    files : list of str, optional
        Where each instance came from.
    """

    title: str
    X: np.ndarray
    rows: np.ndarray
    cleaner: GANInfluence
    curve: CleansingCurve
    is_foreign: np.ndarray | None = None
    files: list[str] | None = None

    @property
    def n_removed(self) -> int:
        """How many instances the cleanser dropped."""
        return int((~self.cleaner.support_).sum())

    @property
    def rate(self) -> float:
        """The tried removal rate that is nearest to what the cleanser dropped."""
        return float(self.curve.rates[self.curve.nearest(self.n_removed / len(self.X))])

    @property
    def precision(self) -> np.ndarray:
        """For each seed, which part of the removed instances is foreign."""
        assert self.is_foreign is not None
        worst = np.argsort(-self.curve.harmfulness, axis=1, kind="stable")[:, : self.n_removed]
        return self.is_foreign[worst].mean(axis=1)

    def comparisons(self) -> dict[str, PairedComparison]:
        """Removal of the most harmful against no removal and against random removal, at the chosen rate."""
        return {against: self.curve.compare("influence", against, self.rate) for against in ("none", "random")}

    def verdict(self) -> str:
        """Say in words whether removal helped."""
        none, random = self.comparisons().values()
        what = (
            f"Removing the {self.rate:.0%} most harmful instances and retraining the {window(self.curve.last_epochs)}"
        )
        metric = f"the held-out {self.curve.metric}"
        test = f"(paired over {none.n} seeds: p = {none.p_value:.3g} and p = {random.p_value:.3g})"
        if none.significant and random.significant:
            return f"{what} improves {metric}, against no removal and against random removal of as many {test}."
        if none.significant:
            return (
                f"{what} improves {metric} against no removal, but not more than random removal of as many does {test}."
            )
        if random.significant:
            return f"{what} is better for {metric} than random removal of as many, but not than no removal {test}."
        return f"{what} does not improve {metric} at the 95% level {test}."

    def rows_of_table(self) -> list[tuple[str, float, float]]:
        """Return (what was removed, mean over seeds, standard deviation) at the chosen rate."""
        i = self.curve.nearest(self.rate)
        columns = {
            "nothing removed": self.curve.baseline,
            f"{self.rate:.0%} most harmful removed": self.curve.values["influence"][:, i],
            f"{self.rate:.0%} random removed": self.curve.values["random"][:, i],
        }
        return [(name, float(v.mean()), float(v.std(ddof=1))) for name, v in columns.items()]


def window(last_epochs: int | None) -> str:
    """Say which part of a run was retrained."""
    if last_epochs is None:
        return "whole run"
    return "last epoch" if last_epochs == 1 else f"last {last_epochs} epochs"


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
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise missing_extra("jinja2", "cli") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    main = cases[0]
    write_scores(folder / "scores.csv", main)
    np.save(folder / "kept.npy", main.rows[main.cleaner.support_])
    for name, label in (("none", "before"), ("influence", "after")):
        state = {k: v.detach().clone().contiguous() for k, v in main.curve.generators[name].state_dict().items()}
        save_file(state, folder / f"generator_{label}.safetensors")
    template = Environment(autoescape=True).from_string(files(__package__).joinpath("report.html.j2").read_text("utf8"))
    page = folder / "index.html"
    page.write_text(
        template.render(
            cases=cases, figures=[_figures(case) for case in cases], settings=settings, version=__version__
        ),
        encoding="utf8",
    )
    return page


def write_scores(path: Path, case: CleansingCase) -> None:
    """Write index, influence, harmfulness and whether it was kept, for each training instance."""
    cleaner = case.cleaner
    header = ["index", "influence", "harmfulness", "kept"] + (["file"] if case.files else [])
    columns = [case.rows, cleaner.influence_, cleaner.harmfulness_, cleaner.support_.astype(int)]
    if case.files:
        columns.append(np.array(case.files))
    with open(path, "w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*(column.tolist() for column in columns)))


def _figures(case: CleansingCase) -> dict[str, str]:
    """Return the case's figures as data URLs."""
    import matplotlib.pyplot as plt

    displays: dict[str, Any] = {
        "curve": CleansingCurveDisplay.from_curve(case.curve),
        "histogram": InfluenceHistogramDisplay.from_estimator(case.cleaner),
    }
    if case.X.ndim == 4 and case.X.shape[1] in (1, 3):
        for which in ("harmful", "helpful"):
            displays[which] = ImageGridDisplay.from_estimator(case.cleaner, case.X, which=which, n_shown=32)
        latents = case.cleaner._evaluator(64).latents
        for name in ("none", "influence"):
            with torch.no_grad():
                samples = case.curve.generators[name](latents).float().cpu().numpy()
            displays[f"samples_{name}"] = ImageGridDisplay(samples, n_columns=8).plot()
    urls = {}
    for name, display in displays.items():
        buffer = io.BytesIO()
        display.figure_.savefig(buffer, format="png", dpi=144)
        plt.close(display.figure_)
        urls[name] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return urls
