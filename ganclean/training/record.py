"""What one training step drew and which settings it ran with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """What a training step drew; with the state before it, it determines the state after it.

    A step of `GANTrainer` draws its latents from its seed, so that a store need not keep them; `TrainingStep.drawn`
    fills them in. A step of the user's own loop brings them along.

    Parameters
    ----------
    index : int
        The number of the step, from 0.
    indices : Tensor of shape (batch_size,), int64
        The rows of the data that were drawn.
    seed : int
        Seeds whatever else is random: the latents where none are given, dropout and other noise in the networks.
    latents_d, latents_g : Tensor of shape (batch_size, *latent_shape), optional
        The latents of the discriminator's and of the generator's update. One and the same tensor where both updates
        look at the same samples, which are then generated once. Without an update of the generator, `latents_g` is
        None.
    labels : Tensor of shape (batch_size, ...), optional
        The labels of the drawn instances, where the networks are conditional. They belong to the data and are not stored.
    labels_d, labels_g : Tensor of shape (batch_size, ...), optional
        The labels that samples were generated for, where the networks are conditional.
    mixing : Tensor of shape (batch_size,), optional
        Shares of the real instances in the points at which a gradient penalty was taken; default drawn from the seed.
    updates_generator : bool, default=True
        Whether the step updates the generator too, or only the discriminator.
    number_d, number_g : int, optional
        The numbers of these updates of the two networks, from 1, which bias corrections depend on; default index + 1.
    settings_d, settings_g : dict, optional
        Hyper-parameters of the optimisers in this step where they differ from those of the rule, such as a scheduled
        learning rate.
    """

    index: int
    indices: Tensor
    seed: int
    latents_d: Tensor | None = None
    latents_g: Tensor | None = None
    labels: Tensor | None = None
    labels_d: Tensor | None = None
    labels_g: Tensor | None = None
    mixing: Tensor | None = None
    updates_generator: bool = True
    number_d: int = 0
    number_g: int = 0
    settings_d: Mapping[str, Any] = field(default_factory=dict)
    settings_g: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("number_d", "number_g"):
            if not getattr(self, name):
                object.__setattr__(self, name, self.index + 1)
