"""What several evaluations of an objective have in common, and what an objective takes for a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ganclean.dynamics.randomness import put_back, random_states


class Cuts:
    """What several evaluations of an objective have in common, computed once and differentiated once.

    A central difference moves the parameters of some players. What other players return for inputs that do not depend
    on these is the same in each evaluation: each of them gets the same leaf, and when all have left their gradients in
    it, these are pulled back through the one graph that led to it.

    Parameters
    ----------
    moved : set of str
        The players that move.
    sources : sequence of Tensor
        The leaves that move.
    continues : bool, default=False
        Whether calls draw from torch's global generators, which are then left as the one call has left them.
    """

    def __init__(self, moved: set[str], sources: list[Tensor], continues: bool = False):
        self._moved, self._continues = moved, continues
        self._sources = {id(leaf) for leaf in sources}
        self._made: dict[tuple, tuple[list[Any], Any, dict[str, Tensor]]] = {}
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        # Whether several ends are in one graph.
        self.is_shared = False

    def call(self, key: tuple, player: str, inputs: Any, make: Callable[[], Any]) -> Any:
        """Return what a call of a player makes, the same for the same inputs."""
        if player in self._moved:
            return make()
        flat, _ = tree_flatten(inputs)
        known = self._made.get(key)
        if known is not None and _are_same(known[0], flat):
            if known[2]:
                put_back(known[2])
            return known[1]
        if any(isinstance(leaf, Tensor) and self.reaches(leaf) for leaf in flat):
            return make()
        with torch.enable_grad():
            result = self.cut(make())
        devices = {leaf.device for leaf in flat if isinstance(leaf, Tensor)} if self._continues else ()
        self._made[key] = flat, result, random_states(*devices) if self._continues else {}
        return result

    def cut(self, tree: Any) -> Any:
        """Return a tree whose tensors are leaves of new graphs."""
        flat, form = tree_flatten(tree)
        ends = [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.requires_grad]
        starts = {id(end): end.detach().requires_grad_() for end in ends}
        if starts:
            self._pairs.append((ends, [starts[id(end)] for end in ends]))
        return tree_unflatten([starts.get(id(leaf), leaf) for leaf in flat], form)

    @property
    def leaves(self) -> list[Tensor]:
        """The leaves that stand for what was computed once."""
        return [start for _, starts in self._pairs for start in starts]

    def reaches(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on what moves."""
        if id(tensor) in self._sources:
            return True
        seen, waiting = set(), [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in self._sources:
                return True
            waiting += [next_node for next_node, _ in node.next_functions]
        return False

    def pull(self, gradients: dict[int, Tensor], wanted: list[Tensor]) -> None:
        """Pull what has gathered in the leaves back to the leaves before them, and into `gradients` by identity."""
        while self._pairs:
            ends, starts = self._pairs.pop()
            known = [(end, gradients.pop(id(start))) for end, start in zip(ends, starts) if id(start) in gradients]
            if not known:
                continue
            into = [*wanted, *self.leaves]
            found = torch.autograd.grad(
                [end for end, _ in known], into, [g for _, g in known], allow_unused=True, retain_graph=self.is_shared
            )
            add(gradients, into, found)


def add(gradients: dict[int, Tensor], leaves: list[Tensor], found: Any) -> None:
    """Add gradients in leaves to what is known of them, by identity."""
    for leaf, gradient in zip(leaves, found):
        if gradient is not None:
            gradient = gradient.detach()
            gradients[id(leaf)] = gradients[id(leaf)] + gradient if id(leaf) in gradients else gradient


STOPPING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class CentreNeeded(Exception):
    """An objective takes for a constant what depends on the parameters that move."""


class Stops(TorchFunctionMode):
    """Reads `detach`, `data` and `no_grad` in an objective as they are meant: as constants of the update's gradient.

    The gradient that trains takes a detached tensor for a constant. The derivative of training does not: what was
    detached is a function of the state like all else. Where it does not depend on what moves, such as generated samples
    in the discriminator's update, nothing needs to be stopped. Where it does, such as the target of a consistency term,
    it is computed where nothing is moved (`centre`), and that value stands in its place in each evaluation.

    Parameters
    ----------
    cuts : Cuts
    """

    def __init__(self, cuts: Cuts):
        super().__init__()
        self._cuts = cuts
        self._kept: list[Tensor | None] | None = None
        self._number, self._in_centre, self._enabled = 0, False, True

    @contextmanager
    def centre(self) -> Iterator[None]:
        """Evaluate the objective inside, where nothing is moved, and keep what it stops."""
        self._kept, self._in_centre, self._number, self._enabled = [], True, 0, True
        self._cuts.is_shared = True
        try:
            with self:
                yield
        finally:
            self._in_centre = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Evaluate the objective inside."""
        self._number, self._enabled = 0, True
        with self:
            yield

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in STOPPING:
            return self._stopped(args[0])
        if function is torch._C._set_grad_enabled:
            self._enabled = bool(args[0])
            return None
        result = function(*args, **(kwargs or {}))
        if self._enabled:
            return result
        return tree_map(lambda leaf: self._stopped(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _stopped(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if self._kept is None:
            if self._cuts.reaches(tensor):
                raise CentreNeeded
            return tensor
        if self._in_centre:
            self._kept.append(self._cuts.cut(tensor) if self._cuts.reaches(tensor) else None)
        self._number += 1
        kept = self._kept[self._number - 1]
        return tensor if kept is None else kept


def _are_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(_is_same, one, other))


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and not b.requires_grad and bool(torch.equal(a, b))
    return not isinstance(a, (Tensor, nn.Module)) and bool(a == b)
