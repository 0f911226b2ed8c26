"""Metrics of a training state, and their gradients, in two passes over the samples (theory, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from ganclean.exceptions import MetricError, NonFiniteError
from ganclean.metrics.base import FeatureMetric, Metric
from ganclean.training.state import Tensors, TrainingState, map_state
from ganclean.training.step import TrainingStep


@dataclass(frozen=True)
class Evaluator:
    """Evaluates metrics on samples that a state's generator makes of fixed latents.

    Parameters
    ----------
    step : TrainingStep
        Knows the networks.
    latents : Tensor of shape (n, *latent_shape)
        A metric of fewer samples takes the first ones.
    chunk_size : int, default=500
        Samples that are in memory with their graph at a time.
    """

    step: TrainingStep
    latents: Tensor
    chunk_size: int = 500

    def samples(self, state: TrainingState, n_samples: int) -> Tensor:
        """Return samples of the evaluated generator (the average where one is kept)."""
        with torch.no_grad():
            return torch.cat([self._sample(state.evaluated, state, z) for z in self._chunks(n_samples)])

    def value(self, metric: Metric, state: TrainingState) -> float:
        """Return the metric of a state."""
        with torch.no_grad():
            return float(self._reduce(metric, self._features(metric, state), state.discriminator, state))

    def gradient(self, name: str, metric: Metric, state: TrainingState) -> tuple[float, TrainingState]:
        """Return the metric of a state and its gradient, in the form of a state.

        Raises
        ------
        MetricError
            If the metric has no gradient in the generator, or one that is zero.
        NonFiniteError
            If the metric or its gradient is NaN or infinite.
        """
        features = self._features(metric, state).requires_grad_()
        discriminator = {n: p.detach().requires_grad_() for n, p in state.discriminator.items()}
        value = self._reduce(metric, features, discriminator, state)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MetricError(f"The metric {name!r} returned {got}; expected a scalar tensor.")
        independent = MetricError(
            f"The metric {name!r} does not depend on the generator: its gradient is zero or not defined. Compute it "
            "from the samples with differentiable torch functions."
        )
        if not value.requires_grad:
            raise independent
        to_features, *to_discriminator = grad(value, [features, *discriminator.values()], materialize_grads=True)
        params = {n: p.detach().requires_grad_() for n, p in state.evaluated.items()}
        total = [torch.zeros_like(p) for p in params.values()]
        pieces = to_features.split(self.chunk_size)
        for z, piece in zip(self._chunks(metric.sample_size), pieces):
            chunk = self._extract(metric, self._sample(params, state, z))
            for sum_, g in zip(total, grad(chunk, list(params.values()), piece, materialize_grads=True)):
                sum_ += g
        everything = [*total, *to_discriminator]
        value = value.detach()
        if not torch.isfinite(value) or not all(bool(g.isfinite().all()) for g in everything):
            raise NonFiniteError(
                f"The metric {name!r} is {float(value)}, or its gradient in the generator is NaN or infinite. Check "
                "its feature extractor and reference data, and whether the generator's samples are sound."
            )
        if not any(bool(g.any()) for g in everything):
            raise independent
        cotangent = map_state(torch.zeros_like, state.without_buffers())
        cotangent = cotangent._replace(discriminator=dict(zip(discriminator, to_discriminator)))
        to_generator = dict(zip(params, total))
        if state.average:
            return float(value), cotangent._replace(average=to_generator)
        return float(value), cotangent._replace(generator=to_generator)

    def _chunks(self, n_samples: int) -> tuple[Tensor, ...]:
        return self.latents[:n_samples].split(self.chunk_size)

    def _sample(self, params: Tensors, state: TrainingState, latents: Tensor) -> Tensor:
        return self.step.sample(params, state.buffers_generator, latents)

    def _extract(self, metric: Metric, samples: Tensor) -> Tensor:
        return metric.extract(samples) if isinstance(metric, FeatureMetric) else samples

    def _features(self, metric: Metric, state: TrainingState) -> Tensor:
        with torch.no_grad():
            chunks = self._chunks(metric.sample_size)
            return torch.cat([self._extract(metric, self._sample(state.evaluated, state, z)) for z in chunks])

    def _reduce(self, metric: Metric, features: Tensor, discriminator: Tensors, state: TrainingState) -> Tensor:
        if isinstance(metric, FeatureMetric):
            return metric.reduce(features)
        if metric.uses_discriminator:
            return metric(features, lambda x: self.step.judge(discriminator, state.buffers_discriminator, x))
        return metric(features)
