"""Everything that the next training step reads, as one pytree of tensors (theory, section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ganclean.tensors import Tensors as Tensors
from ganclean.tensors import leaves as leaves
from ganclean.tensors import ravel as ravel
from ganclean.tensors import unravel as unravel


class TrainingState(NamedTuple):
    """The state of a GAN's training between two steps.

    A cotangent (adjoint) of a state has the same form; of the buffers it holds those that derivatives flow through.

    Parameters
    ----------
    generator, discriminator : dict of str to Tensor
        The trained parameters, by their names in the module.
    moments_generator, moments_discriminator : dict of str to dict of str to Tensor
        The optimisers' running moments, by moment and by parameter name; empty for plain SGD.
    average : dict of str to Tensor
        The exponential moving average of the generator's parameters; empty where none is kept.
    buffers_generator, buffers_discriminator : dict of str to Tensor
        The modules' buffers, such as running statistics and the vectors of spectral norms.
    """

    generator: Tensors
    discriminator: Tensors
    moments_generator: dict[str, Tensors]
    moments_discriminator: dict[str, Tensors]
    average: Tensors
    buffers_generator: Tensors
    buffers_discriminator: Tensors

    @property
    def evaluated(self) -> Tensors:
        """The generator parameters that metrics look at: the average where one is kept."""
        return self.average or self.generator


def map_state(function, *states: TrainingState) -> TrainingState:
    """Apply `function` to the corresponding tensors of one or more states."""

    def apply(*leaves):
        if isinstance(leaves[0], Mapping):
            return {key: apply(*(leaf[key] for leaf in leaves)) for key in leaves[0]}
        return function(*leaves)

    return TrainingState(*(apply(*fields) for fields in zip(*states)))


def flatten_state(state: TrainingState) -> Tensors:
    """Return the tensors of a state under slash-separated paths such as ``generator/net.0.weight``."""
    return {path: tensor for field, node in zip(state._fields, state) for path, tensor in _leaves(field, node)}


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Tensor]]:
    # Not a closure that calls itself: such a cycle would keep the tensors until the garbage is collected.
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _leaves(f"{path}/{key}", child)
    else:
        yield path, node


def unflatten_state(flat: Mapping[str, Tensor]) -> TrainingState:
    """Invert `flatten_state`."""
    fields: dict[str, dict] = {field: {} for field in TrainingState._fields}
    for path, tensor in flat.items():
        field, *keys, last = path.split("/")
        node = fields[field]
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = tensor
    return TrainingState(**fields)
