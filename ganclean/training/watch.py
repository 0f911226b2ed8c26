"""Watches one step of somebody else's training loop: which network was called on what, and which was updated."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ganclean.exceptions import NetworkError, ReplayMismatchError
from ganclean.optim import Optimizer
from ganclean.training.network import seeded
from ganclean.training.record import StepRecord
from ganclean.training.torch_optimizers import n_updates, settings_of

# What each call's randomness is seeded with, beside the seed of the step: as TrainingStep does.
SEEDS = {"real": 1, "fake": 2, "interpolated": 5, "generator": 4}


@dataclass
class Watch:
    """What the networks and optimisers are seen to do in one step.

    While it is attached, each call of a network is seeded as in `TrainingStep`, and torch's generator put back
    afterwards.
    """

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    rules: Mapping[str, Optimizer]
    x: Tensor
    seed: int
    interpolates: bool
    made: list[tuple[Tensor, ...]] = field(default_factory=list)
    fakes: list[Tensor] = field(default_factory=list)
    judged: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    _call: ExitStack = field(default_factory=ExitStack)

    def attach(self, stack: ExitStack) -> None:
        """Watch until the stack is closed."""
        for player, module in self.modules.items():
            before = partial(self._before, player)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(partial(self._after, player), always_call=True).remove)
        for player, optimizer in self.optimizers.items():
            stack.callback(optimizer.register_step_pre_hook(partial(self._updating, player)).remove)

    def _before(self, player: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if player == "generator":
            if len(self.made) == 2:
                raise NetworkError(
                    "The generator was called three times in one step; expected one call for both updates, or one for "
                    "each. Sample outside of recorder.step."
                )
            offset = 3 if self.made else 0
            self.made.append(tuple(value.detach().clone() for value in inputs))
        else:
            role = self._role(inputs[0])
            if role in self.judged:
                raise NetworkError(
                    f"The discriminator was called twice on the {role} samples of one step; expected once. Evaluate it "
                    "outside of recorder.step, and let each step update it once."
                )
            self.judged[role] = tuple(value.detach() for value in inputs)
            self.order.append(role)
            offset = SEEDS[role]
        self._call.enter_context(seeded(self.seed + offset, inputs[0].device))

    def _after(self, player: str, module: nn.Module, args: tuple, output: Any) -> None:
        self._call.close()
        if player == "generator" and isinstance(output, Tensor):
            self.fakes.append(output.detach())

    def _updating(self, player: str, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if player in self.numbers:
            raise NetworkError(f"The {player} was updated twice in one step. Put each update into a step of its own.")
        self.numbers[player] = n_updates(optimizer) + 1
        self.settings[player] = settings_of(optimizer, self.rules[player])
        self.order.append(f"update of the {player}")

    def _role(self, samples: Tensor) -> str:
        """Return what a call of the discriminator is for."""
        pointers = [fake.data_ptr() for fake in self.fakes]
        if samples.data_ptr() in pointers:
            if "discriminator" in self.numbers or "fake" in self.judged:
                return "generator"
            return "fake"
        if samples.shape == self.x.shape and torch.equal(samples, self.x.to(samples)):
            return "real"
        if self.interpolates and samples.shape == self.x.shape:
            return "interpolated"
        raise NetworkError(
            f"The discriminator was called on samples of shape {tuple(samples.shape)} that are neither the x of the "
            "step nor what the generator returned in it. Real and generated samples are to be judged in calls of their "
            "own, as they are; augmentation belongs into the discriminator: torch.nn.Sequential(DiffAugment(), "
            "discriminator). A gradient penalty is to be declared: Recorder(penalty=GradientPenalty())."
        )

    def completed(self, record: StepRecord, update: str, given: Mapping[str, Tensor | None]) -> StepRecord:
        """Return the record of the step with all that was seen, after checking that it is a step as declared."""
        self._check(update)
        updates_generator = "generator" in self.numbers
        (latents_d, *labels_d), *second = self.made
        latents_g, labels_g = (latents_d, labels_d) if updates_generator else (None, [])
        if updates_generator and second:
            latents_g, *labels_g = second[0]
        for player, seen in (("d", latents_d), ("g", latents_g)):
            z = given[player]
            if z is not None and (seen is None or z.shape != seen.shape or not torch.equal(z.to(seen), seen)):
                raise ReplayMismatchError(
                    f"z_{player} of step {record.index} is not what the generator was called with. Leave it out: the "
                    "recorder sees the latents itself."
                )
        return replace(
            record,
            latents_d=latents_d,
            latents_g=latents_g,
            labels=record.labels if self.judged["real"][1:] == () else self.judged["real"][1],
            labels_d=labels_d[0] if labels_d else None,
            labels_g=labels_g[0] if labels_g else None,
            mixing=self._mixing() if "interpolated" in self.judged else None,
            updates_generator=updates_generator,
            number_d=self.numbers["discriminator"],
            number_g=self.numbers.get("generator", 0),
            settings_d=self.settings["discriminator"],
            settings_g=self.settings.get("generator", {}),
        )

    def _check(self, update: str) -> None:
        """Raise where the step is not one update of the discriminator and at most one of the generator."""
        missing = [role for role in ("real", "fake") if role not in self.judged]
        if (
            missing
            or "discriminator" not in self.numbers
            or ("generator" in self.numbers) != ("generator" in self.judged)
        ):
            raise NetworkError(
                "A step must judge real and generated samples once and update the discriminator; and where it updates "
                f"the generator, judge generated samples for that. This one did: {', '.join(self.order) or 'nothing'}."
            )
        if "generator" in self.judged:
            late = self.order.index("generator") > self.order.index("update of the discriminator")
            if late != (update == "alternating"):
                raise NetworkError(
                    f"The loop's updates are {'alternating' if late else 'simultaneous'}: the generator met the "
                    f"discriminator {'after' if late else 'before'} its update. Pass it to the Recorder: "
                    f"update={'alternating' if late else 'simultaneous'!r}."
                )

    def _mixing(self) -> Tensor:
        """Return the shares of the real instances in the samples that a gradient penalty was taken at."""
        mixed, fake = self.judged["interpolated"][0].flatten(1).double(), self.fakes[0].flatten(1).double()
        apart = self.x.to(fake).flatten(1) - fake
        return ((mixed - fake) * apart).sum(1).div(apart.square().sum(1)).to(self.fakes[0].dtype)
