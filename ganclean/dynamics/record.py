"""What one training step drew and which settings it ran with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdateRecord:
    """One update of a step, as it happened.

    Parameters
    ----------
    name : str
        Which of the step's updates it is.
    number : int, default=1
        How often its optimiser has updated by then, this time included, on which bias corrections depend.
    settings : dict
        Hyper-parameters of the optimiser where they differ from those of the rule, such as a scheduled learning rate.
    draws : dict
        What it drew, by name: ``latents``, ``labels`` that samples were made for, ``mixing`` shares of a gradient
        penalty. What the step's seed determines need not be there.
    samples_of : int, optional
        The update of the same step whose generated samples it looks at, once more.
    meets : dict of str to int
        Players that it meets as they were before this update of the step; it meets all others as they are.
    passes : tuple of str
        The order in which its passes through the networks were seen; default that of the objective.
    calls : dict of str to tuple of int
        For each player, which of its calls in the step these were.
    """

    name: str
    number: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    draws: Mapping[str, Any] = field(default_factory=dict)
    samples_of: int | None = None
    meets: Mapping[str, int] = field(default_factory=dict)
    passes: tuple[str, ...] = ()
    calls: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """What a training step drew; with the state before it, it determines the state after it.

    A step of `GANTrainer` draws all else from its seed, so that a store need not keep it; `Step.drawn` fills it in. A
    step of the user's own loop brings it along.

    Parameters
    ----------
    index : int
        The number of the step, from 0.
    indices : Tensor of shape (batch_size,), int64
        The rows of the data that were drawn.
    seed : int
        Determines whatever else is random: latents where none are given, what objectives draw, noise in the networks.
    updates : tuple of UpdateRecord
        What happened, in order.
    labels : Tensor of shape (batch_size, ...), optional
        The labels of the drawn instances. They belong to the data and are not stored.
    x : Tensor of shape (batch_size, *sample_shape), optional
        The instances themselves, where the data cannot give them again.
    shifts : dict of str to Tensor, optional
        By how much buffers were changed between the last step and this one, by ``player/name``, as sampling in training
        mode changes running statistics.
    random : dict of str to Tensor, optional
        The states of torch's random number generators at the beginning of the step, by device, where objectives
        continue them instead of drawing from `seed`.
    """

    index: int
    indices: Tensor
    seed: int
    updates: tuple[UpdateRecord, ...] = ()
    labels: Tensor | None = None
    x: Tensor | None = None
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    random: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> UpdateRecord | None:
        """Return the first update of that name, or None where there is none in this step."""
        return next((update for update in self.updates if update.name == name), None)

    @property
    def latents_d(self) -> Any:
        """The latents of the update D; None where it drew none."""
        return self._latents("D")

    @property
    def latents_g(self) -> Any:
        """The latents of the update G: the same tensor as `latents_d` where both look at the same samples."""
        return self._latents("G")

    def _latents(self, name: str) -> Any:
        update = self.of(name)
        return None if update is None else update.draws.get("latents")


def packed(records: Sequence[StepRecord]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of records under names such as ``42/indices``, and the rest as what JSON knows."""
    tensors: dict[str, Tensor] = {}
    steps = [_packed(record, str(record.index), tensors, {}) for record in records]
    return tensors, {"steps": steps}


def unpacked(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> list[StepRecord]:
    """Invert `packed`."""
    return [_unpacked(step, tensors) for step in rest["steps"]]


def mapped(record: StepRecord, function: Callable[[Tensor], Tensor]) -> StepRecord:
    """Return a record with a function of each of its tensors, but for the row numbers; one tensor stays one."""
    there: dict[int, Tensor] = {}

    def apply(node: Any) -> Any:
        if isinstance(node, Tensor):
            return there.setdefault(id(node), function(node)) if id(node) not in there else there[id(node)]
        if isinstance(node, UpdateRecord):
            return replace(node, draws=apply(node.draws))
        if isinstance(node, Mapping):
            return {key: apply(child) for key, child in node.items()}
        return type(node)(map(apply, node)) if isinstance(node, (tuple, list)) else node

    changed = {name: apply(getattr(record, name)) for name in ("updates", "labels", "x", "shifts")}
    return replace(record, **changed)


def moved(record: StepRecord, device: torch.device | str) -> StepRecord:
    """Return a record with its tensors on a device, except for the row numbers and the generators' states."""
    return mapped(record, lambda tensor: tensor.to(device))


def _packed(node: Any, path: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """Return a node as JSON knows it, its tensors under the names that stand in their place."""
    if isinstance(node, Tensor):
        name = names.setdefault(id(node), path)
        tensors[name] = node
        return {"tensor": name}
    if isinstance(node, (StepRecord, UpdateRecord)):
        given = {f.name: getattr(node, f.name) for f in fields(node)}
        kept = {name: v for name, v in given.items() if v is not None and v != () and not _is_empty(v)}
        inside = {name: _packed(v, f"{path}/{name}", tensors, names) for name, v in kept.items()}
        return {type(node).__name__: inside}
    if isinstance(node, Mapping):
        return {"dict": {key: _packed(child, f"{path}/{key}", tensors, names) for key, child in node.items()}}
    if isinstance(node, (tuple, list)):
        children = [_packed(child, f"{path}/{i}", tensors, names) for i, child in enumerate(node)]
        return {"tuple": children} if isinstance(node, tuple) else children
    return node


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _unpacked(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_unpacked(child, tensors) for child in node]
    if not isinstance(node, Mapping):
        return node
    ((kind, inside),) = node.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "tuple":
        return tuple(_unpacked(child, tensors) for child in inside)
    values = {key: _unpacked(child, tensors) for key, child in inside.items()}
    kinds = {"dict": dict, "StepRecord": StepRecord, "UpdateRecord": UpdateRecord}
    return kinds[kind](**values) if kind != "dict" else values
