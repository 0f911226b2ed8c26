"""What objectives of the library draw when the record of a step is completed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ganclean.data import DataSource
from ganclean.dynamics.randomness import stream

if TYPE_CHECKING:
    from ganclean.dynamics.step import Step


class Drawing:
    """What an objective of the library draws from when its record is completed.

    Parameters
    ----------
    step : Step
    source : DataSource
    n : int
        The number of instances in the batch.
    index : int
        The number of the step.
    seed : int
        Of the update; each name has a stream of its own.
    """

    def __init__(self, step: Step, source: DataSource, n: int, index: int, seed: int):
        self.step, self.source, self.n, self.index, self.seed = step, source, n, index, seed

    def generator(self, name: str) -> torch.Generator:
        """Return a generator of random numbers with a stream of its own."""
        return torch.Generator().manual_seed(stream(self.seed, name))

    def latents(self) -> Tensor:
        """Return one latent per instance."""
        return self.step.draw_latents(self.n, stream(self.seed, "latents"))

    def labels(self) -> Tensor:
        """Return labels of random instances of the data."""
        return self.source.labels_of(torch.randint(len(self.source), (self.n,), generator=self.generator("labels")))

    def uniform(self, name: str) -> Tensor:
        """Return one number in [0, 1) per instance."""
        like = self.step.like
        return torch.rand(self.n, generator=self.generator(name), dtype=like.dtype).to(like.device)
