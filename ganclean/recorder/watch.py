"""Sees one step of somebody else's training loop: which networks were called on what, and which optimisers stepped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ganclean.dynamics.randomness import random_states, seeded, stream
from ganclean.dynamics.state import Tensors
from ganclean.dynamics.step import spoken
from ganclean.exceptions import NetworkError
from ganclean.recorder.loop import Loop
from ganclean.recorder.torch_optimizers import n_updates, settings_of

DECLARE = "declare what each update minimises: Recorder(players={...}, optimizers={...}, updates=[...])"
PRECISION = (
    "The loop trains in mixed precision ({}), but a run is replayed and traced in the networks' own precision, where "
    "its numbers would be others. Train and record it in float32: without autocast and without a GradScaler."
)


@dataclass
class SeenCall:
    """One call of a network.

    Parameters
    ----------
    player : str
    number : int
        Among the player's calls in the step.
    time : int
        Among all that was seen.
    args, kwargs : tuple, dict
        Its inputs; copies where the network generates.
    training : bool
        Whether the network was in training mode.
    outputs : list of (tuple, Tensor)
        Where the network generates: the tensors that it returned, and where in what it returned they are.
    role : tuple
        Where the network judges: what its first input was, in words and with the call that generated it.
    attached, leaf : bool
        Whether a gradient could flow through what was judged into the generator, or into it alone.
    versions : tuple
        Of the network's buffers before the call.
    tracked : bool
        Whether the call left a graph.
    used : bool
        Whether a gradient has flowed through its output.
    moved_buffers : bool
    returned : str
        The type of the output.
    """

    player: str
    number: int
    time: int
    args: tuple
    kwargs: Mapping[str, Any]
    training: bool
    outputs: list[tuple[tuple, Tensor]] = field(default_factory=list)
    role: tuple = ("other",)
    attached: bool = False
    leaf: bool = False
    versions: tuple = ()
    tracked: bool = False
    used: bool = False
    moved_buffers: bool = False
    returned: str = "Tensor"

    @property
    def beside(self) -> tuple[tuple, Mapping[str, Any]]:
        """The inputs after the first one."""
        return self.args[1:], self.kwargs


@dataclass
class SeenStep:
    """One step of an optimiser.

    Parameters
    ----------
    name : str
        The update that it belongs to.
    number : int
        How often it has stepped by then.
    settings : dict
    time : int
    gradients : dict of (str, str) to Tensor
        What it was given, where that is kept.
    """

    name: str
    number: int
    settings: Mapping[str, Any]
    time: int
    gradients: dict[tuple[str, str], Tensor] = field(default_factory=dict)


class Watch:
    """What networks and optimisers are seen to do in one step.

    Parameters
    ----------
    loop : Loop
    x : Tensor
        The instances.
    seed : int, optional
        Seeds each call with a stream of its own, torch's generator being put back afterwards; by default calls draw as
        the loop lets them, and are not told apart.
    checks : bool
        Whether the step is to be looked at closely: gradients are kept, and parts of networks that are called by
        themselves are found.
    """

    def __init__(self, loop: Loop, x: Tensor, seed: int | None = None, checks: bool = False):
        self.loop, self.x, self.seed, self.checks = loop, x, seed, checks
        self.calls: list[SeenCall] = []
        self.steps: list[SeenStep] = []
        self.buffers: dict[str, Tensors] | None = None
        self.random: dict[str, Tensor] = {}
        self.leftover = self._gradients() if checks else {}
        self.inputs: tuple[Tensor, ...] = ()
        self.is_over = False
        self._time = 0
        self._inside: list[tuple[str, ExitStack]] = []

    def attach(self, stack: ExitStack) -> None:
        """Watch until the stack is closed."""
        for player, module in self.loop.modules.items():
            before = partial(self._before, player)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            if self.seed is None:
                continue
            stack.callback(module.register_forward_hook(partial(self._after, player), always_call=True).remove)
            for name, part in _parts(module) if self.checks else ():
                stack.callback(part.register_forward_pre_hook(partial(self._part, player, name)).remove)
        for name, optimizer in self.loop.optimizers.items():
            stack.callback(optimizer.register_step_pre_hook(partial(self._stepping, name)).remove)
            stack.callback(optimizer.register_step_post_hook(self._stepped).remove)
        stack.callback(self._end)

    def notes(self) -> tuple[str, ...]:
        """Return what may be why a replay fails."""
        evaluating = sorted({call.player for call in self.calls if call.used and not call.training})
        return tuple(
            f"The {spoken(player)} was called in evaluation mode, but it is replayed in training mode: call .train()."
            for player in evaluating
        )

    def note_inputs(self, module: nn.Module) -> Callable[[], None]:
        """Note what the generator, or a copy of it, is called with first; return what ends that."""
        return module.register_forward_pre_hook(lambda _, args: self._note_inputs("G", args)).remove

    def _end(self) -> None:
        self.is_over = True

    def _next_time(self) -> int:
        self._time += 1
        return self._time

    def _before(self, player: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        refuse_autocast(f"the {spoken(player)} was called")
        if self.seed is None:
            self._note_inputs(player, args)
            return
        own = self.loop.modules[player]
        if module is not own:
            raise NetworkError(
                f"The {spoken(player)} runs as several replicas (DataParallel on several devices); expected one device."
            )
        args, kwargs = _positional(module, args, kwargs)
        number = sum(call.player == player for call in self.calls)
        call = SeenCall(player, number, self._next_time(), (), _copied(kwargs), module.training)
        if player == "G":
            call.args = _copied(args)
        else:
            # What is judged is not copied, but compared at once.
            call.args = (*(a.detach() if isinstance(a, Tensor) else a for a in args[:1]), *_copied(args[1:]))
            self._look_at(call, args)
        self.calls.append(call)
        context = ExitStack()
        device = next((p.device for p in module.parameters()), None)
        context.enter_context(seeded(stream(self.seed, "seen", player, number), device))
        self._inside.append((player, context))
        call.versions = _versions(module)

    def _after(self, player: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._inside or self._inside[-1][0] != player:
            return
        self._inside.pop()[1].close()
        call = next(c for c in reversed(self.calls) if c.player == player)
        call.moved_buffers = _versions(module) != call.versions
        call.returned = type(output).__name__
        for place, tensor in _tensors_in(output):
            if player == "G":
                call.outputs.append((place, tensor.detach()))
            if tensor.requires_grad:
                call.tracked = True
                tensor.register_hook(partial(self._flowing, call))

    def _flowing(self, call: SeenCall, gradient: Tensor) -> None:
        if not self.is_over:
            call.used = True

    def _part(self, player: str, name: str, module: nn.Module, args: tuple) -> None:
        # A checkpointed part is computed anew in the backward pass.
        if not self._inside and torch._C._current_graph_task_id() == -1:
            raise NetworkError(
                f"A part of the {spoken(player)}, {name!r}, was called by itself: {player}.{name}(...), or "
                f"{player}.forward(...) in place of {player}(...). A watched network is one call from inputs to "
                f"output. Call it as a whole, or {DECLARE}."
            )

    def _stepping(self, name: str, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        params = self.loop.params_of(name)
        self._check_gradients(name, optimizer, params)
        seen = SeenStep(
            name, n_updates(optimizer) + 1, settings_of(optimizer, self.loop.rules[name]), self._next_time()
        )
        if self.checks:
            seen.gradients = self._gradients(name)
            self.random = random_states(self.loop.like.device)
        self.steps.append(seen)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # What is called after the last step of an optimiser belongs to the time between two steps.
        self.buffers = self.loop.buffers()

    def _gradients(self, name: str | None = None) -> dict[tuple[str, str], Tensor]:
        found = {}
        for update in self.loop.names if name is None else (name,):
            for player, own in self.loop.names[update]:
                gradient = self.loop.params_of(update)[f"{player}.{own}"].grad
                if gradient is not None:
                    found[player, own] = gradient.detach().clone()
        return found

    def _check_gradients(self, name: str, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> None:
        missing = [n for n, p in params.items() if p.grad is None]
        if len(missing) == len(params):
            raise NetworkError(
                f"The optimiser of the update {name!r} stepped before any gradient was there: backward() was not "
                "called on what it moves, or its gradients were set to None again."
            )
        frozen = [n for n in missing if not params[n].requires_grad or optimizer.state.get(params[n])]
        if frozen:
            raise NetworkError(
                f"The optimiser of the update {name!r} skips "
                f"{', '.join(frozen[:3])}{', …' if len(frozen) > 3 else ''}, which have no gradient, while others "
                "have one; expected all of its parameters to learn in every update. Leave frozen parameters out of "
                "the optimiser, or freeze them before the Recorder is made."
            )
        held = {id(p) for p in params.values()}
        for group in optimizer.param_groups:
            if any(p.grad is not None and id(p) not in held for p in group["params"]):
                raise NetworkError(
                    f"The optimiser of the update {name!r} moves parameters whose requires_grad was off when the "
                    "Recorder was made, while others' was on. Make the Recorder when requires_grad says what is to be "
                    "trained."
                )

    def _note_inputs(self, player: str, args: tuple) -> None:
        if player == "G" and not self.inputs:
            self.inputs = tuple(a.detach().clone() for a in args if isinstance(a, Tensor))

    def _look_at(self, call: SeenCall, args: tuple) -> None:
        """Find out what a discriminator's call is for, by the values of what it is called on."""
        samples = args[0] if args else None
        if not isinstance(samples, Tensor):
            call.role = ("nothing",)
            return
        call.attached, call.leaf = samples.grad_fn is not None, samples.grad_fn is None and samples.requires_grad
        call.role = self._role(samples)

    def _role(self, samples: Tensor) -> tuple:
        x = self.x
        n = len(x)
        if samples.shape == x.shape and torch.equal(samples, x.to(samples)):
            return ("real",)
        found = self._generated(samples)
        if found is not None:
            return ("generated", *found)
        if samples.shape[1:] == x.shape[1:] and len(samples) > n:
            if torch.equal(samples[:n], x.to(samples)):
                found = self._generated(samples[n:])
                return ("other",) if found is None else ("real+fake", *found)
            if torch.equal(samples[-n:], x.to(samples)):
                found = self._generated(samples[:-n])
                return ("other",) if found is None else ("fake+real", *found)
        return ("other",)

    def _generated(self, samples: Tensor) -> tuple[int, tuple] | None:
        """Return which call of the generator gave these samples, and where in its output: the latest."""
        found = [
            (output.data_ptr() == samples.data_ptr(), call.number, place)
            for call in self.calls
            if call.player == "G"
            for place, output in call.outputs
            if output.shape == samples.shape and torch.equal(output, samples)
        ]
        return max(found, key=lambda one: one[:2])[1:] if found else None


