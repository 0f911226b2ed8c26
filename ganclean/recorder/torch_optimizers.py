"""Reads the optimisers of `torch.optim`: their update rule, hyper-parameters and moments, in the form of this library.

A recorded run of somebody's own training loop is differentiated through the pure rules of `ganclean.optim`; these
functions say which rule an optimiser follows and where it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ganclean.optim import SGD, Adam, AdamW, Grouped, Optimizer, RMSprop
from ganclean.optim.base import plain
from ganclean.tensors import Tensors

RULES: dict[type[torch.optim.Optimizer], type[Optimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.RMSprop: RMSprop,
}
# What the state of an optimiser calls the moments of a rule.
_ADAM_STATE = {"mean": "exp_avg", "square": "exp_avg_sq"}
_STATE: dict[type[Optimizer], dict[str, str]] = {
    SGD: {"momentum": "momentum_buffer"},
    Adam: _ADAM_STATE,
    AdamW: _ADAM_STATE,
    RMSprop: {"square": "square_avg", "mean": "grad_avg", "momentum": "momentum_buffer"},
}
_HYPER_PARAMETERS = {rule: tuple(rule().get_params(deep=False)) for rule in RULES.values()}
# Options that the rules do not have, with the value that turns them off.
_OFF = {"amsgrad": False, "maximize": False, "dampening": 0.0}


def rule_of(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor] | None = None) -> Optimizer:
    """Return the update rule that an optimiser follows, with the hyper-parameters that it has now.

    Parameters
    ----------
    optimizer : torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW or torch.optim.RMSprop
    params : dict of str to Tensor, optional
        The parameters that it updates, by name. Where there are several parameter groups, each has a rule of its own
        then; otherwise their hyper-parameters must be equal.

    Returns
    -------
    Optimizer

    Raises
    ------
    ValueError
        If it is another optimiser, if its parameter groups differ while no names are given, or for `amsgrad`,
        `maximize` and `dampening`.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recorder.torch_optimizers import rule_of
    >>> rule_of(torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=0.9))
    SGD(lr=0.1, momentum=0.9)
    >>> a, b = torch.zeros(2), torch.zeros(2)
    >>> rule_of(torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 1.0}], lr=0.1), {"a": a, "b": b}).rules
    {('a',): SGD(lr=0.1), ('b',): SGD(lr=1.0)}
    """
    kind, groups = _read(optimizer)
    if params is None or len(groups) == 1:
        return kind(**_equal(optimizer, groups))
    names = {id(p): name for name, p in params.items()}
    rules = {}
    for i, (group, values) in enumerate(zip(optimizer.param_groups, groups)):
        own = tuple(names[id(p)] for p in group["params"] if id(p) in names)
        # A group of frozen parameters keeps its place.
        rules[own or (f"group {i} holds none",)] = kind(**values)
    return Grouped(rules)


def settings_of(optimizer: torch.optim.Optimizer, rule: Optimizer) -> dict[str, Any]:
    """Return the hyper-parameters of an optimiser that now differ from those of its rule, such as a scheduled rate.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    rule : Optimizer
        The rule that `rule_of` returned for this optimiser, clipped or not.

    Returns
    -------
    dict
        Arguments for ``rule.at``: numbers, and tuples of numbers; by the number of the group where there are several.

    Raises
    ------
    ValueError
        If `optimizer` follows another rule, or for the reasons that `rule_of` names.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recorder.torch_optimizers import rule_of, settings_of
    >>> optimizer = torch.optim.SGD([torch.zeros(2)], lr=0.1)
    >>> rule = rule_of(optimizer)
    >>> optimizer.param_groups[0]["lr"] = 0.05
    >>> settings_of(optimizer, rule)
    {'lr': 0.05}
    """
    kind, groups = _read(optimizer)
    _check_kind(optimizer, kind, rule)
    own = rule.unclipped
    if not isinstance(own, Grouped):
        return rule.changes(_equal(optimizer, groups))
    if len(own.rules) != len(groups):
        raise ValueError(
            f"The {type(optimizer).__name__} has {len(groups)} parameter groups by now; expected {len(own.rules)}, as "
            "it had when recording began. Add all groups before the first step."
        )
    changes = [one.changes(values) for one, values in zip(own.rules.values(), groups)]
    return {str(i): changed for i, changed in enumerate(changes) if changed}


def moments_of(
    optimizer: torch.optim.Optimizer, rule: Optimizer, params: Mapping[str, nn.Parameter]
) -> dict[str, Tensors]:
    """Return copies of the running moments of an optimiser, in the form that ``rule.init`` returns.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    rule : Optimizer
        The rule that `rule_of` returned for this optimiser, clipped or not.
    params : dict of str to torch.nn.Parameter
        The parameters that it updates, by name.

    Returns
    -------
    dict of str to dict of str to Tensor
        By moment and parameter name; zeros where the optimiser has not met a gradient yet.

    Raises
    ------
    ValueError
        If `optimizer` follows another rule or does not update one of the parameters.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recorder.torch_optimizers import moments_of, rule_of
    >>> p = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    >>> p.sum().backward(); optimizer.step()
    >>> moments_of(optimizer, rule_of(optimizer), {"p": p})
    {'momentum': {'p': tensor([1.])}}
    """
    _check_kind(optimizer, _kind(optimizer), rule)
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = [name for name, p in params.items() if id(p) not in updated]
    if foreign:
        raise ValueError(
            f"The {type(optimizer).__name__} does not update the parameters {foreign}. Pass them to it too, or freeze "
            "them with requires_grad_(False)."
        )
    keys = _STATE[_kinds(rule)[0]]

    def moment(p: nn.Parameter, key: str) -> Tensor:
        # Not optimizer.state[p], which would create an empty state.
        value = optimizer.state.get(p, {}).get(key)
        return torch.zeros_like(p).detach() if value is None else value.detach().clone()

    return {name: {n: moment(p, keys[name]) for n, p in params.items()} for name in rule.moment_names}


def restore_moments(
    optimizer: torch.optim.Optimizer,
    rule: Optimizer,
    params: Mapping[str, nn.Parameter],
    moments: Mapping[str, Tensors],
    updates: int,
) -> None:
    """Put the state of an optimiser back to given moments after so many updates, the inverse of `moments_of`.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    rule : Optimizer
        The rule that `rule_of` returned for this optimiser, clipped or not.
    params : dict of str to torch.nn.Parameter
    moments : dict of str to dict of str to Tensor
        As `moments_of` returned them.
    updates : int
        How many updates there were; the state is left empty where there were none.
    """
    keys = _STATE[_kinds(rule)[0]]
    for name, p in params.items():
        if not updates:
            continue
        state: dict[str, Any] = {keys[moment]: tensors[name].detach().clone() for moment, tensors in moments.items()}
        if not isinstance(optimizer, torch.optim.SGD):
            state["step"] = torch.tensor(float(updates))
        optimizer.state[p] = state


def n_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return how many updates an optimiser has done.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer

    Returns
    -------
    int
        0 before the first, and always 0 for SGD, which does not count.

    Raises
    ------
    ValueError
        If Adam or AdamW has updated some parameters more often than others, and so has no one bias correction.

    Examples
    --------
    >>> import torch
    >>> from ganclean.recorder.torch_optimizers import n_updates
    >>> p = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.Adam([p])
    >>> p.sum().backward(); optimizer.step()
    >>> n_updates(optimizer)
    1
    """
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    if len(counts) > 1 and issubclass(_kind(optimizer), Adam):
        raise ValueError(
            f"The {type(optimizer).__name__} has updated some parameters {min(counts)} and others {max(counts)} times, "
            "so that their bias corrections differ; expected one number. Give every trained parameter a gradient in "
            "every update."
        )
    return max(counts, default=0)


