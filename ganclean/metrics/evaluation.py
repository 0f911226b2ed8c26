"""Metrics of a training state, and their gradients, in two passes over the samples (theory, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad

from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.players import installed
from ganclean.dynamics.randomness import stream
from ganclean.dynamics.state import Tensors, TrainingState, leaves, map_state
from ganclean.exceptions import MetricError, NonFiniteError
from ganclean.metrics.base import FeatureMetric, Metric


@dataclass(frozen=True)
class Evaluator:
    """Evaluates metrics on samples that a state's generator makes of fixed latents.

    Parameters
    ----------
    step : AnyStep
        Knows the networks.
    latents : Tensor of shape (n, *latent_shape)
        A metric of fewer samples takes the first ones.
    chunk_size : int, default=500
        Samples that are in memory with their graph at a time.
    labels : Tensor of shape (n, ...), optional
        What a conditional generator makes the samples for.
    seed : int, default=0
        Of the noise in the networks: the same in every evaluation.
    """

    step: AnyStep
    latents: Tensor
    chunk_size: int = 500
    labels: Tensor | None = None
    seed: int = 0

    @classmethod
    def drawn(cls, step: AnyStep, source: DataSource, n_samples: int, seed: int) -> Evaluator:
        """Return the evaluator of latents that are drawn as in training, and of labels of the data.

        Parameters
        ----------
        step : Step
        source : DataSource
        n_samples : int
            Fewer samples are the first of more, so that metrics of different sizes share them.
        seed : int
        """
        chunks = range(-(-n_samples // cls.chunk_size))
        latents = [step.draw_latents(cls.chunk_size, stream(seed, "latents", i)) for i in chunks]
        rows = np.random.RandomState((seed + 1) % 2**32).randint(len(source), size=n_samples)
        labels = None if source.labels is None else source.labels_of(torch.from_numpy(rows))
        return cls(step, torch.cat(latents)[:n_samples], labels=labels, seed=seed)

    def samples(self, state: TrainingState, n_samples: int) -> Tensor:
        """Return samples of the evaluated generator (the average where one is kept)."""
        with torch.no_grad():
            chunks = self._chunks(n_samples)
            return torch.cat([self._sample(state.evaluated, state.evaluated_buffers, *chunk) for chunk in chunks])

    def value(self, metric: Metric, state: TrainingState) -> float:
        """Return the metric of a state."""
        with torch.no_grad():
            return float(self._reduce(metric, self._features(metric, state), state.params, state.buffers))

    def gradient(self, name: str, metric: Metric, state: TrainingState) -> tuple[float, TrainingState]:
        """Return the metric of a state and its gradient, in the form of a state.

        Raises
        ------
        MetricError
            If the metric has no gradient in the generator, or one that is zero.
        NonFiniteError
            If the metric or its gradient is NaN or infinite.
        """
        if not metric.is_differentiable:
            kind = type(metric).__name__
            raise MetricError(
                f"The metric {name!r} is for evaluation only: {kind} has no gradient in the generator. Compute "
                "influence on a differentiable metric of the same features, such as FID, KID or MMD, and see what "
                "removal does to this one with ganclean.validation.counterfactual_retrain(cleanser, removals, "
                f"metric={kind}(...).fit(X))."
            )
        features = self._features(metric, state).requires_grad_()
        # Running statistics and the vectors of spectral norms are functions of the state like the parameters.
        traced = self.step.differentiable(state)
        judging = _Leaves(state.params, traced.buffers, state.buffers)
        value = self._reduce(metric, features, judging.params, judging.buffers)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MetricError(f"The metric {name!r} returned {got}; expected a scalar tensor.")
        independent = MetricError(
            f"The metric {name!r} does not depend on the generator: its gradient is zero or not defined. Compute it "
            "from the samples with differentiable torch functions."
        )
        if not value.requires_grad:
            raise independent
        with installed(self.step.networks, judging.params):
            to_features, *to_judging = grad(value, [features, *judging.flat], materialize_grads=True)
        making = _Leaves(state.evaluated, traced.buffers, state.evaluated_buffers)
        total = [torch.zeros_like(p) for p in making.flat]
        pieces = to_features.split(self.chunk_size)
        for chunk, piece in zip(self._chunks(metric.sample_size), pieces):
            samples = self._sample(making.params, making.buffers, *chunk)
            with installed(self.step.networks, making.params):
                pieced = grad(self._extract(metric, samples), making.flat, piece, materialize_grads=True)
            for sum_, g in zip(total, pieced):
                sum_ += g.detach()
        to_judging = [g.detach() for g in to_judging]
        everything = [*total, *to_judging]
        value = value.detach()
        if not torch.isfinite(value) or not all(bool(g.isfinite().all()) for g in everything):
            raise NonFiniteError(
                f"The metric {name!r} is {float(value)}, or its gradient in the generator is NaN or infinite. Check "
                "its feature extractor and reference data, and whether the generator's samples are sound."
            )
        if not any(bool(g.any()) for g in everything):
            raise independent
        cotangent = map_state(torch.zeros_like, traced)
        for gradients, of_samples in ((judging.shaped(to_judging), False), (making.shaped(total), True)):
            for (field, player, parameter), g in gradients.items():
                # What samples are made with is an average where one is kept.
                averaged = of_samples and parameter in state.averages.get(player, {})
                tensors = cotangent.averages[player] if averaged else getattr(cotangent, field)[player]
                tensors[parameter] = tensors[parameter] + g
        return float(value), cotangent

    def _chunks(self, n_samples: int) -> Iterator[tuple[Tensor, Tensor | None, int]]:
        for number, begin in enumerate(range(0, min(n_samples, len(self.latents)), self.chunk_size)):
            rows = slice(begin, min(begin + self.chunk_size, n_samples))
            labels = None if self.labels is None else self.labels[rows]
            yield self.latents[rows], labels, stream(self.seed, "samples", number)

    def _sample(self, params, buffers, latents: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        return self.step.sample(params, buffers, latents, labels, seed)

    def _extract(self, metric: Metric, samples: Tensor) -> Tensor:
        return metric.extract(samples) if isinstance(metric, FeatureMetric) else samples

    def _features(self, metric: Metric, state: TrainingState) -> Tensor:
        with torch.no_grad():
            made = (
                self._sample(state.evaluated, state.evaluated_buffers, *chunk)
                for chunk in self._chunks(metric.sample_size)
            )
            return torch.cat([self._extract(metric, samples) for samples in made])

    def _reduce(self, metric: Metric, features: Tensor, params, buffers) -> Tensor:
        if isinstance(metric, FeatureMetric):
            return metric.reduce(features)
        if metric.uses_discriminator:
            if self.labels is not None:
                raise MetricError(
                    f"{type(metric).__name__} judges the reference data, whose labels are not known. With a "
                    "conditional discriminator use a metric of the samples alone."
                )
            return metric(features, lambda x: self.step.judge(params, buffers, x))
        return metric(features)


class _Leaves:
    """Parameters and buffers of all players as leaves, and the same as one list."""

    def __init__(self, params: dict[str, Tensors], traced: dict[str, Tensors], buffers: dict[str, Tensors]):
        self.params = {player: leaves(tensors) for player, tensors in params.items()}
        own = {player: leaves({n: buffers[player][n] for n in names}) for player, names in traced.items()}
        self.buffers = {player: {**tensors, **own[player]} for player, tensors in buffers.items()}
        self._keys = [("params", player, name) for player, tensors in self.params.items() for name in tensors]
        self._keys += [("buffers", player, name) for player, tensors in own.items() for name in tensors]
        self.flat = [getattr(self, field)[player][name] for field, player, name in self._keys]

    def shaped(self, gradients: list[Tensor]) -> dict[tuple[str, str, str], Tensor]:
        """Return gradients in the flat list by field, player and name."""
        return dict(zip(self._keys, gradients))