def refuse_autocast(what: str) -> None:
    """Raise `NetworkError` under autocast."""
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        raise NetworkError(PRECISION.format(f"{what} under torch.autocast"))


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a network that are not to be called by themselves."""
    if type(module).__name__ == "OptimizedModule":
        return
    for name, part in module.named_modules():
        # Reading a normalised weight calls what normalises it.
        if name and "parametrizations" not in name.split("."):
            yield name, part


def _positional(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return arguments by their places where keywords name places."""
    if not kwargs:
        return args, {}
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    return bound.args, bound.kwargs


def _copied(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.detach().clone()
    if isinstance(node, Mapping):
        return {key: _copied(child) for key, child in node.items()}
    if isinstance(node, (tuple, list)):
        return [_copied(child) for child in node] if isinstance(node, list) else tuple(map(_copied, node))
    return node


def _tensors_in(node: Any, place: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    if isinstance(node, Tensor):
        yield place, node
    elif isinstance(node, Mapping):
        for key, child in node.items():
            yield from _tensors_in(child, (*place, key))
    elif isinstance(node, (tuple, list)):
        for i, child in enumerate(node):
            yield from _tensors_in(child, (*place, i))


def _versions(module: nn.Module) -> tuple:
    return tuple((id(b), b._version) for b in module.buffers())