def torch_optimizer_of(rule: Optimizer, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimiser of `torch.optim` that follows a rule, the inverse of `rule_of`.

    Parameters
    ----------
    rule : SGD, Adam, AdamW or RMSprop
    params : iterable of Tensor
        The parameters to update.

    Returns
    -------
    torch.optim.Optimizer

    Raises
    ------
    ValueError
        If torch has no such optimiser.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import AdamW
    >>> from ganclean.recorder.torch_optimizers import torch_optimizer_of
    >>> type(torch_optimizer_of(AdamW(), [torch.zeros(2)])).__name__
    'AdamW'
    """
    for optimizer, kind in RULES.items():
        if type(rule) is kind:
            return optimizer(params, **{name: plain(value) for name, value in rule.get_params(deep=False).items()})
    raise ValueError(
        f"torch.optim has no optimiser for {rule!r}; expected SGD, Adam, AdamW or RMSprop of ganclean.optim. Call "
        "rule.update in the training loop instead."
    )


def _kind(optimizer: torch.optim.Optimizer) -> type[Optimizer]:
    kind = RULES.get(type(optimizer))
    if kind is None:
        raise ValueError(
            "A run can be differentiated through torch.optim.SGD, Adam, AdamW and RMSprop themselves; got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}. Train with one of these."
        )
    if kind is Adam and optimizer.param_groups[0].get("decoupled_weight_decay"):
        return AdamW
    return kind


def _read(optimizer: torch.optim.Optimizer) -> tuple[type[Optimizer], list[dict[str, Any]]]:
    """Return the kind of rule, and the hyper-parameters of each parameter group."""
    kind, name = _kind(optimizer), type(optimizer).__name__
    for option, off in _OFF.items():
        for group in optimizer.param_groups:
            if group.get(option, off) != off:
                raise ValueError(
                    f"A run cannot be differentiated through {name} with {option}={group[option]!r}; expected "
                    f"{option}={off!r}. Train without it."
                )
    decoupled = {bool(group.get("decoupled_weight_decay", False)) for group in optimizer.param_groups}
    if len(decoupled) > 1:
        raise ValueError(
            f"The parameter groups of the {name} differ in decoupled_weight_decay; expected the same rule for all. "
            "Give all groups the same value."
        )
    return kind, [{key: plain(group[key]) for key in _HYPER_PARAMETERS[kind]} for group in optimizer.param_groups]


def _equal(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the hyper-parameters that all groups have."""
    first, *others = groups
    for group in others:
        unequal = [key for key, value in first.items() if group[key] != value]
        if unequal:
            raise ValueError(
                f"The parameter groups of the {type(optimizer).__name__} differ in {', '.join(unequal)}; expected the "
                "same values in all groups where parameters have no names. Pass their names: rule_of(optimizer, "
                "dict(module.named_parameters()))."
            )
    return first


def _kinds(rule: Optimizer) -> list[type[Optimizer]]:
    own = rule.unclipped
    return [type(one.unclipped) for one in own.rules.values()] if isinstance(own, Grouped) else [type(own)]


def _check_kind(optimizer: torch.optim.Optimizer, kind: type[Optimizer], rule: Optimizer) -> None:
    if any(own is not kind for own in _kinds(rule)):
        raise ValueError(
            f"The {type(optimizer).__name__} follows the rule {kind.__name__}; got the rule {rule.unclipped!r}. Pass "
            "rule_of(optimizer)."
        )
