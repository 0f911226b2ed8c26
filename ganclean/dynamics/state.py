"""Everything that the next training step reads, as one pytree of tensors (theory, section 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ganclean.tensors import Tensors as Tensors
from ganclean.tensors import leaves as leaves
from ganclean.tensors import ravel as ravel
from ganclean.tensors import unravel as unravel


class TrainingState(NamedTuple):
    """The state of a training between two steps.

    A cotangent (adjoint) of a state has the same form; of the buffers it holds those that derivatives flow through.

    Parameters
    ----------
    params : dict of str to dict of str to Tensor
        The trained parameters, by player and by their names in its module.
    moments : dict of str to dict of str to dict of str to Tensor
        The optimisers' running moments, by the update that the optimiser belongs to, by moment, and by names such as
        ``G.0.weight``; empty for plain SGD.
    averages : dict of str to dict of str to Tensor
        Moving averages of parameters, and of buffers where these are averaged too, by player.
    buffers : dict of str to dict of str to Tensor
        The modules' buffers, such as running statistics and the vectors of spectral norms, by player.
    carried : dict of str to Tensor
        What objectives hand on from step to step.
    """

    params: dict[str, Tensors]
    moments: dict[str, dict[str, Tensors]]
    averages: dict[str, Tensors]
    buffers: dict[str, Tensors]
    carried: Tensors

    @property
    def generator(self) -> Tensors:
        """The trained parameters of the player G."""
        return self.params.get("G", {})

    @property
    def discriminator(self) -> Tensors:
        """The trained parameters of the player D."""
        return self.params.get("D", {})

    @property
    def average(self) -> Tensors:
        """The moving average of the player G; empty where none is kept."""
        return self.averages.get("G", {})

    @property
    def evaluated(self) -> dict[str, Tensors]:
        """The parameters that metrics look at, by player: averages where they are kept."""
        return {
            player: {name: self.averages.get(player, {}).get(name, tensor) for name, tensor in params.items()}
            for player, params in self.params.items()
        }

    @property
    def evaluated_buffers(self) -> dict[str, Tensors]:
        """The buffers that metrics look at, by player: averages where they are kept."""
        return {
            player: {name: self.averages.get(player, {}).get(name, tensor) for name, tensor in buffers.items()}
            for player, buffers in self.buffers.items()
        }

    def module_values(self, player: str) -> Tensors:
        """Return the parameters and buffers of a player as metrics look at them, by name."""
        return {**self.evaluated_buffers.get(player, {}), **self.evaluated.get(player, {})}


def map_state(function, *states: TrainingState) -> TrainingState:
    """Apply `function` to the corresponding tensors of one or more states."""

    def apply(*nodes):
        if isinstance(nodes[0], Mapping):
            return {key: apply(*(node[key] for node in nodes)) for key in nodes[0]}
        return function(*nodes)

    return TrainingState(*(apply(*fields) for fields in zip(*states)))


def flatten_state(state: TrainingState) -> Tensors:
    """Return the tensors of a state under slash-separated paths such as ``params/G/net.0.weight``."""
    return {path: tensor for field, node in zip(state._fields, state) for path, tensor in _leaves(field, node)}


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Tensor]]:
    # Not a closure that calls itself: such a cycle would keep the tensors until the garbage is collected.
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _leaves(f"{path}/{key}", child)
    else:
        yield path, node


def empty_parts(state: TrainingState) -> list[str]:
    """Return the paths of parts that hold no tensor, such as the buffers of a player that has none."""
    return [path for field, node in zip(state._fields, state) for path in _empty(field, node)]


def _empty(path: str, node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if not node:
            yield path
        for key, child in node.items():
            yield from _empty(f"{path}/{key}", child)


def unflatten_state(flat: Mapping[str, Tensor], empty: Iterable[str] = ()) -> TrainingState:
    """Invert `flatten_state`, given the parts that hold no tensor."""
    fields: dict[str, dict] = {field: {} for field in TrainingState._fields}
    for path, value in [*flat.items(), *((path, {}) for path in empty)]:
        *keys, last = path.split("/")
        node: Any = fields
        for key in keys:
            node = node.setdefault(key, {})
        node.setdefault(last, value)
    return TrainingState(**fields)
