"""Update rules as pure functions: parameters, gradients and moments in, parameters and moments out.

They compute what the optimisers of `torch.optim` compute, but without state of their own, so that a training
step can be differentiated (theory, section 2) and replayed.
"""

from __future__ import annotations

from typing import Any

import torch

from ganclean.optim.base import Optimizer
from ganclean.optim.composite import Grouped, Projected
from ganclean.optim.rules import SGD, Adam, AdamW, Clipped, RMSprop


def resolve_optimizer(optimizer: Any, default: Optimizer) -> Optimizer:
    """Return `optimizer`, or `default` where it is None."""
    if optimizer is None:
        return default
    if isinstance(optimizer, Optimizer):
        return optimizer
    hint = (
        " Pass the rule itself, without parameters: ganclean.optim.Adam(lr=...)."
        if isinstance(optimizer, torch.optim.Optimizer)
        else ""
    )
    raise ValueError(f"optimizer must be a ganclean.optim rule such as SGD or Adam; got {optimizer!r}.{hint}")


__all__ = ["SGD", "Adam", "AdamW", "Clipped", "Grouped", "Optimizer", "Projected", "RMSprop", "resolve_optimizer"]
