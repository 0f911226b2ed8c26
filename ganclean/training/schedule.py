"""Reads learning-rate schedules of `torch.optim.lr_scheduler` update by update, so that a run can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ganclean.optim import Grouped, Optimizer

_HINT = "Pass a function of the optimiser, such as partial(torch.optim.lr_scheduler.StepLR, step_size=100)."


class _Settings(torch.optim.Optimizer):
    """Holds the hyper-parameters of a rule, where a scheduler finds and changes them, and updates nothing."""

    def __init__(self, rule: Optimizer):
        self.values = rule.get_params(deep=False)
        super().__init__([nn.Parameter(torch.zeros(()))], dict(self.values))

    def step(self, closure=None):
        return None


def scheduled_settings(
    rule: Optimizer, scheduler: Callable[[torch.optim.Optimizer], LRScheduler], n_updates: int
) -> list[dict[str, Any]]:
    """Return the hyper-parameters that a scheduler sets for each update, where they differ from those of the rule.

    Parameters
    ----------
    rule : Optimizer
        Holds the hyper-parameters to start from; where it is `Clipped`, those of the rule inside.
    scheduler : callable
        Builds a scheduler of `torch.optim.lr_scheduler` for the optimiser that it is given. The scheduler is stepped
        after every update.
    n_updates : int
        The number of updates to read.

    Returns
    -------
    list of dict
        One for each update: arguments for ``rule.at``, which are numbers and tuples of numbers.

    Raises
    ------
    ValueError
        If `scheduler` builds no such scheduler or one that needs a metric, or if it changes what the rule does not
        have.

    Examples
    --------
    >>> from functools import partial
    >>> from torch.optim.lr_scheduler import StepLR
    >>> from ganclean.optim import SGD
    >>> from ganclean.training.schedule import scheduled_settings
    >>> scheduled_settings(SGD(lr=1.0), partial(StepLR, step_size=2, gamma=0.5), n_updates=5)
    [{}, {}, {'lr': 0.5}, {'lr': 0.5}, {'lr': 0.25}]
    """
    rule = rule.unclipped
    if isinstance(rule, Grouped):
        raise ValueError(
            "scheduler drives one learning rate; a Grouped rule has several. Give each group an update of its own, or "
            "record your own loop with a Recorder, which reads every rate."
        )
    optimizer = _Settings(rule)
    built = _build(scheduler, optimizer)
    settings = []
    for update in range(n_updates):
        # Between two updates, not after the last one: a scheduler may have an end.
        if update:
            optimizer.step()
            built.step()
        group = optimizer.param_groups[0]
        changed = rule.changes({name: group[name] for name in optimizer.values})
        rule.at(changed)
        settings.append(changed)
    return settings


def _build(scheduler: Callable[[torch.optim.Optimizer], LRScheduler], optimizer: _Settings) -> LRScheduler:
    if isinstance(scheduler, LRScheduler) or not callable(scheduler):
        raise ValueError(f"scheduler must build a learning-rate scheduler for an optimiser; got {scheduler!r}. {_HINT}")
    try:
        built = scheduler(optimizer)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"scheduler={scheduler!r} could not be built on an optimiser with {', '.join(optimizer.values)}: "
            f"{error}. {_HINT}"
        ) from error
    if isinstance(built, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau waits for a metric, which is not known before training; expected a scheduler that "
            f"counts updates. {_HINT}"
        )
    if not isinstance(built, LRScheduler) or built.optimizer is not optimizer:
        raise ValueError(
            f"scheduler must return a learning-rate scheduler of the optimiser that it is given; got {built!r}. {_HINT}"
        )
    return built
