"""Counterfactual retraining: the run once more without some instances (theory, section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from joblib import effective_n_jobs
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ganclean.data import take
from ganclean.dynamics.state import TrainingState
from ganclean.metrics.base import Metric
from ganclean.metrics.evaluation import Evaluator
from ganclean.parallel import side_by_side
from ganclean.progress import progress_bars
from ganclean.runs.replay import MEMORY_BUDGET, Replay, weights_without

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence


@dataclass(frozen=True)
class Judge:
    """Evaluates several metrics of a state; can be sent to another process.

    Parameters
    ----------
    evaluator : Evaluator
    metrics : dict of str to Metric
        Fitted.
    """

    evaluator: Evaluator
    metrics: Mapping[str, Metric]

    @classmethod
    def of(cls, cleanser: GANInfluence, metrics: Mapping[str, Metric], seed: int | None = None) -> Judge:
        """Return the judge of a fitted cleanser's generators; by default on the latents of `metric_value_`."""
        return cls(cleanser.evaluator(max(metric.sample_size for metric in metrics.values()), seed), metrics)

    def __call__(self, state: TrainingState, run: int = 0) -> list[float]:
        """Return the value of each metric."""
        return [self.evaluator.value(metric, state) for metric in self.metrics.values()]


def counterfactual_retrain(
    cleanser: GANInfluence,
    removals: Sequence[ArrayLike],
    last_epochs: int | None = None,
    *,
    first_step: int | None = None,
    metric: Metric | Mapping[str, Metric] | None = None,
    renormalize: bool = False,
    seeds: Sequence[int] | None = None,
    vectorize: bool | str = "auto",
    chunk_size: int | str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    n_jobs: int | None = None,
) -> np.ndarray | dict[str, np.ndarray]:
    """Return the metric after really retraining without each set of instances.

    The recorded run is replayed with the same batches, latents and seeds, from the start of the last epochs or from any
    other step. With `seeds`, training starts anew instead: other initial weights, other batches and latents, on data
    that do not hold the instances.

    Parameters
    ----------
    cleanser : GANInfluence
        Fitted.
    removals : sequence of sequences of int
        Rows to remove together; an empty one replays the run as it was.
    last_epochs : int, optional
        Replay so many epochs; default the whole run.
    first_step : int, optional
        Replay from this step on instead.
    metric : Metric or dict of str to Metric, optional
        Fitted; default the cleanser's own. All of a dict are evaluated on the same retrained generators.
    renormalize : bool, default=False
        Whether the discriminator's mean is taken over the remaining instances of a batch; by default the sum is still
        divided by the batch size, which is what influence predicts (theory, section 1).
    seeds : sequence of int, optional
        Train anew with each of these seeds, for as many steps as the recorded run. Networks that were given as modules
        start from their own weights in every run; give functions for other ones.
    vectorize : bool or "auto", default="auto"
        Whether to run the counterfactuals at once by `torch.func.vmap`, which pays where networks are so small that
        calling an operation takes longer than computing it. "auto" counts both in one step; where the steps are
        compiled, it makes the runs one after another.
    chunk_size : int or "auto", default="auto"
        How many run at once; "auto" takes as many as `memory_budget` has room for.
    memory_budget : int, default=2**30
        How many bytes runs may take that run at once.
    n_jobs : int, optional
        How many processes share the runs, through joblib. Within ``joblib.parallel_config(backend="dask")``, or any
        other back-end that is registered with joblib, they run where it says.

    Returns
    -------
    ndarray of shape (n_removals,), or (n_seeds, n_removals) with `seeds`, float64
        For a dict of metrics, a dict of these.

    Raises
    ------
    ValueError
        If a parameter is not as expected, or a removal leaves nothing to train on.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import counterfactual_retrain
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X)
    >>> values = counterfactual_retrain(cleanser, [[], [3], [5, 9]])
    >>> bool(np.isclose(values[0], cleanser.metric_value_)), values.shape
    (True, (3,))
    >>> counterfactual_retrain(cleanser, [[], [5, 9]], seeds=[1, 2, 3]).shape
    (3, 2)
    """
    check_is_fitted(cleanser)
    cleanser.trajectory_.check_run()
    metrics = metric if isinstance(metric, Mapping) else {"": cleanser.metric_ if metric is None else metric}
    if not metrics:
        raise ValueError("metric must be a Metric or a dict of at least one; got an empty dict.")
    judge = Judge.of(cleanser, metrics)
    weights = weights_without(removals, len(cleanser.trajectory_.source))
    if seeds is not None:
        if last_epochs is not None or first_step is not None:
            raise ValueError("seeds train anew from the start: leave last_epochs and first_step out.")
        values = _trained_anew(cleanser, weights, list(seeds), judge, n_jobs)
    else:
        trajectory = cleanser.trajectory_
        if last_epochs is not None and first_step is not None:
            raise ValueError("Give last_epochs or first_step, not both.")
        start = trajectory.start_of_last(last_epochs) if first_step is None else first_step
        settings = {
            "renormalize": renormalize,
            "vectorize": vectorize,
            "chunk_size": chunk_size,
            "memory_budget": memory_budget,
        }
        values = replayed(Replay.of(trajectory, start), weights, judge, settings, n_jobs)
    if isinstance(metric, Mapping):
        return {name: values[..., i] for i, name in enumerate(metrics)}
    return values[..., 0]


