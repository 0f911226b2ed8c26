"""A user's training loop as it is at the moment: its networks, optimisers and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ganclean.dynamics.network import assign
from ganclean.dynamics.state import Tensors, TrainingState
from ganclean.dynamics.step import spoken
from ganclean.dynamics.update import Average
from ganclean.exceptions import NetworkError, ReplayMismatchError
from ganclean.optim import Clipped, Grouped, Optimizer
from ganclean.recorder.torch_optimizers import moments_of, restore_moments, rule_of

Pair = tuple[str, str]
Marks = dict[str, Any]


class Loop:
    """The networks, optimisers and averages of a training loop.

    Parameters
    ----------
    modules : dict of str to torch.nn.Module
        By player.
    optimizers : dict of str to torch.optim.Optimizer
        By the name of the update that each belongs to.
    averages : dict of str to tuple of (torch.nn.Module, Average)
        The averaged networks, by player.
    carried : callable or dict
        What objectives carry from step to step, as the loop has it: a dict that is read whenever it is needed, or a
        function that returns one.
    clip_norm, clip_value : float, optional
        As of `Recorder`.

    Attributes
    ----------
    names : dict of str to tuple of (str, str)
        By update, which parameters its optimiser moves: pairs of a player and a name in its module.
    rules : dict of str to Optimizer
        By update; read by `read_rules`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        averages: Mapping[str, tuple[nn.Module, Average]],
        carried: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        clip_norm: float | None = None,
        clip_value: float | None = None,
    ):
        self.modules = {player: unwrapped(player, module) for player, module in modules.items()}
        self.optimizers = dict(optimizers)
        self.averages = {p: (unwrapped(p, module), average) for p, (module, average) in averages.items()}
        self._carried, self._clip = carried, (clip_norm, clip_value)
        # Looking for parameters by name takes longer than small networks do.
        self._parameters = {
            f"{p}.{name}": q for p, module in self.modules.items() for name, q in module.named_parameters()
        }
        self._marked = dict(self._parameters)
        for player, (module, _) in self.averages.items():
            own = dict(module.named_parameters())
            expected = [name for name, _ in self.modules[player].named_parameters()] if player in modules else [""]
            missing = [name for name in expected if name not in own]
            if missing:
                raise ValueError(
                    f"The average of the {spoken(player)} has other parameters than a network of the loop has "
                    f"({player}.{missing[0]}); expected a copy of it, copy.deepcopy(network)."
                )
            self._marked |= {f"average of {player}.{name}": q for name, q in own.items()}
        self.names = {name: self._names_in(name, optimizer) for name, optimizer in self.optimizers.items()}
        self._held = {
            update: {f"{player}.{name}": self._parameters[f"{player}.{name}"] for player, name in of_update}
            for update, of_update in self.names.items()
        }
        self.rules: dict[str, Optimizer] = {}
        pairs = {pair for of_update in self.names.values() for pair in of_update}
        self.trained = {
            player: tuple(name for name, _ in module.named_parameters() if (player, name) in pairs)
            for player, module in self.modules.items()
        }

    def _names_in(self, update: str, optimizer: torch.optim.Optimizer) -> tuple[Pair, ...]:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"The update {update!r} needs an optimiser of torch.optim; got {optimizer!r}.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        found: dict[Pair, nn.Parameter] = {}
        for player, module in self.modules.items():
            own = {name: p for name, p in module.named_parameters() if id(p) in held}
            # A network that rests at the moment has all of them switched off; those that never learn are some.
            learning = {name: p for name, p in own.items() if p.requires_grad} or own
            found |= {(player, name): p for name, p in learning.items()}
            held -= {id(p) for p in own.values()}
        if held:
            raise ValueError(
                f"The optimiser of the update {update!r} moves {len(held)} parameters that are in none of the networks "
                f"{list(self.modules)}. Name all networks and what they are trained on: Recorder(players={{...}}, "
                "optimizers={...}, updates=[...])."
            )
        if not found:
            raise NetworkError(f"The optimiser of the update {update!r} moves no parameter of the networks.")
        return tuple(found)

    def params_of(self, update: str) -> dict[str, nn.Parameter]:
        """Return what the optimiser of an update moves, under names such as ``G.0.weight``."""
        return self._held[update]

    def read_rules(self) -> None:
        """Read the optimisers' rules, with the hyper-parameters that they have now."""
        for name, optimizer in self.optimizers.items():
            self.rules[name] = self._clipped(rule_of(optimizer, self.params_of(name)))

    def _clipped(self, rule: Optimizer) -> Optimizer:
        norm, value = self._clip
        if norm is None and value is None:
            return rule
        if not isinstance(rule, Grouped):
            return Clipped(rule, norm, value)
        if norm is not None:
            raise ValueError(
                "clip_norm bounds the gradient of a whole network, which several parameter groups with rules of their "
                "own do not share here. Clip entries (clip_value), or give the optimiser one group."
            )
        return Grouped({key: Clipped(one, None, value) for key, one in rule.rules.items()})

    @property
    def carried(self) -> dict[str, Tensor]:
        """What objectives carry, as the loop has it now."""
        given = self._carried() if callable(self._carried) else self._carried
        return {name: torch.as_tensor(value).detach().clone().to(self.like) for name, value in given.items()}

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device of the networks."""
        return next(iter(self._parameters.values())).detach().new_empty(0)

    def buffers(self) -> dict[str, Tensors]:
        """Return copies of all buffers."""
        return {player: _copies(module.named_buffers()) for player, module in self.modules.items()}

    def state(self, buffers: dict[str, Tensors] | None = None) -> TrainingState:
        """Return copies of everything that the next step reads.

        Parameters
        ----------
        buffers : dict, optional
            Those of another moment.
        """
        params = {
            player: _copies((name, self._parameters[f"{player}.{name}"]) for name in self.trained[player])
            for player in self.modules
        }
        buffers = self.buffers() if buffers is None else buffers
        moments = {
            name: moments_of(optimizer, self.rules[name], self.params_of(name))
            for name, optimizer in self.optimizers.items()
        }
        averages = {}
        for player, (module, average) in self.averages.items():
            held = dict(module.named_parameters()) | dict(module.named_buffers())
            names = [*params[player], *(() if average.buffers == "live" else buffers[player])]
            averages[player] = _copies((name, held[name]) for name in names)
        return TrainingState(params, moments, averages, buffers, self.carried)

    def restore(self, state: TrainingState, numbers: Mapping[str, int]) -> None:
        """Put networks, averages and optimisers back to a state after so many updates of each optimiser."""
        for player, module in self.modules.items():
            assign(module, state.params[player] | state.buffers[player])
        for name, optimizer in self.optimizers.items():
            moments = state.moments[name]
            restore_moments(optimizer, self.rules[name], self.params_of(name), moments, numbers.get(name, 0))
        for player, (module, _) in self.averages.items():
            assign(module, state.averages[player])
        self.carry(state.carried)

    def carry(self, values: Mapping[str, Tensor]) -> None:
        """Hand on what objectives carry, where the loop keeps it in a dict."""
        if isinstance(self._carried, dict):
            self._carried.update({name: value.clone() for name, value in values.items()})

    def shifts(self, left: Mapping[str, Tensors]) -> dict[str, Tensor]:
        """Return by how much buffers are no longer what they were, as sampling in training mode changes them."""
        found = {}
        for player, tensors in left.items():
            for name, buffer in self.modules[player].named_buffers():
                if not torch.equal(buffer, tensors[name]):
                    found[f"{player}/{name}"] = buffer.detach() - tensors[name]
        return found

    def marks(self) -> Marks:
        """Return what changes when somebody changes a parameter, an average or a moment."""
        device = self.like.device
        # Not their versions alone, of which ``p.data.clamp_()`` knows nothing.
        with torch.no_grad():
            norms = torch._foreach_norm(list(self._marked.values()))
            found: Marks = dict(zip(self._marked, torch.stack([n.to(device, torch.float64) for n in norms]).tolist()))
        for update, optimizer in self.optimizers.items():
            for name, p in self.params_of(update).items():
                held = optimizer.state.get(p, {})
                found[f"the optimiser's moments of {name}"] = tuple(
                    (key, id(t), t._version) for key, t in held.items() if isinstance(t, Tensor)
                )
        return found

    def check_untouched(self, before: Marks, now: Marks, index: int) -> None:
        """Raise `ReplayMismatchError` where somebody changed what a step starts from since the last one ended."""
        changed = differing(before, now)
        if not changed:
            return
        name = changed[0]
        of_average = name.startswith("average")
        if of_average:
            advice = "Update the average inside the block."
        elif name.startswith("the optimiser"):
            advice = "Leave the optimisers' states alone, or record the part of the run after the change by itself."
        else:
            advice = (
                "Put what changes parameters into the block. A projection after the optimiser's step, such as weight "
                "clipping, is declared: after=lambda params: {n: p.clamp(-c, c) for n, p in params.items()}. A further "
                "optimiser belongs into optimizers={...}, with its objective in updates=[...]."
            )
        raise ReplayMismatchError(
            f"Between step {index - 1} and step {index}, outside of recorder.step, {len(changed)} tensors were "
            f"changed: {', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}. What happens there is not "
            f"replayed. {advice}"
        )

    def check_resting(self, before: Marks, now: Marks, moved: Iterable[Pair], index: int) -> None:
        """Raise `ReplayMismatchError` where parameters that no seen update moves were changed inside a step."""
        own = {f"{player}.{name}" for player, name in moved}
        changed = [name for name in differing(before, now) if name in self._parameters and name not in own]
        if changed:
            raise ReplayMismatchError(
                f"In step {index}, {', '.join(changed[:3])}{', …' if len(changed) > 3 else ''} changed, though none "
                "of the optimisers that stepped moves them: something else does, such as a further optimiser. Declare "
                "it: Recorder(players=..., optimizers=..., updates=[...])."
            )


def differing(one: Marks, other: Marks) -> list[str]:
    """Return the names of marks that are not equal; NaN counts as itself."""
    return [n for n, mark in other.items() if n in one and mark != one[n] and not (mark != mark and one[n] != one[n])]


def unwrapped(player: str, module: nn.Module) -> nn.Module:
    """Return the module that a wrapper for several devices holds, where there is one device."""
    if isinstance(module, AveragedModel):
        return unwrapped(player, module.module)
    if not isinstance(module, (DataParallel, DistributedDataParallel)):
        return module
    n = len(module.device_ids or ())
    if isinstance(module, DistributedDataParallel):
        n = max(n, torch.distributed.get_world_size(module.process_group))
    if n > 1:
        raise NetworkError(
            f"The {spoken(player)} is trained on {n} devices at once ({type(module).__name__}); expected one. Record "
            "the run on one device, or declare each device's share of the batch as a slice: Update(..., micro=n)."
        )
    return module.module


def _copies(tensors: Iterable[tuple[str, Tensor]]) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors}
