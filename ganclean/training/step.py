"""One training step as a pure function of the state and of the example weights (theory, section 1)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from ganclean.exceptions import NetworkError
from ganclean.losses import AdversarialLoss
from ganclean.optim import Optimizer
from ganclean.training.state import Tensors, TrainingState

UPDATES = ("alternating", "simultaneous")


@dataclass(frozen=True)
class StepRecord:
    """What a training step drew; with the state before it, it determines the state after it.

    Parameters
    ----------
    index : int
        The number of the step, from 0.
    indices : Tensor of shape (batch_size,), int64
        The rows of the data that were drawn.
    latents_d, latents_g : Tensor of shape (batch_size, *latent_shape)
        The latents of the discriminator's and of the generator's update; the same tensor in a simultaneous update.
    seed : int
        Seeds whatever else is random in the networks, such as dropout.
    """

    index: int
    indices: Tensor
    latents_d: Tensor
    latents_g: Tensor
    seed: int


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generator of a device inside the block and restore it afterwards."""
    # Not torch.manual_seed, which on a build with CUDA formats a stack trace whenever it is called.
    if device is not None and device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    else:
        generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


def one_number_per_sample(output: Tensor, n_samples: int) -> Tensor:
    """Return a discriminator's output as a vector, or say that it is not one number per sample."""
    if not isinstance(output, Tensor):
        raise NetworkError(
            f"The discriminator's forward returned a {type(output).__name__}; expected one tensor with one number per "
            "sample. Wrap the module so that its forward returns the logits alone."
        )
    if output.numel() != n_samples or (output.ndim and output.shape[0] != n_samples):
        raise NetworkError(
            f"The discriminator's output for {n_samples} samples has shape {tuple(output.shape)}; expected one number "
            f"per sample, shape ({n_samples},) or ({n_samples}, 1). Average patch outputs in the module's forward."
        )
    return output.reshape(n_samples)


def loaded(module: nn.Module, params: Tensors) -> nn.Module:
    """Return a copy of a module with other values of some parameters, in evaluation mode."""
    module = copy.deepcopy(module)
    module.load_state_dict(params, strict=False)
    return module.eval()


