"""Draws from a generator, as they come or only the valid ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.randomness import stream
from ganclean.dynamics.state import TrainingState
from ganclean.metrics.evaluation import Evaluator

MOST_DRAWS_PER_SAMPLE = 1000
"""How many draws rejection spends on one valid sample before it gives up."""

Drawn = tuple[Tensor, Tensor | None]
"""Samples, and the labels that a conditional generator made them for."""


@dataclass(frozen=True)
class Sampler:
    """Draws samples of a state's generator in evaluation mode (of its average, where one is kept).

    Parameters
    ----------
    step : AnyStep
        Knows the networks.
    labels : Tensor of shape (n_labels, ...), optional
        What a conditional generator is asked for, drawn with replacement.
    """

    step: AnyStep
    labels: Tensor | None = None

    def draw(self, state: TrainingState, n_samples: int, rng: np.random.RandomState) -> Drawn:
        """Return samples, shape (n_samples, *sample_shape), and their labels."""
        seed = int(rng.randint(2**31))
        latents = self.step.draw_latents(n_samples, stream(seed, "latents"))
        labels = None
        if self.labels is not None:
            labels = self.labels[torch.from_numpy(rng.randint(len(self.labels), size=n_samples))]
        return Evaluator(self.step, latents, labels=labels, seed=seed).samples(state, n_samples), labels

    def draw_valid(
        self,
        state: TrainingState,
        n_samples: int,
        rng: np.random.RandomState,
        is_valid: Callable[[Tensor], np.ndarray],
    ) -> Drawn:
        """Return as many samples that are valid, and their labels.

        Raises
        ------
        RuntimeError
            If hardly any sample is valid.
        """
        samples: list[Tensor] = []
        labels: list[Tensor] = []
        n_found, n_drawn = 0, 0
        while n_found < n_samples:
            if n_drawn >= MOST_DRAWS_PER_SAMPLE * n_samples:
                raise RuntimeError(
                    f"Of {n_drawn} samples only {n_found} are valid, and {n_samples} were asked for. Ask for fewer, or "
                    "redact further."
                )
            drawn, of = self.draw(state, max(n_samples, 100), rng)
            valid = torch.from_numpy(is_valid(drawn)).to(drawn.device)
            samples.append(drawn[valid])
            if of is not None:
                labels.append(of[valid])
            n_found += int(valid.sum())
            n_drawn += len(drawn)
        return torch.cat(samples)[:n_samples], torch.cat(labels)[:n_samples] if labels else None
