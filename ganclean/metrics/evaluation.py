"""Metrics of a training state, and their gradients, in two passes over the samples (theory, section 6)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad

from ganclean.exceptions import MetricError, NonFiniteError
from ganclean.metrics.base import FeatureMetric, Metric
from ganclean.training.state import Tensors, TrainingState, leaves, map_state
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
    labels : Tensor of shape (n, ...), optional
        What a conditional generator makes the samples for.
    """

    step: TrainingStep
    latents: Tensor
    chunk_size: int = 500
    labels: Tensor | None = None

    def samples(self, state: TrainingState, n_samples: int) -> Tensor:
        """Return samples of the evaluated generator (the average where one is kept)."""
        with torch.no_grad():
            chunks = self._chunks(n_samples)
            return torch.cat([self._sample(state.evaluated, state.buffers_generator, chunk) for chunk in chunks])

    def value(self, metric: Metric, state: TrainingState) -> float:
        """Return the metric of a state."""
        with torch.no_grad():
            judge = (state.discriminator, state.buffers_discriminator)
            return float(self._reduce(metric, self._features(metric, state), *judge))

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
                "removal does to this one with ganclean.validation.counterfactual_retrain(cleaner, removals, "
                f"metric={kind}(...).fit(X))."
            )
        features = self._features(metric, state).requires_grad_()
        # Running statistics and the vectors of spectral norms are functions of the state like the parameters.
        traced = self.step.differentiable(state)
        discriminator, buffers_d = leaves(state.discriminator), leaves(traced.buffers_discriminator)
        value = self._reduce(metric, features, discriminator, {**state.buffers_discriminator, **buffers_d})
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise MetricError(f"The metric {name!r} returned {got}; expected a scalar tensor.")
        independent = MetricError(
            f"The metric {name!r} does not depend on the generator: its gradient is zero or not defined. Compute it "
            "from the samples with differentiable torch functions."
        )
        if not value.requires_grad:
            raise independent
        judging = [*discriminator.values(), *buffers_d.values()]
        with self.step.players[1].installed(discriminator):
            to_features, *to_judging = grad(value, [features, *judging], materialize_grads=True)
        params, buffers_g = leaves(state.evaluated), leaves(traced.buffers_generator)
        making = [*params.values(), *buffers_g.values()]
        total = [torch.zeros_like(p) for p in making]
        pieces = to_features.split(self.chunk_size)
        for chunk, piece in zip(self._chunks(metric.sample_size), pieces):
            samples = self._sample(params, {**state.buffers_generator, **buffers_g}, chunk)
            with self.step.players[0].installed(params):
                pieced = grad(self._extract(metric, samples), making, piece, materialize_grads=True)
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
        to_generator = dict(zip(params, total))
        cotangent = map_state(torch.zeros_like, traced)._replace(
            discriminator=dict(zip(discriminator, to_judging)),
            buffers_discriminator=dict(zip(buffers_d, to_judging[len(discriminator) :])),
            buffers_generator=dict(zip(buffers_g, total[len(params) :])),
        )
        if state.average:
            return float(value), cotangent._replace(average=to_generator)
        return float(value), cotangent._replace(generator=to_generator)

    def _chunks(self, n_samples: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for begin in range(0, min(n_samples, len(self.latents)), self.chunk_size):
            rows = slice(begin, min(begin + self.chunk_size, n_samples))
            yield self.latents[rows], None if self.labels is None else self.labels[rows]

    def _sample(self, params: Tensors, buffers: Tensors, chunk: tuple[Tensor, Tensor | None]) -> Tensor:
        return self.step.sample(params, buffers, *chunk)

    def _extract(self, metric: Metric, samples: Tensor) -> Tensor:
        return metric.extract(samples) if isinstance(metric, FeatureMetric) else samples

    def _features(self, metric: Metric, state: TrainingState) -> Tensor:
        with torch.no_grad():
            made = (
                self._sample(state.evaluated, state.buffers_generator, chunk)
                for chunk in self._chunks(metric.sample_size)
            )
            return torch.cat([self._extract(metric, samples) for samples in made])

    def _reduce(self, metric: Metric, features: Tensor, discriminator: Tensors, buffers: Tensors) -> Tensor:
        if isinstance(metric, FeatureMetric):
            return metric.reduce(features)
        if metric.uses_discriminator:
            if self.labels is not None:
                raise MetricError(
                    f"{type(metric).__name__} judges the reference data, whose labels are not known. With a "
                    "conditional discriminator use a metric of the samples alone."
                )
            return metric(features, lambda x: self.step.judge(discriminator, buffers, x))
        return metric(features)