@dataclass(frozen=True)
class TrainingStep:
    """The map Φ from a training state and example weights to the next state (theory, section 1).

    Parameters
    ----------
    generator, discriminator : torch.nn.Module
        Define the architecture; their own parameters serve as the initial ones and are never changed.
    loss : AdversarialLoss
    optimizer_generator, optimizer_discriminator : Optimizer
    update : {"alternating", "simultaneous"}
        Whether the generator sees the discriminator after or before the step's update of it.
    ema_decay : float or None
        Decay of the generator's moving average.
    """

    generator: nn.Module
    discriminator: nn.Module
    loss: AdversarialLoss
    optimizer_generator: Optimizer
    optimizer_discriminator: Optimizer
    update: Literal["alternating", "simultaneous"] = "alternating"
    ema_decay: float | None = None

    def initial_state(self) -> TrainingState:
        """Return the state before the first step: the modules' parameters and zero moments."""
        generator, discriminator = (
            {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
            for module in (self.generator, self.discriminator)
        )
        return TrainingState(
            generator=generator,
            discriminator=discriminator,
            moments_generator=self.optimizer_generator.init(generator),
            moments_discriminator=self.optimizer_discriminator.init(discriminator),
            average={} if self.ema_decay is None else {name: p.clone() for name, p in generator.items()},
            buffers_generator={name: b.detach().clone() for name, b in self.generator.named_buffers()},
            buffers_discriminator={name: b.detach().clone() for name, b in self.discriminator.named_buffers()},
        )

    def __call__(
        self,
        state: TrainingState,
        record: StepRecord,
        real: Tensor,
        weights: Tensor | None = None,
        push: Tensors | None = None,
        divisor: Tensor | float | None = None,
    ) -> TrainingState:
        """Return the state after the step.

        Parameters
        ----------
        state : TrainingState
        record : StepRecord
        real : Tensor of shape (batch_size, *sample_shape)
            The drawn instances.
        weights : Tensor of shape (batch_size,), optional
            Weights of the instances' own terms in the discriminator's loss; default 1.
        push : dict of str to Tensor, optional
            Added to the discriminator's gradient. Its derivative at zero is the cotangent of that gradient, from which
            the influence of an instance outside the batch follows.
        divisor : float or scalar Tensor, optional
            What the weighted sum over the real instances is divided by; default the batch size, so that weight 0
            removes an instance and leaves the other terms alone.
        """
        fake = self.generate(state.generator, state.buffers_generator, record.latents_d, record.seed)
        gradient = grad(lambda theta: self.discriminator_loss(theta, state, record, real, fake, weights, divisor)[0])(
            state.discriminator
        )
        if push is not None:
            gradient = {name: g + push[name] for name, g in gradient.items()}
        discriminator, moments_discriminator = self.optimizer_discriminator.update(
            state.discriminator, gradient, state.moments_discriminator, record.index + 1
        )
        opponent = discriminator if self.update == "alternating" else state.discriminator
        gradient = grad(lambda theta: self.generator_loss(theta, opponent, state, record))(state.generator)
        generator, moments_generator = self.optimizer_generator.update(
            state.generator, gradient, state.moments_generator, record.index + 1
        )
        return state._replace(
            generator=generator,
            discriminator=discriminator,
            moments_generator=moments_generator,
            moments_discriminator=moments_discriminator,
            average=self._averaged(state.average, generator),
        )

    def generate(self, theta: Tensors, buffers: Tensors, latents: Tensor, seed: int) -> Tensor:
        """Return the generator's samples for some latents, in training mode."""
        return self._call(self.generator, theta, buffers, latents, seed)

    def discriminate(self, theta: Tensors, buffers: Tensors, samples: Tensor, seed: int) -> Tensor:
        """Return the discriminator's outputs as a vector, in training mode."""
        output = self._call(self.discriminator, theta, buffers, samples, seed)
        return one_number_per_sample(output, len(samples))

    def discriminator_loss(
        self,
        theta: Tensors,
        state: TrainingState,
        record: StepRecord,
        real: Tensor,
        fake: Tensor,
        weights: Tensor | None = None,
        divisor: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the discriminator's loss and the unweighted losses of the real instances, shape (batch_size,)."""
        buffers = state.buffers_discriminator
        terms = self.loss.real(self.discriminate(theta, buffers, real, record.seed + 1))
        fakes = self.loss.fake(self.discriminate(theta, buffers, fake, record.seed + 2))
        weighted = terms if weights is None else weights * terms
        return weighted.sum() / (len(terms) if divisor is None else divisor) + fakes.mean(), terms

    def generator_loss(
        self, theta: Tensors, discriminator: Tensors, state: TrainingState, record: StepRecord
    ) -> Tensor:
        """Return the generator's loss against the given discriminator parameters."""
        # A simultaneous update shares its latents between the networks, and so the generator's randomness too.
        seed = record.seed if self.update == "simultaneous" else record.seed + 3
        fake = self.generate(theta, state.buffers_generator, record.latents_g, seed)
        output = self.discriminate(discriminator, state.buffers_discriminator, fake, record.seed + 4)
        return self.loss.generator(output).mean()

    def sample(self, theta: Tensors, buffers: Tensors, latents: Tensor) -> Tensor:
        """Return the generator's samples in evaluation mode: what metrics look at."""
        return functional_call(self.generator.eval(), (theta, buffers), (latents,))

    def judge(self, theta: Tensors, buffers: Tensors, samples: Tensor) -> Tensor:
        """Return the discriminator's outputs as a vector in evaluation mode."""
        output = functional_call(self.discriminator.eval(), (theta, buffers), (samples,))
        return one_number_per_sample(output, len(samples))

    def _call(self, module: nn.Module, theta: Tensors, buffers: Tensors, inputs: Tensor, seed: int) -> Tensor:
        if not module.training:
            module.train()
        with seeded(seed, inputs.device):
            return functional_call(module, (theta, buffers), (inputs,))

    def _averaged(self, average: Tensors, generator: Tensors) -> Tensors:
        if self.ema_decay is None:
            return {}
        return {name: torch.lerp(generator[name], old, self.ema_decay) for name, old in average.items()}
