"""Does removal help? The metric on held-out data after removal and retraining, over seeds (theory, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from joblib import Parallel, delayed, parallel_config
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ganclean.progress import progress_bars
from ganclean.training.network import loaded
from ganclean.training.replay import retrained_states
from ganclean.validation.significance import PairedComparison, paired_comparison

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence

SELECTORS = ("influence", "random")


@dataclass(frozen=True)
class CleansingCurve:
    """A metric on held-out data after removal and retraining.

    Parameters
    ----------
    metric : str
        Its name.
    greater_is_better : bool
    rates : ndarray of shape (n_rates,)
        Fractions of the training data that were removed.
    baseline : ndarray of shape (n_seeds,)
        The metric without removal.
    values : dict of str to ndarray of shape (n_seeds, n_rates)
        The metric after removing the most harmful (``"influence"``) and after removing as many random instances
        (``"random"``).
    harmfulness : ndarray of shape (n_seeds, n_samples)
        By which the most harmful were found.
    last_epochs : int or None
        How many epochs were retrained; None for all.
    generators : dict of str to torch.nn.Module
        The first seed's generator without removal (``"none"``) and retrained after each selector's removal, at the
        rate that is nearest to the cleanser's `n_remove`.
    """

    metric: str
    greater_is_better: bool
    rates: np.ndarray
    baseline: np.ndarray
    values: dict[str, np.ndarray]
    harmfulness: np.ndarray
    last_epochs: int | None = None
    generators: dict[str, nn.Module] = field(repr=False, default_factory=dict)

    def compare(
        self, selector: str = "influence", against: str = "none", rate: float | None = None
    ) -> PairedComparison:
        """Return the paired comparison of a selector with no removal, or with another selector, at one rate.

        Parameters
        ----------
        selector : str, default="influence"
        against : str, default="none"
            Another selector, or "none".
        rate : float, optional
            The nearest tried rate is taken; default the last.
        """
        i = len(self.rates) - 1 if rate is None else self.nearest(rate)
        ours = self.values[selector][:, i]
        theirs = self.baseline if against == "none" else self.values[against][:, i]
        return paired_comparison((ours - theirs) * (1 if self.greater_is_better else -1))

    def nearest(self, rate: float) -> int:
        """Return the position of the tried rate that is nearest to `rate`."""
        return int(np.abs(self.rates - rate).argmin())


def cleansing_curve(
    cleaner: GANInfluence,
    X_test,
    rates: Sequence[float] = (0.05, 0.1, 0.2),
    *,
    n_seeds: int = 5,
    last_epochs: int | None = None,
    n_jobs: int | None = None,
) -> CleansingCurve:
    """Remove the most harmful instances, retrain, and evaluate on held-out data, over seeds.

    Each seed is a training of its own with its own influences. Retraining starts from the same initial weights and
    draws the same batches and latents, without the removed instances, so that each seed is a pair: with and without.

    Parameters
    ----------
    cleaner : GANInfluence
        Fitted; its own run is the first seed.
    X_test : array-like, Tensor or Dataset
        Reference of the evaluation; neither trained on nor used for influence.
    rates : sequence of float, default=(0.05, 0.1, 0.2)
        Fractions to remove.
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
    >>> cleaner = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X[:80])
    >>> curve = cleansing_curve(cleaner, X[80:], rates=[0.1], n_seeds=2)
    >>> curve.values["influence"].shape, curve.compare(against="random").n
    ((2, 1), 2)
    """
    check_is_fitted(cleaner)
    if not all(0 < rate < 1 for rate in rates) or not len(rates):
        raise ValueError(f"rates must be fractions between 0 and 1; got {rates!r}.")
    if cleaner.trajectory_.is_of_own_loop and n_seeds > 1:
        raise ValueError(
            "The cleaner was fitted to your own training loop, which cannot be run with other seeds here. Give "
            "n_seeds=1, or train with a GANTrainer."
        )
    source = cleaner.trajectory_.source
    counts = [max(1, round(rate * len(source))) for rate in rates]
    shown = int(np.abs(np.array(counts) - (~cleaner.support_).sum()).argmin())
    seeds = check_random_state(cleaner.random_state).randint(2**31, size=n_seeds)
    with parallel_config(backend="loky", inner_max_num_threads=1), progress_bars(cleaner.verbose) as progress:
        trials = Parallel(n_jobs=n_jobs, return_as="generator")(
            delayed(_trial)(
                cleaner if i == 0 else _relative(cleaner, int(seed)),
                None if i == 0 else (source.data, source.labels, cleaner.reference_),
                X_test,
                counts,
                last_epochs,
                seed,
                shown if i == 0 else None,
            )
            for i, seed in enumerate(seeds)
        )
        values: list[list[float]] = []
        harmfulness: list[np.ndarray] = []
        generators: list[dict[str, nn.Module]] = []
        for trial in trials:
            values.append(trial[0])
            harmfulness.append(trial[1])
            generators.append(trial[2])
            if progress is not None:
                progress("retraining", len(values), n_seeds)
    all_values = np.array(values)
    n_rates = len(rates)
    return CleansingCurve(
        metric=cleaner.metric_name_,
        greater_is_better=cleaner.metric_.greater_is_better,
        rates=np.array(counts) / len(source),
        baseline=all_values[:, 0],
        values={
            selector: all_values[:, 1 + i * n_rates : 1 + (i + 1) * n_rates] for i, selector in enumerate(SELECTORS)
        },
        harmfulness=np.array(harmfulness),
        last_epochs=last_epochs,
        generators=generators[0],
    )


def _relative(cleaner: GANInfluence, seed: int) -> GANInfluence:
    """Return an unfitted copy with another seed, for one metric, that stores nothing and shows no progress."""
    relative = clone(cleaner).set_params(random_state=seed, verbose=False, metric=clone(cleaner.metric_), select=None)
    if relative.trainer is not None:
        relative.trainer.set_params(store=None)
    return relative


def _trial(cleaner, data, X_test, counts, last_epochs, seed, shown):
    """Return one seed's metric values, its harmfulness and, where a rate is to be shown, the retrained generators."""
    if data is not None:
        X, y, X_val = data
        cleaner.fit(X, y, X_val=X_val)
    trajectory = cleaner.trajectory_
    worst = np.argsort(-cleaner.harmfulness_, kind="stable")
    chance = check_random_state(seed).permutation(len(worst))
    removals = [[], *(worst[:n] for n in counts), *(chance[:n] for n in counts)]
    states = list(retrained_states(trajectory, removals, last_epochs, renormalize=True))
    metric = clone(cleaner.metric_).fit(X_test)
    # Other latents than those that influence was computed on: nothing in the evaluation has been seen before.
    evaluator = cleaner._evaluator(metric.sample_size, seed)
    values = [evaluator.value(metric, state) for state in states]
    generators = {}
    if shown is not None:
        chosen = {"none": 0} | {selector: 1 + i * len(counts) + shown for i, selector in enumerate(SELECTORS)}
        generators = {
            name: loaded(trajectory.step.generator, states[i].evaluated, states[i].buffers_generator)
            for name, i in chosen.items()
        }
    return values, cleaner.harmfulness_, generators
