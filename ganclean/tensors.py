"""Tensors by name, such as a network's parameters, and the same numbers as one vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Key = TypeVar("Key")


def leaves(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the tensors as leaves of new graphs, to be differentiated in."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def ravel(tensors: Mapping[str, Tensor]) -> Tensor:
    """Concatenate the tensors of a dict into one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unravel(vector: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """Split a vector into views with the names and shapes of `like`."""
    pieces = vector.split([math.prod(tensor.shape) for tensor in like.values()])
    return {name: piece.view(tensor.shape) for (name, tensor), piece in zip(like.items(), pieces)}
