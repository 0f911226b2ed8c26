"""ITD: iterative differentiation, back through the recorded run (theory, section 2)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from numbers import Integral, Real

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor

from ganclean.backends.base import InfluenceBackend
from ganclean.backends.calibration import best_width, calibrate_width
from ganclean.backends.resumable import Reached, progress_key
from ganclean.dynamics.adjoint import (
    Adjoint,
    StepAdjoint,
    check_second_derivative,
    exact_adjoint,
    secant_adjoint,
    sensitivities,
    states_between,
)
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.derivative import Secant
from ganclean.dynamics.dispatch import is_dispatch_bound
from ganclean.dynamics.randomness import seeded, stream
from ganclean.dynamics.record import StepRecord, mapped
from ganclean.dynamics.state import TrainingState, map_state, ravel
from ganclean.dynamics.step import Step
from ganclean.exceptions import NonFiniteError
from ganclean.runs.trajectory import Trajectory

DERIVATIVES = ("secant", "exact")
SECONDS_BETWEEN_SAVES = 10.0
# New instances are judged about so many at a time.
CHUNK = 256


class ITD(InfluenceBackend):
    """Influence by reverse-mode differentiation of the metric through the recorded training steps.

    Starting from the metric's gradient λ in the final state, each step t, from the last to the first traced one, gives

        influence_j −= (∂Φ_t/∂w_j)ᵀ λ   for every instance j that it drew,     λ ← (∂Φ_t/∂s)ᵀ λ ,

    where the state s holds all that the next step reads, the optimisers' moments and the moving average included.

    Parameters
    ----------
    last_epochs : int, optional
        Trace back so many epochs, which predicts the effect of a removal during these epochs; default the whole run.
    derivative : {"secant", "exact"}, default="secant"
        "exact" takes second derivatives of the objectives. "secant" takes central differences of first gradients
        instead: it is cheaper, needs no second derivative of the networks, and predicts better where they have kinks
        (ReLU).
    delta : float or "auto", default=1e-2
        Relative width of the secant, δ = ε‖v‖/‖θ‖: about the size of the change that a removal makes. "auto" takes the
        one of four that best predicts the removal of ten random groups of 5%, really replayed over one epoch.
    n_perturbations : int, default=0
        Average each secant over so many draws of noise in the parameters, at as many times the cost; 0 adds none. It
        smooths kinks further.
    perturbation : float, default=0.05
        Standard deviation of that noise, relative to the mean magnitude of each tensor.
    augmentation : callable, optional
        From a batch of instances, shape (n, *sample_shape), to one of the same shape in which each is another picture
        of the same content: shifted, flipped. What an instance contributes to a step is averaged over it and such
        copies, which removes what is accidental in it.
    n_augmentations : int, default=8
        How many copies; each costs two more evaluations of the discriminator.
    max_growth : float, default=1e6
        Stop where the adjoint has grown by more than this factor: training is then too rough to be traced so far back.

    Attributes
    ----------
    influences_ : dict of str to ndarray of shape (n_samples,), float64
    delta_ : float
        The width of the secant.
    calibration_ : dict of float to float
        With ``delta="auto"``, the correlation of predicted and true changes for each width that was tried.
    growth_ : dict of str to float
        By which factor each metric's adjoint has grown, at most.
    deviation_ : float
        The self-check: how far the secant of the first traced step is from the exact derivative, relative to the latter
        (of the instances' contributions, in the Euclidean norm). Large where networks have kinks, of which the exact
        derivative knows nothing. NaN where there is no exact one.

    Raises
    ------
    NonFiniteError
        If an adjoint becomes NaN, infinite, or larger than `max_growth` allows.

    References
    ----------
    Terashita, Ohashi, Hara, Data cleansing for GANs, 2025; Hara, Nitanda, Maehara, Data cleansing for models trained
    with SGD, 2019, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.backends import ITD
    >>> X = np.random.default_rng(0).normal(size=(64, 2))
    >>> trainer = GANTrainer(n_epochs=3, batch_size=32)
    >>> both = [
    ...     GANInfluence(trainer=trainer, backend=ITD(derivative=d, delta=1e-4), random_state=0).fit(X).influence_
    ...     for d in ("exact", "secant")
    ... ]
    >>> np.allclose(*both, rtol=1e-3, atol=1e-6)
    True
    """

    def __init__(
        self,
        last_epochs=None,
        derivative="secant",
        delta=1e-2,
        n_perturbations=0,
        perturbation=0.05,
        augmentation=None,
        n_augmentations=8,
        max_growth=1e6,
    ):
        self.last_epochs = last_epochs
        self.derivative = derivative
        self.delta = delta
        self.n_perturbations = n_perturbations
        self.perturbation = perturbation
        self.augmentation = augmentation
        self.n_augmentations = n_augmentations
        self.max_growth = max_growth

    # Whether the adjoint goes back through the steps; a subclass may hold on to the metric's gradient instead.
    _propagates = True

    def traced_epochs(self):
        return self.last_epochs

    def fit(self, trajectory, gradients, progress=None):
        start = trajectory.start_of_last(self.last_epochs)
        self._check_parameters()
        self.delta_ = self._width(trajectory, gradients)
        key = progress_key(self, start, gradients)
        reached = Reached.load(trajectory, key) or Reached.beginning(trajectory, gradients)
        self.growth_ = dict(reached.notes.get("growth", {}))
        self.deviation_ = reached.notes.get("deviation", math.nan)
        saved = time.monotonic()
        try:
            for record, around, adjoints, growth in self._trace(trajectory, gradients, reached, self_check=True):
                contributions = self._contributions(trajectory, around, record, adjoints)
                del around
                influences = {
                    name: _subtracted(reached.influences[name], record.indices, weights)
                    for name, weights in contributions.items()
                }
                traced = {name: one.cotangent for name, one in adjoints.items()}
                cotangents = traced if self._propagates else reached.cotangents
                self.growth_ = {name: max(self.growth_.get(name, 1.0), value) for name, value in growth.items()}
                notes = {"growth": dict(self.growth_), "deviation": self.deviation_}
                reached = Reached(record.index, cotangents, influences, notes)
                if trajectory.is_kept(record.index) and time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                    reached.save(trajectory, key)
                    saved = time.monotonic()
                if progress is not None:
                    progress("tracing", len(trajectory) - record.index, len(trajectory) - start)
        except KeyboardInterrupt:
            reached.save(trajectory, key)
            raise
        trajectory.store.discard_progress(key)
        self.influences_ = reached.influences
        return self

    def score_samples(self, trajectory, gradient, samples):
        name = "score_samples"
        start = trajectory.start_of_last(self.last_epochs)
        n_steps = len(trajectory) - start
        total, draws = np.zeros(len(samples)), 0
        newcomers = _Newcomers(trajectory, self._secant())
        for record, around, adjoints, _ in self._trace(trajectory, {name: gradient}):
            newcomers.meet(record, around, adjoints[name])
            chunks = [newcomers.judge(x, y) for x, y in samples.labelled_batches(newcomers.chunk_size)]
            total -= torch.cat(chunks).double().cpu().numpy()
            draws += len(record.indices)
        # The mean over steps, times how often the window draws one instance, puts fresh and trained instances on one
        # scale.
        return total / n_steps * (draws / len(trajectory.source))

    def probe(self, step: AnyStep, state: TrainingState, record: StepRecord, x: Tensor) -> None:
        """Trace one step, with its own new state as cotangent, to find out whether the networks allow it."""
        self._check_parameters()
        after = step(state, record, x)
        if self.derivative == "exact":
            check_second_derivative(step.plain, state, record, x)
        # Cloned, since a graph that has met one tensor in two places is compiled anew for two.
        cotangent = map_state(torch.clone, step.differentiable(after))
        self._adjoint(1e-2)(step, state, after, record, x, [cotangent])

    def _check_parameters(self) -> None:
        if self.derivative not in DERIVATIVES:
            raise ValueError(f"derivative must be one of {list(DERIVATIVES)}; got {self.derivative!r}.")
        if self.delta != "auto" and not _is_positive(self.delta):
            raise ValueError(f"delta must be a positive number or 'auto'; got {self.delta!r}.")
        if not isinstance(self.n_perturbations, Integral) or self.n_perturbations < 0:
            raise ValueError(f"n_perturbations must be an integer from 0; got {self.n_perturbations!r}.")
        if not isinstance(self.n_augmentations, Integral) or self.n_augmentations < 1:
            raise ValueError(f"n_augmentations must be a positive integer; got {self.n_augmentations!r}.")
        if self.augmentation is not None and not callable(self.augmentation):
            raise ValueError(f"augmentation must be None or a function of a batch; got {self.augmentation!r}.")
        for name in ("perturbation", "max_growth"):
            if not _is_positive(getattr(self, name)):
                raise ValueError(f"{name} must be a positive number; got {getattr(self, name)!r}.")

    def _width(self, trajectory: Trajectory, gradients: Mapping[str, TrainingState]) -> float:
        if self.derivative == "exact" or self.delta != "auto":
            return float("nan") if self.derivative == "exact" else float(self.delta)

        def influences_at(width: float) -> Mapping[str, np.ndarray]:
            return clone(self).set_params(delta=width, last_epochs=1).fit(trajectory, gradients).influences_

        self.calibration_ = calibrate_width(influences_at, trajectory, gradients, last_epochs=1)
        return best_width(self.calibration_)

    def _adjoint(self, delta: float) -> Adjoint:
        secant = self._secant(delta)
        return exact_adjoint if secant is None else partial(secant_adjoint, secant=secant)

    def _secant(self, delta: float | None = None) -> Secant | None:
        """Return how the secant looks; None where derivatives are exact."""
        if self.derivative == "exact":
            return None
        delta = self.delta_ if delta is None else delta
        return Secant(delta, n_perturbations=int(self.n_perturbations), perturbation=float(self.perturbation))

    def _trace(
        self,
        trajectory: Trajectory,
        gradients: Mapping[str, TrainingState],
        reached: Reached | None = None,
        self_check: bool = False,
    ) -> Iterator[tuple[StepRecord, tuple[TrainingState, TrainingState], dict[str, StepAdjoint], dict[str, float]]]:
        """Yield each traced step, from the last one not yet traced to the first: what it drew, the states around it,
        the adjoints of all metrics, and how far each has grown. The self-check takes the first that has contributions.
        """
        self_check = self_check and self.derivative == "secant" and math.isnan(self.deviation_)
        adjoint, step = self._adjoint(self.delta_), trajectory.step
        sizes = {name: _size(gradient) for name, gradient in gradients.items()}
        cotangents = dict(gradients if reached is None else reached.cotangents)
        end = None if reached is None else reached.end
        # A stack of two takes longer than one after the other (benchmarks/speed.py).
        stacked: bool | None = None if len(cotangents) > 2 else False
        for record, before, after in trajectory.backwards(trajectory.start_of_last(self.last_epochs), end):
            args = step, before, after, record, trajectory.instances(record), list(cotangents.values())
            if stacked is None:
                stacked = is_dispatch_bound(step.plain, before, record, args[4]) and _can_be_stacked(adjoint, *args)
            adjoints = dict(zip(cotangents, adjoint(*args, stacked=stacked)))
            if self_check and any(bool(one.weights.any()) for one in adjoints.values()):
                self.deviation_, self_check = _deviation(adjoints, *args), False
            growth = {name: _size(one.cotangent) / sizes[name] for name, one in adjoints.items()}
            for name, one in adjoints.items():
                self._check_growth(name, growth[name], one, record.index, len(trajectory))
                if self._propagates:
                    cotangents[name] = one.cotangent
            # Memory holds what was recomputed; these are not needed any more.
            del args
            yield record, (before, after), adjoints, growth
            del before, after

    def _check_growth(self, name: str, growth: float, adjoint: StepAdjoint, index: int, n_steps: int) -> None:
        if math.isfinite(growth + float(adjoint.weights.sum())) and growth <= self.max_growth:
            return
        became = f"grew {growth:.1e}-fold" if math.isfinite(growth) else "became NaN or infinite"
        raise NonFiniteError(
            f"The adjoint of the metric {name!r} {became} at step {index} of {n_steps}: training is too rough there "
            "to be traced further back, and influences would be noise. Trace fewer epochs (ITD(last_epochs=...)), "
            "widen the secant (delta=3e-2, or 'auto'), choose smooth activations such as SiLU, or lower the learning "
            "rate."
        )

    def _contributions(
        self,
        trajectory: Trajectory,
        around: tuple[TrainingState, TrainingState],
        record: StepRecord,
        adjoints: Mapping[str, StepAdjoint],
    ) -> dict[str, Tensor]:
        """Return (∂Φ/∂w)ᵀ λ of the drawn instances for each metric, averaged over augmentations where there are any."""
        contributions = {name: one.weights for name, one in adjoints.items()}
        if self.augmentation is None:
            return contributions
        step, x = trajectory.step.plain, trajectory.instances(record)
        states = states_between(step, *around, record, x)
        for i in range(self.n_augmentations):
            with seeded(stream(record.seed, "augmentation", i), x.device), torch.no_grad():
                copies = self.augmentation(x)
            if copies.shape != x.shape:
                raise ValueError(
                    f"augmentation must keep the shape of a batch, {tuple(x.shape)}; it returned {tuple(copies.shape)}."
                )
            for name, one in adjoints.items():
                of_copies = sensitivities(
                    step, states, record, copies, torch.ones_like(one.weights), one.pushes, self._secant()
                )
                contributions[name] = contributions[name] + of_copies
        return {name: total / (self.n_augmentations + 1) for name, total in contributions.items()}


class _Newcomers:
    """Judges instances that a step did not draw inside its own batch, at weight zero.

    Each is normalised by the batch statistics of the drawn instances, whatever its company.

    Parameters
    ----------
    trajectory : Trajectory
    secant : Secant or None
        None for the exact derivative.
    """

    def __init__(self, trajectory: Trajectory, secant: Secant | None):
        self.trajectory, self.secant = trajectory, secant
        self.step = _in_one_slice(trajectory.step.plain)
        # By update: which power of the batch's size its objective divides by.
        self.powers: dict[str, int] = {}

    def meet(self, record: StepRecord, around: tuple[TrainingState, TrainingState], adjoint: StepAdjoint) -> None:
        """Join a step, given the states around it and its adjoint."""
        self.record, self.own, self.pushes = record, self.trajectory.instances(record), adjoint.pushes
        self.around = states_between(self.trajectory.step.plain, *around, record, self.own)
        for done in record.updates:
            power = None if done.name in self.powers else self._power(done.name)
            if power is not None:
                self.powers[done.name] = power

    @property
    def chunk_size(self) -> int:
        """How many instances are judged at a time: as many as the batch holds, or several times that."""
        n = len(self.own)
        return n * max(1, CHUNK // n)

    def judge(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return (∂Φ/∂w)ᵀ λ of some instances, shape (n,)."""
        n, n_own = len(x), len(self.own)
        # Filled up with the drawn instances, so that what divides the batch divides the larger one.
        fill = torch.arange(-n % n_own)
        joined = torch.cat([self.own, x, self.own[fill]])
        labels = None
        if self.record.labels is not None and y is not None:
            labels = torch.cat([self.record.labels, y, self.record.labels[fill]])
        powers = {done.name: self.powers.get(done.name, 1) for done in self.record.updates}
        factors = {name: (len(joined) / n_own) ** power for name, power in powers.items()}
        with ExitStack() as stack:
            for network in self.step.networks.values():
                stack.enter_context(network.own_statistics(n_own, len(joined)))
            return self._looked(joined, labels, factors)[n_own : n_own + n]

    def _power(self, name: str) -> int | None:
        """Return 1 for a mean over the batch, 0 for a sum: found by looking at a batch of twice the same instances.

        None where nothing is seen, such as before anything that a metric depends on is reached.
        """
        twice = None if self.record.labels is None else torch.cat([self.record.labels] * 2)
        alone = self._looked(self.own, self.record.labels, {name: 1.0}).double()
        among = self._looked(torch.cat([self.own] * 2), twice, {name: 1.0})[: len(self.own)].double()
        product, size = float((alone * among).sum()), float(among.square().sum())
        # Randomness in the networks is not the same in a larger batch, so that the ratio is not exactly a power of 2.
        return round(math.log2(product / size)) if product > 0 else None

    def _looked(self, x: Tensor, labels: Tensor | None, factors: Mapping[str, float]) -> Tensor:
        """Return (∂Φ/∂w)ᵀ λ in a batch whose first instances are the drawn ones, the others at weight zero.

        What was drawn for each instance serves the others in turn.
        """
        n_own = len(self.own)
        turn = torch.arange(len(x)) % n_own

        def repeated(draw: Tensor) -> Tensor:
            return draw[turn] if draw.ndim and len(draw) == n_own else draw

        record = replace(mapped(self.record, repeated), indices=self.record.indices[turn], labels=labels)
        weights = torch.cat([x.new_ones(n_own), x.new_zeros(len(x) - n_own)])
        return sensitivities(self.step, self.around, record, x, weights, self.pushes, self.secant, factors)


def _in_one_slice(step: Step) -> Step:
    """Return a step whose objectives see their batches as a whole."""
    if all(update.micro == 1 for update in step.updates):
        return step
    return replace(step, updates=tuple(replace(update, micro=1) for update in step.updates), seen_calls={})


def _subtracted(influence: np.ndarray, rows: Tensor, weights: Tensor) -> np.ndarray:
    # A new array: an interrupt must find influences and cotangents of the same step.
    influence = influence.copy()
    np.subtract.at(influence, rows.numpy(), weights.double().cpu().numpy())
    return influence


def _size(cotangent: TrainingState) -> float:
    """Return the Euclidean norm of a cotangent in the parameters and the averages."""
    parts = [*cotangent.params.values(), *cotangent.averages.values()]
    return math.sqrt(sum(float(ravel(part).double().square().sum()) for part in parts if part))


def _can_be_stacked(adjoint: Adjoint, *args) -> bool:
    try:
        adjoint(*args, stacked=True)
    except RuntimeError:
        # Not every module that trains can be transformed by torch.func.
        return False
    return True


def _deviation(
    adjoints: Mapping[str, StepAdjoint],
    step: AnyStep,
    before: TrainingState,
    after: TrainingState,
    record: StepRecord,
    x: Tensor,
    cotangents: list[TrainingState],
) -> float:
    """Return how far the secant's contributions of the instances are from the exact ones; NaN where there are none."""
    try:
        check_second_derivative(step.plain, before, record, x)
        # Once only, which is not worth a graph.
        exact = exact_adjoint(step.plain, before, after, record, x, cotangents)
    except (RuntimeError, NotImplementedError):
        return math.nan
    expected = torch.cat([one.weights for one in exact])
    found = torch.cat([one.weights for one in adjoints.values()])
    return float((found - expected).norm() / expected.norm())


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
