"""One training step as a pure function of the state and of the example weights (theory, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ganclean.data import DataSource
from ganclean.exceptions import NetworkError
from ganclean.losses import AdversarialLoss, Penalty
from ganclean.optim import Optimizer
from ganclean.training.network import Network
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState, leaves

UPDATES = ("alternating", "simultaneous")


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


@dataclass(frozen=True)
class TrainingStep:
    """The map Φ from a training state and example weights to the next state (theory, section 1).

    One step is an update of the discriminator and, where the record says so, one of the generator. The networks are
    called in the order of any tutorial: G for the discriminator's update, D on the real instances, on the generated
    ones and on those of a gradient penalty, then G and D for the generator's update.

    Parameters
    ----------
    generator, discriminator : torch.nn.Module
        Define the architecture; their own parameters serve as the initial ones and are never changed.
    loss : AdversarialLoss
    optimizer_generator, optimizer_discriminator : Optimizer
    latent_shape : tuple of int
        The shape of one latent.
    update : {"alternating", "simultaneous"}
        Whether the generator sees the discriminator after or before the step's update of it.
    ema_decay : float or None
        Decay of the generator's moving average, which follows each of the generator's updates.
    penalty : Penalty or None
        On the slope of the discriminator.
    conditional : bool
        Whether both networks take labels as their second input.
    """

    generator: nn.Module
    discriminator: nn.Module
    loss: AdversarialLoss
    optimizer_generator: Optimizer
    optimizer_discriminator: Optimizer
    latent_shape: tuple[int, ...]
    update: Literal["alternating", "simultaneous"] = "alternating"
    ema_decay: float | None = None
    penalty: Penalty | None = None
    conditional: bool = False

    @cached_property
    def players(self) -> tuple[Network, Network]:
        """Generator and discriminator as pure functions."""
        return Network(self.generator), Network(self.discriminator)

    def initial_state(self) -> TrainingState:
        """Return the state before the first step: the modules' parameters and buffers, and zero moments."""
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
            buffers_generator=self.players[0].buffers(),
            buffers_discriminator=self.players[1].buffers(),
        )

    def differentiable(self, state: TrainingState) -> TrainingState:
        """Return the part of a state that derivatives flow through: all but constant buffers and counters."""
        return state._replace(
            buffers_generator=self.players[0].trace(state.buffers_generator),
            buffers_discriminator=self.players[1].trace(state.buffers_discriminator),
        )

    def drawn(self, record: StepRecord, source: DataSource) -> StepRecord:
        """Return a record with all that its seed and the data determine: latents, labels and mixing shares."""
        n = len(record.indices)
        noise = torch.Generator().manual_seed(record.seed)
        like = next(self.generator.parameters())
        changes: dict[str, Any] = {}

        def latents() -> Tensor:
            return torch.randn(n, *self.latent_shape, generator=noise, dtype=like.dtype).to(like.device)

        def labels() -> Tensor:
            return source.labels_of(torch.randint(len(source), (n,), generator=noise))

        if self.conditional:
            changes["labels"] = source.labels_of(record.indices)
        if record.latents_d is None:
            changes["latents_d"] = latents()
            if self.conditional:
                changes["labels_d"] = labels()
            if record.updates_generator and self.update == "simultaneous":
                changes["latents_g"] = changes["latents_d"]
                changes["labels_g"] = changes.get("labels_d")
            elif record.updates_generator:
                changes["latents_g"] = latents()
                changes["labels_g"] = labels() if self.conditional else None
        if self._interpolates(record) and record.mixing is None:
            changes["mixing"] = torch.rand(n, generator=noise, dtype=like.dtype).to(like.device)
        return replace(record, **changes) if changes else record

    def __call__(
        self,
        state: TrainingState,
        record: StepRecord,
        real: Tensor,
        weights: Tensor | None = None,
        push: Tensors | None = None,
        divisor: Tensor | float | None = None,
        *,
        functional: bool = False,
    ) -> TrainingState:
        """Return the state after the step.

        Parameters
        ----------
        state : TrainingState
        record : StepRecord
            Complete, as `drawn` returns it.
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
        functional : bool, default=False
            Whether to take gradients by `torch.func`, so that the step itself can be transformed by it. Otherwise they
            are those of plain autograd, which any module that trains allows.
        """
        state = shifted(state, record)
        generator, discriminator = self.players
        # The gradient that trains a network takes the vectors of power iteration for constants; the derivative of the
        # step does not. So they are computed outside of the loss.
        with nullcontext() if functional else torch.no_grad():
            fake, buffers_g = self.generate(state.generator, state.buffers_generator, record)
            played = self.iterated(state.discriminator, state.buffers_discriminator, record)
        with nullcontext() if functional else discriminator.installed(state.discriminator):
            gradient, (_, buffers_d) = gradient_of(
                lambda theta: self.discriminator_loss(
                    theta, state.buffers_discriminator, played, record, real, fake, weights, divisor, functional
                ),
                state.discriminator,
                functional,
            )
        if push is not None:
            gradient = {name: g + push[name] for name, g in gradient.items()}
        parameters_d, moments_d = self.optimizer_discriminator.at(record.settings_d).update(
            state.discriminator, gradient, state.moments_discriminator, record.number_d
        )
        after = state._replace(
            discriminator=parameters_d,
            moments_discriminator=moments_d,
            buffers_generator=buffers_g,
            buffers_discriminator=buffers_d,
        )
        if not record.updates_generator:
            return after
        opponent = parameters_d if self.update == "alternating" else state.discriminator
        with nullcontext() if functional else torch.no_grad():
            played_g = {} if is_shared(record) else generator.iterate(state.generator, buffers_g)
            played_d = discriminator.iterate(opponent, buffers_d)
        with nullcontext() if functional else self.installed(state.generator, opponent):
            gradient, (buffers_g, buffers_d) = gradient_of(
                lambda theta: self.generator_loss(
                    theta, opponent, {**buffers_g, **played_g}, {**buffers_d, **played_d}, record
                ),
                state.generator,
                functional,
            )
        parameters_g, moments_g = self.optimizer_generator.at(record.settings_g).update(
            state.generator, gradient, state.moments_generator, record.number_g
        )
        return after._replace(
            generator=parameters_g,
            moments_generator=moments_g,
            average=self._averaged(state.average, parameters_g),
            buffers_generator=buffers_g,
            buffers_discriminator=buffers_d,
        )

    def run(self, function: Callable, state: TrainingState, record: StepRecord, real: Tensor, *others):
        """Return ``function(self, state, record, real, *others)``; a step that is compiled compiles it too."""
        return function(self, state, record, real, *others)

    @property
    def plain(self) -> TrainingStep:
        """The step whose operations are called one by one."""
        return self

    @contextmanager
    def installed(self, theta_g: Tensors, theta_d: Tensors) -> Iterator[None]:
        """Hold parameters in both networks for the generator's backward pass; see `Network.installed`."""
        with self.players[0].installed(theta_g), self.players[1].installed(theta_d, trained=False):
            yield

    def generate(self, theta: Tensors, buffers: Tensors, record: StepRecord) -> tuple[Tensor, Tensors]:
        """Return the samples of the discriminator's update in training mode, and the buffers afterwards."""
        generator = self.players[0]
        buffers = {**buffers, **generator.iterate(theta, buffers)}
        return generator(theta, buffers, _inputs(record.latents_d, record.labels_d), record.seed)

    def iterated(self, theta: Tensors, buffers: Tensors, record: StepRecord) -> list[Tensors]:
        """Return the vectors of the discriminator's spectral norms in each of its calls in its own update."""
        played: list[Tensors] = []
        for _ in range(3 if self._interpolates(record) else 2):
            played.append(self.players[1].iterate(theta, {**buffers, **(played[-1] if played else {})}))
        return played

    def discriminator_loss(
        self,
        theta: Tensors,
        buffers: Tensors,
        played: list[Tensors],
        record: StepRecord,
        real: Tensor,
        fake: Tensor,
        weights: Tensor | None = None,
        divisor: Tensor | float | None = None,
        functional: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensors]]:
        """Return the discriminator's loss; beside it the real instances' unweighted terms and the buffers afterwards.

        Parameters
        ----------
        theta, buffers : dict of str to Tensor
            The discriminator's.
        played : list of dict of str to Tensor
            From `iterated`.
        record, real, weights, divisor, functional
            As in a call of the step.
        fake : Tensor of shape (batch_size, *sample_shape)
            Generated samples.
        """
        terms, buffers = self._real_terms(
            theta, {**buffers, **played[0]}, real, record.labels, record, functional=functional
        )
        on_fake, buffers = self._loss_on_fake(theta, buffers, played, fake, record)
        if self._interpolates(record):
            extra, buffers = self._interpolated_terms(
                theta, {**buffers, **played[-1]}, real, fake, record.labels, record, functional=functional
            )
            terms = terms + extra
        weighted = terms if weights is None else weights * terms
        loss = weighted.sum() / (len(terms) if divisor is None else divisor) + on_fake
        return loss, (terms, buffers)

    def instance_terms(
        self,
        theta: Tensors,
        buffers: Tensors,
        played: list[Tensors],
        record: StepRecord,
        samples: Tensor,
        labels: Tensor | None,
        fake: Tensor,
        functional: bool = False,
    ) -> Tensor:
        """Return the terms that other instances would have had in the step, shape (n,).

        Their points of a gradient penalty are mixed with the step's own generated samples, in turn.
        """
        terms, buffers = self._real_terms(theta, {**buffers, **played[0]}, samples, labels, record, functional)
        if self._interpolates(record):
            turn = torch.arange(len(samples)) % len(fake)
            mixed = replace(record, mixing=record.mixing[turn])  # type: ignore[index]
            extra, _ = self._interpolated_terms(
                theta, {**buffers, **played[-1]}, samples, fake[turn], labels, mixed, functional
            )
            terms = terms + extra
        return terms

    def generator_loss(
        self,
        theta: Tensors,
        discriminator: Tensors,
        buffers_generator: Tensors,
        buffers_discriminator: Tensors,
        record: StepRecord,
    ) -> tuple[Tensor, tuple[Tensors, Tensors]]:
        """Return the generator's loss against given discriminator parameters, and both networks' buffers afterwards."""
        # Where both updates look at the same samples, the generator is called once: with the same randomness, and its
        # buffers change once.
        seed = record.seed if is_shared(record) else record.seed + 3
        inputs = _inputs(record.latents_g, record.labels_g)
        fake, changed = self.players[0](theta, buffers_generator, inputs, seed)
        output, buffers_discriminator = self._judge(
            discriminator, buffers_discriminator, fake, record.labels_g, record.seed + 4
        )
        after = buffers_generator if is_shared(record) else changed
        return self._generator_terms(fake, output).mean(), (after, buffers_discriminator)

    def sample(self, theta: Tensors, buffers: Tensors, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the generator's samples in evaluation mode: what metrics look at."""
        return self.players[0].evaluate(theta, buffers, _inputs(latents, labels))

    def judge(self, theta: Tensors, buffers: Tensors, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the discriminator's outputs as a vector in evaluation mode."""
        return one_number_per_sample(self.players[1].evaluate(theta, buffers, _inputs(samples, labels)), len(samples))

    def _interpolates(self, record: StepRecord) -> bool:
        return self.penalty is not None and self.penalty.at == "interpolated" and self.penalty.is_due(record.index)

    def _judge(
        self, theta: Tensors, buffers: Tensors, samples: Tensor, labels: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensors]:
        output, buffers = self.players[1](theta, buffers, _inputs(samples, labels), seed)
        return one_number_per_sample(output, len(samples)), buffers

    def _loss_on_fake(
        self, theta: Tensors, buffers: Tensors, played: list[Tensors], fake: Tensor, record: StepRecord
    ) -> tuple[Tensor, Tensors]:
        """Return the discriminator's loss on what it is to reject, and the buffers afterwards."""
        judged, buffers = self._judge(theta, {**buffers, **played[1]}, fake, record.labels_d, record.seed + 2)
        return self.loss.fake(judged).mean(), buffers

    def _generator_terms(self, fake: Tensor, output: Tensor) -> Tensor:
        """Return the generator's loss on each of its samples, given the discriminator's output for them."""
        return self.loss.generator(output)

    def _real_terms(
        self,
        theta: Tensors,
        buffers: Tensors,
        real: Tensor,
        labels: Tensor | None,
        record: StepRecord,
        functional: bool = False,
    ) -> tuple[Tensor, Tensors]:
        penalty = self.penalty
        if penalty is None or penalty.at != "real" or not penalty.is_due(record.index):
            output, buffers = self._judge(theta, buffers, real, labels, record.seed + 1)
            return self.loss.real(output), buffers
        output, slope, buffers = self._sloped(theta, buffers, real, labels, record.seed + 1, functional)
        return self.loss.real(output) + penalty.every * penalty.terms(slope), buffers

    def _interpolated_terms(
        self,
        theta: Tensors,
        buffers: Tensors,
        real: Tensor,
        fake: Tensor,
        labels: Tensor | None,
        record: StepRecord,
        functional: bool = False,
    ) -> tuple[Tensor, Tensors]:
        assert self.penalty is not None and record.mixing is not None
        share = record.mixing.view(-1, *[1] * (real.ndim - 1))
        mixed = share * real + (1 - share) * fake
        _, slope, buffers = self._sloped(theta, buffers, mixed, labels, record.seed + 5, functional)
        return self.penalty.every * self.penalty.terms(slope), buffers

    def _sloped(
        self, theta: Tensors, buffers: Tensors, samples: Tensor, labels: Tensor | None, seed: int, functional: bool
    ) -> tuple[Tensor, Tensor, Tensors]:
        """Return the discriminator's outputs, ‖∇ₓD‖² for each sample, and the buffers afterwards."""
        if functional:
            output, pull, buffers = torch.func.vjp(  # type: ignore[misc]
                lambda x: self._judge(theta, buffers, x, labels, seed), samples, has_aux=True
            )
            slope = pull(torch.ones_like(output))[0]
        else:
            if not samples.requires_grad:
                samples = samples.detach().requires_grad_()
            output, buffers = self._judge(theta, buffers, samples, labels, seed)
            (slope,) = torch.autograd.grad(output.sum(), samples, create_graph=True)
        return output, slope.flatten(1).square().sum(1), buffers

    def _averaged(self, average: Tensors, generator: Tensors) -> Tensors:
        if self.ema_decay is None:
            return {}
        return {name: torch.lerp(generator[name], old, self.ema_decay) for name, old in average.items()}


def shifted(state: TrainingState, record: StepRecord) -> TrainingState:
    """Return the state with what was done to the buffers before the step, beside training."""
    for path, shift in record.shifts.items():
        player, name = path.split("/", 1)
        buffers = getattr(state, f"buffers_{player}")
        state = state._replace(**{f"buffers_{player}": {**buffers, name: buffers[name] + shift}})
    return state


def is_shared(record: StepRecord) -> bool:
    """Return whether both updates of a step look at the same samples, generated by one call."""
    return record.latents_g is record.latents_d


def _inputs(tensor: Tensor | None, labels: Tensor | None) -> tuple[Tensor, ...]:
    assert tensor is not None, "the record is not complete; TrainingStep.drawn completes it"
    return (tensor,) if labels is None else (tensor, labels)


def gradient_of(
    function: Callable[[Tensors], tuple[Tensor, Any]], theta: Tensors, functional: bool = False
) -> tuple[Tensors, Any]:
    """Return the gradient of a function's first result, and its second result."""
    if functional:
        return torch.func.grad(function, has_aux=True)(theta)
    params = leaves(theta)
    with torch.enable_grad():
        loss, beside = function(params)
    gradients = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return {name: g.detach() for name, g in zip(params, gradients)}, _detached(beside)


def _detached(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, dict):
        return {key: _detached(value) for key, value in tree.items()}
    return tuple(_detached(value) for value in tree)
