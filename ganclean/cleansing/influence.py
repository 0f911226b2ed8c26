"""GANInfluence: from data to a trained GAN, its influences, and the cleansed data."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ganclean.backends import InfluenceBackend, resolve_backend
from ganclean.cleansing._base import Cleanser
from ganclean.cleansing.removal import best_count, check_replayed, values_after_removal
from ganclean.data import DataSource, checked_data, fingerprint
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.network import loaded
from ganclean.exceptions import NonFiniteError
from ganclean.metrics import resolve_metric
from ganclean.metrics.base import Metric
from ganclean.metrics.evaluation import Evaluator
from ganclean.parallel import side_by_side
from ganclean.progress import Progress, progress_bars
from ganclean.runs.replay import Replay
from ganclean.runs.smoothness import metasmoothness
from ganclean.runs.trajectory import Trajectory
from ganclean.training.preparation import attached, labels_for, prepared
from ganclean.training.probe import CostEstimate, estimate_cost, probe_step
from ganclean.training.trainer import GANTrainer


class GANInfluence(Cleanser):
    """Finds the training instances that harm a GAN, and drops them.

    `fit` trains the GAN, records the run, and traces the gradient of a metric of the generated samples back through it.
    The result is each instance's influence: the predicted change of the metric, had the instance not been there.

    Parameters
    ----------
    generator, discriminator : torch.nn.Module, callable or None
        The networks: a module (copied, its weights are the initial ones), a function from the shape of one instance to
        a module, or None for a small default. The generator maps latents of shape (n, latent_dim) to samples, the
        discriminator samples to one number each.
    players : dict of str to module or callable, optional
        Further networks that the trainer's `updates` name, such as the head of an auxiliary classifier.
    trainer : GANTrainer, optional
        How to train; default ``GANTrainer()``.
    metric : str, Metric or dict of str to these, default="fid"
        What the influence is on: ``"fid"``, ``"kid"``, ``"inception_score"``, ``"log_likelihood"``, ``"mmd"``
        or a metric object. Several in a dict cost one pass over the trajectory together.
    backend : str or InfluenceBackend, default="itd"
        How influence is computed: ``"itd"`` traces the recorded run, ``"aid"`` works from its end alone.
    n_remove : float, int or "auto", default=0.05
        How many of the most harmful instances to drop: a fraction in [0, 1) or a count. "auto" removes from nothing to
        half of the data, retrains the traced epochs each time, and takes what is best on the validation data `X_val`.
    select : str, optional
        Which of several metrics decides what is dropped; default the first.
    n_runs : int, default=1
        Average the influence over so many independently seeded runs; `influence_std_error_` then says how much of it
        belongs to the single run.
    n_jobs : int, optional
        How many of the runs go side by side, through joblib.
    verbose : bool, default=False
        Whether to show progress bars.
    random_state : int, RandomState instance or None
        Determines initial weights, batches, latents, and the latents that metrics are evaluated on.

    Attributes
    ----------
    influence_ : ndarray of shape (n_samples,), float64
        Predicted change of the metric if the instance is removed, in units of the metric.
    influences_ : dict of str to ndarray
        The influence on each metric.
    influence_std_error_ : ndarray of shape (n_samples,), float64
        The standard error of `influence_` over runs; NaN for a single run.
    harmfulness_ : ndarray of shape (n_samples,), float64
        The influence, signed so that a high value means 'remove me': the predicted improvement.
    support_ : ndarray of shape (n_samples,), bool
        The kept instances.
    sample_indices_ : ndarray of shape (n_kept,), int64
        Their rows.
    sample_weight_ : ndarray of shape (n_samples,), float64
        1 for kept and 0 for dropped instances, for estimators that take weights.
    threshold_ : float
        The highest harmfulness among the kept instances; `transform` drops new ones above it.
    generator_, discriminator_ : torch.nn.Module
        The trained networks in evaluation mode; with a moving average, the averaged generator. The second is None where
        there is no player D.
    players_ : dict of str to torch.nn.Module
        All of them.
    metric_, metrics_ : Metric, dict of str to Metric
        The fitted metric that decides, and all of them.
    metric_name_ : str
        The name of the one that decides.
    objective_ : str
        What harmfulness means: "influence:" and that name. Other cleansers have other objectives, such as credit.
    reference_ : array, Tensor or Dataset
        What the metrics were fitted to.
    metric_value_, metric_values_ : float, dict of str to float
        Their values for the trained generator.
    gradients_ : dict of str to TrainingState
        The gradient of each metric in the final state: what a back-end starts from.
    removal_values_ : dict of int to float
        With ``n_remove="auto"``, the metric for each number of removed instances that was tried.
    backend_ : InfluenceBackend
        The fitted back-end.
    trajectory_ : Trajectory
        The recorded run; of networks that were trained already, one of no steps.
    n_features_in_ : int
        Number of values in one instance.

    Notes
    -----
    First-order influence predicts the effect of removing an instance while everything else, batches and latents
    included, stays the same. Networks with smooth activations are predicted best (theory, section 3).

    `transform` drops rows, which scikit-learn's own ``Pipeline`` does not allow in between. Use imbalanced-learn's
    ``Pipeline``, which calls `fit_resample`, or `CleansedEstimator`. imbalanced-learn takes a step either for a sampler
    or for a transformer, so `transform` exists only once the estimator is fitted; to fit such a pipeline again, clone
    it first.

    References
    ----------
    Terashita, Ohashi, Hara, Data cleansing for GANs, IEEE TNNLS, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> X = np.random.default_rng(0).normal(size=(100, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=5), n_remove=10, random_state=0).fit(X)
    >>> cleanser.transform(X).shape
    (90, 2)
    """

    def __init__(
        self,
        generator=None,
        discriminator=None,
        *,
        players=None,
        trainer=None,
        metric="fid",
        backend="itd",
        n_remove=0.05,
        select=None,
        n_runs=1,
        n_jobs=None,
        verbose=False,
        random_state=None,
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.players = players
        self.trainer = trainer
        self.metric = metric
        self.backend = backend
        self.n_remove = n_remove
        self.select = select
        self.n_runs = n_runs
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.random_state = random_state

    def fit(self, X, y=None, *, X_val=None, trajectory=None, trained=False):
        """Train the GAN and compute the influence of every instance.

        Parameters
        ----------
        X : array-like, Tensor or map-style Dataset of shape (n_samples, *sample_shape)
            The training data, on the scale of the generator's output.
        y : array-like of shape (n_samples, ...), optional
            The labels of conditional networks (``GANTrainer(conditional=True)``); a Dataset's items can hold them too.
            Otherwise ignored.
        X_val : array-like, Tensor or Dataset, optional
            The reference of the metrics; default X.
        trajectory : Trajectory or path, optional
            A recorded run with these networks, trainer and data, to trace again without training; or the record of
            your own training loop, from `Recorder`, which brings the networks along.
        trained : bool, default=False
            Whether the networks are trained already: they are taken as they are, `trainer` says with which losses,
            and nothing is trained. It needs a back-end that works from the final model alone, such as `AID`.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter or the data are not as expected.
        NetworkError, MetricError, TrajectoryError
            If the networks, the metric or the given trajectory do not fit.
        NonFiniteError
            If training diverges or an adjoint overflows.
        ReplayMismatchError
            If a given record, replayed without any removal, does not end where it ended.
        """
        data = self._check_data(X, reset=True)
        self.reference_ = data if X_val is None else self._check_data(X_val)
        metrics, selected = self._resolve_metrics()
        if self.n_remove == "auto" and X_val is None:
            raise ValueError("n_remove='auto' chooses on validation data: call fit(X, X_val=...).")
        n_remove = None if self.n_remove == "auto" else self._count_to_remove(len(data))
        backend = clone(resolve_backend(self.backend))
        if trained:
            self._check_trained(backend, trajectory)
        if trajectory is not None and not isinstance(trajectory, Trajectory):
            trajectory = Trajectory.open(trajectory)
        given = trajectory is not None
        seeds = self._seeds()
        self._fingerprint = fingerprint(data)
        if trajectory is not None and trajectory.is_of_own_loop:
            if self.generator is not None or self.discriminator is not None or self.trainer is not None:
                raise ValueError(
                    "The trajectory is of your own training loop and brings its networks along. Leave generator, "
                    "discriminator and trainer out: GANInfluence(metric=..., backend=...).fit(X, trajectory=...)."
                )
            trajectory, source = attached(trajectory, data, y)
            trainer, step, record = None, trajectory.step, trajectory[0]
        else:
            trainer, step, source = self.prepare(data, y, seeds["initial"])
            labels = "" if source.labels is None else f" {fingerprint(source.labels)}"
            description = trainer.describe(step, len(data), self._fingerprint + labels)
            record = step.drawn(next(trainer.draw(step, source, 0)), source)
            if trained:
                trajectory = Trajectory.without_run(step, source, trainer.batch_size_for(len(source)))
            elif trajectory is not None:
                trajectory.check_matches(description)
                trajectory.check_complete()
                trajectory = trajectory.bind(step, source)
                trajectory.memory_budget = trainer.memory_budget
        probe = getattr(backend, "probe", None)
        if probe is not None:
            probe_step(step, source, record, probe)
        self.metrics_ = {name: metric.fit(self.reference_) for name, metric in metrics.items()}
        self.metric_ = self.metrics_[selected]
        self.trainer_ = trainer
        self._evaluation_seed = seeds["evaluation"]
        n_latents = max(metric.sample_size for metric in self.metrics_.values())
        evaluator = self.evaluator(n_latents, step=step, source=source)
        for name, metric in self.metrics_.items():
            # A metric that has no gradient says so now instead of after training; one that is not finite yet may be.
            with suppress(NonFiniteError):
                evaluator.gradient(name, metric, step.initial_state())
        with progress_bars(self.verbose) as progress:
            if trajectory is None:
                trajectory = trainer.train(  # type: ignore[union-attr]
                    step,
                    source,
                    description,
                    traced_epochs=_kept_epochs(backend),
                    random_state=seeds["training"],
                    progress=progress,
                )
            self.trajectory_ = trajectory
            final = trajectory.state(len(trajectory))
            self.players_ = {player: loaded(m, final.module_values(player)) for player, m in step.players.items()}
            self.generator_, self.discriminator_ = self.players_["G"], self.players_.get("D")
            both = {name: evaluator.gradient(name, metric, final) for name, metric in self.metrics_.items()}
            self.metric_values_ = {name: value for name, (value, _) in both.items()}
            self.metric_value_ = self.metric_values_[selected]
            self.gradients_ = {name: gradient for name, (_, gradient) in both.items()}
            self.metric_name_ = selected
            self.objective_ = f"influence:{selected}"
            if backend.needs_run and (given or step.like.device.type != "cpu"):
                window = backend.traced_epochs()
                check_replayed(trajectory, window, self.metrics_, self.metric_values_, evaluator)
            self.backend_ = backend.fit(trajectory, self.gradients_, progress)
            runs = [self.backend_.influences_, *self._further_runs(seeds["runs"], progress)]
        # A back-end that predicts nothing says how harmful instances are, whichever way a metric goes.
        signs = {name: 1.0 if backend.predicts else _sign(metric) for name, metric in self.metrics_.items()}
        self.influences_ = {name: sign * np.mean([run[name] for run in runs], axis=0) for name, sign in signs.items()}
        self.influence_ = self.influences_[selected]
        self.influence_std_error_ = _std_error([run[selected] for run in runs])
        self._smoothness: float | None = None
        harmfulness = _sign(self.metric_) * self.influence_
        if n_remove is None:
            # Other latents than those that the influence was computed on.
            fresh = self.evaluator(self.metric_.sample_size, (seeds["evaluation"] + 1) % 2**32)
            window = backend.traced_epochs()
            self.removal_values_ = values_after_removal(trajectory, harmfulness, self.metric_, fresh, window)
            n_remove = best_count(self.removal_values_, self.metric_)
        self._drop(harmfulness, n_remove)
        return self

    def score(self, X, y=None):
        """Return the metric of the trained generator against X, its sign flipped where lower is better.

        Parameters
        ----------
        X : array-like, Tensor or Dataset of shape (n, *sample_shape)
        y : ignored

        Returns
        -------
        float
        """
        check_is_fitted(self)
        metric = clone(self.metric_).fit(self._check_data(X))
        value = self.evaluator(metric.sample_size).value(metric, self.trajectory_.state(len(self.trajectory_)))
        return _sign(metric) * value

    def sample(self, n_samples=1):
        """Generate samples, as ``GaussianMixture.sample``.

        Parameters
        ----------
        n_samples : int, default=1

        Returns
        -------
        samples : ndarray or Tensor of shape (n_samples, *sample_shape)
            A tensor where the training data were a tensor or a Dataset.
        labels : ndarray or Tensor of shape (n_samples, ...), or None
            What a conditional generator made them for.
        """
        check_is_fitted(self)
        evaluator = self.evaluator(n_samples, check_random_state(self.random_state).randint(2**31))
        samples = evaluator.samples(self.trajectory_.state(len(self.trajectory_)), n_samples)
        both = samples, evaluator.labels
        return tuple(t.cpu().numpy() if self._returns_arrays and t is not None else t for t in both)

    def estimate_cost(self, X, y=None) -> CostEstimate:
        """Return what `fit` would take, from one probed step of training and of tracing.

        Parameters
        ----------
        X : array-like, Tensor or Dataset of shape (n_samples, *sample_shape)
        y : array-like of shape (n_samples, ...), optional
            The labels of conditional networks.

        Returns
        -------
        CostEstimate
            Steps, seconds, bytes of memory and of disk; the metric itself is not counted.
        """
        data = checked_data(X)
        backend = resolve_backend(self.backend)
        trainer, step, source = self.prepare(data, y, self._seeds()["initial"])
        description = trainer.describe(step, len(data), "")
        trajectory = Trajectory(description)
        plan = trainer.plan(step, len(trajectory), trajectory.start_of_last(_kept_epochs(backend)))
        cost = estimate_cost(
            step,
            source,
            step.drawn(next(trainer.draw(step, source, 0)), source),
            getattr(backend, "probe", lambda *_: None),
            plan,
        )
        return replace(cost, seconds_tracing=cost.seconds_tracing * backend.passes())

    @property
    def smoothness_(self):
        """Metasmoothness: how far the traced epochs respond linearly to a small random reweighting of the instances.

        1 is perfectly linear, 0 is chaotic. It takes three trainings of the traced epochs, when it is first asked for.
        """
        check_is_fitted(self)
        if self._smoothness is None:
            start = self.trajectory_.start_of_last(self.backend_.traced_epochs())
            self._smoothness = metasmoothness(Replay.of(self.trajectory_, start))
        return self._smoothness

    def _check_trained(self, backend: InfluenceBackend, trajectory: Any) -> None:
        """Raise `ValueError` where trained networks alone are not enough for what is asked."""
        if backend.needs_run:
            raise ValueError(
                f"trained=True needs a back-end that works from the final model alone, such as 'aid'; {backend!r} "
                "traces a recorded run. Choose backend='aid', or leave trained out: fit trains and records."
            )
        if trajectory is not None:
            raise ValueError("Give a recorded trajectory or trained=True, not both: the record knows its final model.")
        if self.generator is None or self.discriminator is None:
            raise ValueError(
                "trained=True takes the networks as they are: give the trained generator and discriminator."
            )
        if self.n_remove == "auto" or self.n_runs != 1:
            raise ValueError(
                "n_remove='auto' and n_runs train again, which trained=True rules out: give a fraction or a count, and "
                "n_runs=1."
            )

    def _seeds(self) -> dict[str, Any]:
        if not isinstance(self.n_runs, Integral) or isinstance(self.n_runs, bool) or self.n_runs < 1:
            raise ValueError(f"n_runs must be a positive integer; got {self.n_runs!r}.")
        rng = check_random_state(self.random_state)
        seeds: dict[str, Any] = {name: int(rng.randint(2**31)) for name in ("initial", "training", "evaluation")}
        return seeds | {"runs": rng.randint(2**31, size=self.n_runs - 1).tolist()}

    def sibling(self, seed: int, **changes) -> GANInfluence:
        """Return an unfitted copy with another seed that stores nothing and shows no progress."""
        sibling = clone(self).set_params(random_state=seed, verbose=False, n_remove=0, **changes)
        if sibling.trainer is not None:
            sibling.trainer.set_params(store=None)
        return sibling

    def _further_runs(self, seeds: list[int], progress: Progress | None) -> list[dict[str, np.ndarray]]:
        """Return the influences of runs with other seeds on the same data."""
        if seeds and self.trajectory_.is_of_own_loop:
            raise ValueError(
                "n_runs trains with other seeds, which your own training loop cannot do here. Run it yourself, fit a "
                "cleanser to each record, and average influence_."
            )
        source = self.trajectory_.source
        jobs = [(self.sibling(seed, n_runs=1), source.data, source.labels, self.reference_) for seed in seeds]
        return side_by_side(_influences_of, jobs, self.n_jobs, progress, "further runs")

    def prepare(self, data, y, seed: int) -> tuple[GANTrainer, AnyStep, DataSource]:
        """Return what a fit trains with: the trainer, its step, and the data in the networks' type."""
        return prepared(self.generator, self.discriminator, self.trainer, data, y, seed, self.players)

    def _resolve_metrics(self) -> tuple[dict[str, Metric], str]:
        if isinstance(self.metric, dict) and self.metric:
            metrics = {name: clone(resolve_metric(metric)) for name, metric in self.metric.items()}
        else:
            metric = clone(resolve_metric(self.metric))
            metrics = {self.metric if isinstance(self.metric, str) else type(metric).__name__: metric}
        selected = next(iter(metrics)) if self.select is None else self.select
        if selected not in metrics:
            raise ValueError(f"select must name one of the metrics {sorted(metrics)}; got {self.select!r}.")
        return metrics, selected

    def _is_training_data(self, data) -> bool:
        if not super()._is_training_data(data):
            return False
        labels = labels_for(data, None, self.trajectory_.step.conditional)
        return labels is None or fingerprint(labels) == fingerprint(self.trajectory_.source.labels)

    def _harmfulness_of(self, data, y=None) -> np.ndarray:
        trained_on = self.trajectory_.source
        labels = labels_for(data, y, self.trajectory_.step.conditional)
        if labels is None and trained_on.labels is not None:
            raise ValueError(
                "The networks are conditional: the labels of new instances are needed. Call score_samples(X, y), or "
                "pass a Dataset whose items hold them."
            )
        if labels is not None and not labels.is_floating_point():
            unknown = sorted(set(labels.flatten().tolist()) - set(trained_on.labels.flatten().tolist()))
            if unknown:
                raise ValueError(f"The networks were trained without the classes {unknown}, which y holds.")
        samples = DataSource(data, trained_on.dtype, trained_on.device, labels)
        scores = self.backend_.score_samples(self.trajectory_, self.gradients_[self.metric_name_], samples)
        return _sign(self.metric_) * scores if self.backend_.predicts else scores

    def evaluator(
        self,
        n_samples: int,
        seed: int | None = None,
        *,
        step: AnyStep | None = None,
        source: DataSource | None = None,
    ) -> Evaluator:
        """Return what evaluates metrics, on latents and labels that are drawn as in training.

        Parameters
        ----------
        n_samples : int
        seed : int, optional
            Default that of the fit: the draws of `metric_value_`.
        step, source : optional
            Default those of the trajectory.

        Returns
        -------
        Evaluator
        """
        seed = self._evaluation_seed if seed is None else seed
        step = self.trajectory_.step if step is None else step
        source = self.trajectory_.source if source is None else source
        return Evaluator.drawn(step, source, n_samples, seed)


def _influences_of(cleanser: GANInfluence, X, y, X_val) -> dict[str, np.ndarray]:
    return cleanser.fit(X, y, X_val=X_val).influences_


def _std_error(runs: list[np.ndarray]) -> np.ndarray:
    """Return the standard error of the mean over runs; NaN for a single one."""
    if len(runs) < 2:
        return np.full_like(runs[0], np.nan)
    return np.std(runs, axis=0, ddof=1) / np.sqrt(len(runs))


def _kept_epochs(backend: InfluenceBackend) -> int | None:
    """Return of how many of the last epochs a back-end reads the states."""
    return backend.traced_epochs() if backend.needs_run else 1


def _sign(metric: Metric) -> float:
    return 1.0 if metric.greater_is_better else -1.0
