"""Does removal help? The metric on held-out data after removal and retraining, over seeds (theory, section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ganclean.dynamics.network import loaded
from ganclean.dynamics.state import TrainingState
from ganclean.metrics.base import Metric
from ganclean.parallel import side_by_side
from ganclean.progress import progress_bars
from ganclean.runs.replay import Replay, weights_without
from ganclean.validation.counterfactual import Judge
from ganclean.validation.selectors import Selector, resolve_selector
from ganclean.validation.significance import PairedComparison, corrected, paired_comparison

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence

Values = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class CleansingCurve:
    """Metrics on held-out data after removal and retraining.

    Parameters
    ----------
    metric : str
        The name of the metric that influence is on.
    greater_is_better : dict of str to bool
        For each metric that was evaluated.
    rates : ndarray of shape (n_rates,)
        Fractions of the training data that were removed.
    baseline : dict of str to ndarray of shape (n_seeds,)
        Each metric without removal.
    values : dict of str to dict of str to ndarray of shape (n_seeds, n_rates)
        Each metric after removing what each selector found the most harmful: ``values[metric][selector]``.
    validation_baseline : ndarray of shape (n_seeds,)
    validation : dict of str to ndarray of shape (n_seeds, n_rates)
        `metric` for each selector against the validation data, by which ``rate="auto"`` chooses.
    harmfulness : ndarray of shape (n_seeds, n_samples)
        By which the first selector found the most harmful.
    last_epochs : int or None
        How many epochs were retrained; None for all.
    generators : dict of str to torch.nn.Module
        The first seed's generator without removal (``"none"``) and retrained after each selector's removal, at the
        rate that is nearest to the cleanser's `n_remove`.
    """

    metric: str
    greater_is_better: dict[str, bool]
    rates: np.ndarray
    baseline: dict[str, np.ndarray]
    values: Values
    validation_baseline: np.ndarray
    validation: dict[str, np.ndarray]
    harmfulness: np.ndarray
    last_epochs: int | None = None
    generators: dict[str, nn.Module] = field(repr=False, default_factory=dict)

    @property
    def selectors(self) -> list[str]:
        """The selectors that were compared."""
        return list(self.values[self.metric])

    def compare(
        self,
        selector: str = "influence",
        against: str = "none",
        rate: float | str | None = None,
        metric: str | None = None,
    ) -> PairedComparison:
        """Return the paired comparison of a selector with no removal, or with another selector, at one rate.

        Parameters
        ----------
        selector : str, default="influence"
        against : str, default="none"
            Another selector, or "none".
        rate : float or "auto", optional
            The nearest tried rate is taken; default the last. "auto" takes for each seed the one that is best for the
            selector on the validation data, which may be to remove nothing.
        metric : str, optional
            Default the one that influence is on.
        """
        if rate == "auto":
            chosen = self.chosen_rates(selector)
        else:
            position = len(self.rates) if rate is None else 1 + self.nearest(float(rate))
            chosen = np.full(len(self.validation_baseline), position)
        ours, theirs = (self._at(name, chosen, metric) for name in (selector, against))
        return paired_comparison((ours - theirs) * self._sign(metric))

    def compare_all(
        self, selector: str = "influence", against: str = "none", metric: str | None = None
    ) -> list[PairedComparison]:
        """Return the comparison at every rate, with p-values corrected for the number of rates."""
        return corrected([self.compare(selector, against, float(rate), metric) for rate in self.rates])

    def helps(self, selector: str = "influence", metric: str | None = None) -> np.ndarray:
        """Return for each rate whether removal is better than none and, except for "random", than random removal.

        An effect that random removal of as many shows too is no effect. Both p-values are corrected for the number of
        rates.

        Returns
        -------
        ndarray of shape (n_rates,), bool
        """
        against = ["none", "random"] if selector != "random" and "random" in self.selectors else ["none"]
        tests = [self.compare_all(selector, other, metric) for other in against]
        return np.array([all(one.significant for one in both) for both in zip(*tests)])

    def chosen_rates(self, selector: str = "influence") -> np.ndarray:
        """Return for each seed what is best on the validation data: 0 to remove nothing, i + 1 for ``rates[i]``."""
        values = np.column_stack([self.validation_baseline, self.validation[selector]])
        return (values * self._sign()).argmax(axis=1)

    def nearest(self, rate: float) -> int:
        """Return the position of the tried rate that is nearest to `rate`."""
        return int(np.abs(self.rates - rate).argmin())

    def _at(self, selector: str, chosen: np.ndarray, metric: str | None) -> np.ndarray:
        """Return a selector's values at one of 0 (nothing removed) or 1 + a rate's position for each seed."""
        metric = self.metric if metric is None else metric
        if selector == "none":
            return self.baseline[metric]
        values = np.column_stack([self.baseline[metric], self.values[metric][selector]])
        return values[np.arange(len(values)), chosen]

    def _sign(self, metric: str | None = None) -> int:
        return 1 if self.greater_is_better[self.metric if metric is None else metric] else -1


def cleansing_curve(
    cleanser: GANInfluence,
    X_test,
    rates: Sequence[float] = (0.05, 0.1, 0.2),
    *,
    selectors: Sequence[str] | Mapping[str, Selector | str] = ("influence", "random"),
    metrics: Mapping[str, Metric] | None = None,
    n_seeds: int = 5,
    last_epochs: int | None = None,
    n_jobs: int | None = None,
) -> CleansingCurve:
    """Remove the most harmful instances, retrain, and evaluate on held-out data, over seeds.

    Each seed is a training of its own with its own influences. Retraining starts from the same initial weights and
    draws the same batches and latents, without the removed instances, so that each seed is a pair: with and without.

    Parameters
    ----------
    cleanser : GANInfluence
        Fitted; its own run is the first seed.
    X_test : array-like, Tensor or Dataset
        Reference of the evaluation; neither trained on nor used for influence.
    rates : sequence of float, default=(0.05, 0.1, 0.2)
        Fractions to remove.
    selectors : sequence of str or dict of str to callable, default=("influence", "random")
        By what to choose the removed: ``"influence"``, ``"influence:NAME"`` for one of several metrics of the cleanser,
        ``"discriminator_loss"`` (influence on it), ``"isolation_forest"`` and ``"density"`` (a Gaussian) in the
        metric's features, ``"random"``. A dict can hold functions too, from (cleanser, seed) to one number for each
        instance, the highest of which are removed.
    metrics : dict of str to Metric, optional
        To evaluate beside the cleanser's own, such as `PRDC`, which shows whether diversity pays for fidelity. They are
        fitted to X_test here.
    n_seeds : int, default=5
    last_epochs : int, optional
        Retrain only so many epochs; default all.
    n_jobs : int, optional
        Seeds that run side by side, through joblib.

    Returns
    -------
    CleansingCurve

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import cleansing_curve
    >>> X = np.random.default_rng(0).normal(size=(120, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X[:80])
    >>> curve = cleansing_curve(cleanser, X[80:], rates=[0.1], n_seeds=2)
    >>> curve.values["fid"]["influence"].shape, curve.compare(against="random").n
    ((2, 1), 2)
    """
    check_is_fitted(cleanser)
    if not all(0 < rate < 1 for rate in rates) or not len(rates):
        raise ValueError(f"rates must be fractions between 0 and 1; got {rates!r}.")
    if cleanser.trajectory_.is_of_own_loop and n_seeds > 1:
        raise ValueError(
            "The cleanser was fitted to your own training loop, which cannot be run with other seeds here. Give "
            "n_seeds=1, or train with a GANTrainer."
        )
    named = selectors if isinstance(selectors, Mapping) else {str(name): name for name in selectors}
    if not named:
        raise ValueError("selectors must name at least one way to choose the removed.")
    chosen = {name: resolve_selector(selector, cleanser) for name, selector in named.items()}
    source = cleanser.trajectory_.source
    counts = [min(max(1, round(rate * len(source))), len(source) - 1) for rate in rates]
    evaluated = {cleanser.metric_name_: clone(cleanser.metric_), **(metrics or {})}
    judged = {name: clone(metric).fit(X_test) for name, metric in evaluated.items()}
    shown = int(np.abs(np.array(counts) - (~cleanser.support_).sum()).argmin())
    seeds = check_random_state(cleanser.random_state).randint(2**31, size=n_seeds)
    jobs: list[tuple[Any, ...]] = [
        (
            cleanser if i == 0 else cleanser.sibling(int(seed)),
            None if i == 0 else (source.data, source.labels, cleanser.reference_),
            judged,
            chosen,
            counts,
            last_epochs,
            int(seed),
            shown if i == 0 else None,
        )
        for i, seed in enumerate(seeds)
    ]
    with progress_bars(cleanser.verbose) as progress:
        trials = side_by_side(_trial, jobs, n_jobs, progress, "retraining")
    # For each seed: no removal, then the rates of each selector; the last column is the validation data's.
    values = np.array([trial[0] for trial in trials])
    columns = {name: slice(1 + i * len(counts), 1 + (i + 1) * len(counts)) for i, name in enumerate(chosen)}
    return CleansingCurve(
        metric=cleanser.metric_name_,
        greater_is_better={name: metric.greater_is_better for name, metric in judged.items()},
        rates=np.array(counts) / len(source),
        baseline={name: values[:, 0, i] for i, name in enumerate(judged)},
        values={
            name: {selector: values[:, column, i] for selector, column in columns.items()}
            for i, name in enumerate(judged)
        },
        validation_baseline=values[:, 0, -1],
        validation={selector: values[:, column, -1] for selector, column in columns.items()},
        harmfulness=np.array([trial[1] for trial in trials]),
        last_epochs=last_epochs,
        generators=trials[0][2],
    )


def _trial(
    cleanser: GANInfluence,
    data: tuple[Any, Any, Any] | None,
    judged: Mapping[str, Metric],
    selectors: Mapping[str, Selector],
    counts: Sequence[int],
    last_epochs: int | None,
    seed: int,
    shown: int | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, nn.Module]]:
    """Return one seed's metric values, its harmfulness and, where a rate is to be shown, the retrained generators."""
    if data is not None:
        X, y, X_val = data
        cleanser.fit(X, y, X_val=X_val)
    trajectory = cleanser.trajectory_
    scores = {name: selector(cleanser, seed) for name, selector in selectors.items()}
    orders = [np.argsort(-score, kind="stable") for score in scores.values()]
    removals: list[ArrayLike] = [[], *(order[:n] for order in orders for n in counts)]
    # Other latents than those that influence was computed on: nothing in the evaluation has been seen before.
    on_test = Judge.of(cleanser, judged, seed)
    on_validation = Judge.of(cleanser, {"": cleanser.metric_}, (seed + 1) % 2**32)
    kept: dict[int, str] = {}
    if shown is not None:
        kept = {0: "none"} | {1 + i * len(counts) + shown: name for i, name in enumerate(scores)}
    generators = {}

    def judge(state: TrainingState, run: int) -> list[float]:
        if run in kept:
            generators[kept[run]] = loaded(trajectory.step.generator, state.module_values("G"))
        return on_test(state) + on_validation(state)

    replay = Replay.of(trajectory, trajectory.start_of_last(last_epochs))
    values = replay.map(judge, weights_without(removals, len(trajectory.source)), renormalize=True)
    return np.array(values), next(iter(scores.values())), generators