def replayed(replay: Replay, weights: Tensor, judge: Judge, settings: dict, n_jobs: int | None = None) -> np.ndarray:
    """Return the metrics after a replay with each row of weights, shape (n_runs, n_metrics)."""
    n_parts = min(effective_n_jobs(n_jobs), len(weights))
    if n_parts > 1:
        # Every n-th run: those that depart early from the recorded one, and take longer, are spread over all.
        parts = [weights[i::n_parts] for i in range(n_parts)]
        portable = replay.portable()
        jobs = [(portable, part, judge, settings) for part in parts]
        values = np.empty((len(weights), len(judge.metrics)))
        for i, part in enumerate(side_by_side(_replayed, jobs, n_jobs)):
            values[i::n_parts] = part
        return values
    return _replayed(replay, weights, judge, settings)


def _replayed(replay: Replay, weights: Tensor, judge: Judge, settings: dict) -> np.ndarray:
    return np.array(replay.map(judge, weights, **settings)).reshape(len(weights), len(judge.metrics))


def _trained_anew(
    cleanser: GANInfluence, weights: Tensor, seeds: list[int], judge: Judge, n_jobs: int | None
) -> np.ndarray:
    """Return the metrics after training anew, shape (n_seeds, n_removals, n_metrics)."""
    if cleanser.trajectory_.is_of_own_loop:
        raise ValueError(
            "The cleanser was fitted to your own training loop, which cannot be run with other seeds here. Run the "
            "loop yourself on the remaining rows, or train with a GANTrainer."
        )
    kept = [np.flatnonzero(row) for row in weights.numpy()]
    smallest = min((len(rows) for rows in kept), default=2)
    if smallest < 2:
        raise ValueError(f"A removal leaves {smallest} instances; at least 2 are needed to train anew.")
    source = cleanser.trajectory_.source
    template = clone(cleanser).set_params(verbose=False)
    jobs = [(template, source.data, source.labels, rows, seed, judge) for seed in seeds for rows in kept]
    with progress_bars(cleanser.verbose) as progress:
        values = side_by_side(_train_on, jobs, n_jobs, progress, "retraining")
    return np.array(values).reshape(len(seeds), len(kept), len(judge.metrics))


def _train_on(template: GANInfluence, X, y, rows: np.ndarray, seed: int, judge: Judge) -> list[float]:
    """Train on some rows, for as many steps as on all of them, and return the metrics."""
    rng = check_random_state(seed)
    n_samples, data, labels = len(X), take(X, rows), None if y is None else take(y, rows)
    trainer, step, source = template.prepare(data, labels, rng.randint(2**31))
    size = min(trainer.batch_size_for(n_samples), len(rows))
    n_steps = trainer.n_epochs * -(-n_samples // trainer.batch_size_for(n_samples))
    n_epochs = max(1, round(n_steps / -(-len(rows) // size)))
    # Only where the run ends is of interest.
    trainer.set_params(n_epochs=n_epochs, batch_size=size, store=None, checkpoint_every=n_steps + len(rows))
    trajectory = trainer.train(step, source, trainer.describe(step, len(rows), ""), random_state=rng.randint(2**31))
    return replace(judge, evaluator=replace(judge.evaluator, step=step))(trajectory.state(len(trajectory)))
