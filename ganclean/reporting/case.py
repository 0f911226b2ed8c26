"""What a report says of one data set: effects on every metric, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ganclean.cleansing import GANInfluence
from ganclean.validation import CleansingCurve, MetricPanel, PairedComparison, TrustReport

FIDELITY, VARIETY = ("precision", "density"), ("recall", "coverage")


@dataclass(frozen=True)
class Effect:
    """A metric after removal and retraining, over seeds.

    Parameters
    ----------
    mean, deviation : float
        Over seeds; the standard deviation of a single seed is NaN.
    improvement, low, high : float
        The paired improvement over removing nothing, and its 95% interval; NaN for a single seed.
    p_value : float
        Two-sided; where one of several rates is looked at, corrected for their number.
    """

    mean: float
    deviation: float
    improvement: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p_value: float = np.nan

    @property
    def better(self) -> bool:
        """Whether removal improves the metric, at the 95% level."""
        return self.p_value < 0.05 and self.improvement > 0

    @property
    def worse(self) -> bool:
        """Whether removal worsens the metric, at the 95% level."""
        return self.p_value < 0.05 and self.improvement < 0


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
    cleanser : GANInfluence
        Fitted on X.
    curve : CleansingCurve
        Of ``"influence"`` and other selectors.
    trust : TrustReport, optional
    is_foreign : ndarray of shape (n_samples,) of bool, optional
        Which instances are known to be foreign.
    files : list of str, optional
        Where each instance came from.
    panels : dict of str to MetricPanel, optional
        Of the first seed's generators, "none" trained on all data and "influence" retrained.
    """

    title: str
    X: np.ndarray
    rows: np.ndarray
    cleanser: GANInfluence
    curve: CleansingCurve
    trust: TrustReport | None = None
    is_foreign: np.ndarray | None = None
    files: list[str] | None = None
    panels: Mapping[str, MetricPanel] | None = None

    @property
    def n_seeds(self) -> int:
        """How many trainings are compared."""
        return len(self.curve.harmfulness)

    @property
    def n_removed(self) -> int:
        """How many instances the cleanser dropped."""
        return int((~self.cleanser.support_).sum())

    @property
    def chosen(self) -> bool:
        """Whether how much to remove was chosen on validation data."""
        return self.cleanser.n_remove == "auto"

    @property
    def shows_values(self) -> bool:
        """Whether instances are so few numbers that a table of rows has room for them."""
        return self.X.ndim == 2 and self.X.shape[1] <= 6

    @property
    def position(self) -> int:
        """Which of the tried removal rates is nearest to what the cleanser dropped."""
        return self.curve.nearest(self.n_removed / len(self.X))

    @property
    def amount(self) -> str:
        """Say how much is removed in the table of effects."""
        if not self.chosen:
            return f"{self.curve.rates[self.position]:.0%}"
        return f"up to {self.curve.rates.max():.0%}"

    @property
    def precision(self) -> np.ndarray:
        """For each seed, which part of the removed instances is foreign."""
        assert self.is_foreign is not None
        worst = np.argsort(-self.curve.harmfulness, axis=1, kind="stable")[:, : self.n_removed]
        return self.is_foreign[worst].mean(axis=1)

    def samples(self, name: str, n_samples: int) -> np.ndarray:
        """Return samples of the first seed's generator, without removal ("none") or retrained, of the same latents."""
        evaluator = self.cleanser.evaluator(n_samples)
        inputs = [evaluator.latents] if evaluator.labels is None else [evaluator.latents, evaluator.labels]
        with torch.no_grad():
            return self.curve.generators[name](*inputs).float().cpu().numpy()

    def effect(self, selector: str, metric: str, against: str = "none") -> Effect:
        """Return what removal by a selector does to a metric, at the rate of the cleanser.

        Parameters
        ----------
        selector : str
            One of the curve's, or "none": nothing removed.
        metric : str
        against : str, default="none"
            What the paired improvement is over: removing nothing, or another selector.
        """
        baseline = self.curve.baseline[metric]
        values = baseline
        if selector != "none":
            tried = np.column_stack([baseline, self.curve.values[metric][selector]])
            columns = self.curve.chosen_rates(selector) if self.chosen else np.full(len(tried), 1 + self.position)
            values = tried[np.arange(len(tried)), columns]
        mean, deviation = float(values.mean()), float(values.std(ddof=1)) if self.n_seeds > 1 else np.nan
        if selector == "none" or self.n_seeds == 1:
            return Effect(mean, deviation)
        up, p_down = self._tests(selector, metric, against)
        p_value = min(1.0, 2 * min(up.p_value, p_down))
        return Effect(mean, deviation, up.improvement, up.low, up.high, p_value)

    def effects(self) -> dict[str, dict[str, Effect]]:
        """Return the effect of each selector, and first of removing nothing, on each metric that was evaluated."""
        metrics = list(self.curve.values)
        return {name: {m: self.effect(name, m) for m in metrics} for name in ["none", *self.curve.selectors]}

    def verdict(self) -> str:
        """Say in words whether removal helped."""
        what = f"Removing the {'' if self.chosen else self.amount + ' '}most harmful instances"
        what += ", as many as validation data suggest," if self.chosen else ""
        what += f" and retraining the {window(self.curve.last_epochs)}"
        metric = f"the held-out {self.curve.metric}"
        none = self.effect("influence", self.curve.metric)
        if self.n_seeds == 1:
            change = none.mean - self.effect("none", self.curve.metric).mean
            return f"{what} changes {metric} by {change:+.3g}; a single seed does not tell whether that is chance."
        if "random" not in self.curve.selectors:
            test = f"(paired over {self.n_seeds} seeds: p = {none.p_value:.2g})"
            does = "improves" if none.better else "worsens" if none.worse else "does not significantly change"
            return f"{what} {does} {metric} against no removal {test}."
        random = self.effect("influence", self.curve.metric, "random")
        test = f"(paired over {self.n_seeds} seeds: p = {none.p_value:.2g} and p = {random.p_value:.2g})"
        if none.better and random.better:
            return f"{what} improves {metric}, against no removal and against random removal of as many {test}."
        if none.better:
            return (
                f"{what} improves {metric} against no removal, but not more than random removal of as many does {test}."
            )
        if none.worse:
            return f"{what} worsens {metric} against no removal {test}."
        if random.better:
            return f"{what} is better for {metric} than random removal of as many, but not than no removal {test}."
        return f"{what} does not improve {metric} at the 95% level {test}."

    def helps(self) -> bool:
        """Whether removal of the most harmful is better than none and, where it was tried, than random removal."""
        others = ["none", *(name for name in ("random",) if name in self.curve.selectors)]
        return all(self.effect("influence", self.curve.metric, other).better for other in others)

    def price(self) -> str | None:
        """Say whether fidelity was bought with variety or the reverse; None where neither was evaluated."""
        known = {m: self.effect("influence", m) for m in (*FIDELITY, *VARIETY) if m in self.curve.values}
        if not known or self.n_seeds == 1:
            return None
        up = [m for m, effect in known.items() if effect.better]
        down = [m for m, effect in known.items() if effect.worse]
        said = " and ".join(f"{_listed(names)} {how}" for names, how in ((up, "higher"), (down, "lower")) if names)
        if not said:
            same = f"leaves {_listed(list(known))} as they were"
            return f"Removal of the most harmful {same}, as far as {self.n_seeds} seeds can tell."
        if set(up) & set(FIDELITY) and set(down) & set(VARIETY):
            return f"Variety pays for fidelity: removal of the most harmful makes {said}."
        if set(up) & set(VARIETY) and set(down) & set(FIDELITY):
            return f"Fidelity pays for variety: removal of the most harmful makes {said}."
        return f"Removal of the most harmful makes {said}."

    def choice(self) -> str | None:
        """Say what validation data suggested to the cleanser; None where how much to remove was given."""
        if not self.chosen:
            return None
        values = self.cleanser.removal_values_
        return (
            f"On the validation data, {self.curve.metric} was {values[0]:.4g} with nothing removed and best, "
            f"{values[self.n_removed]:.4g}, with {self.n_removed} of {len(self.X)} instances removed."
        )

    def _tests(self, selector: str, metric: str, against: str) -> tuple[PairedComparison, float]:
        """Return the one-sided test of an improvement, and the p-value of the opposite."""
        if self.chosen:
            up = self.curve.compare(selector, against, "auto", metric)
            # Where no seed differs from another, there is nothing to test: only the sign counts.
            return up, 1.0 - up.p_value if up.high > up.low else float(up.improvement >= 0)
        # The reverse comparison has a p-value of its own: a corrected one does not tell its complement.
        down = self.curve.compare_all(against, selector, metric)[self.position].p_value
        return self.curve.compare_all(selector, against, metric)[self.position], down


def window(last_epochs: int | None) -> str:
    """Say which part of a run was retrained."""
    if last_epochs is None:
        return "whole run"
    return "last epoch" if last_epochs == 1 else f"last {last_epochs} epochs"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
