"""Reads the optimisers of `torch.optim`: their update rule, hyper-parameters and moments, in the form of this library.

A recorded run of somebody's own training loop is differentiated through the pure rules of `ganclean.optim`; these
functions say which rule an optimiser follows and where it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ganclean.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from ganclean.training.state import Tensors

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


def rule_of(optimizer: torch.optim.Optimizer) -> Optimizer:
    """Return the update rule that an optimiser follows, with the hyper-parameters that it has now.

    Parameters
    ----------
    optimizer : torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW or torch.optim.RMSprop
        Its parameter groups must have equal hyper-parameters.

    Returns
    -------
    Optimizer

    Raises
    ------
    ValueError
        If it is another optimiser, if its parameter groups differ, or for `amsgrad`, `maximize` and `dampening`.

    Examples
    --------
    >>> import torch
    >>> from ganclean.training.torch_optimizers import rule_of
    >>> rule_of(torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=0.9))
    SGD(lr=0.1, momentum=0.9)
    """
    kind, values = _read(optimizer)
    return kind(**values)


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
        Arguments for ``rule.at``: numbers, and tuples of numbers.

    Raises
    ------
    ValueError
        If `optimizer` follows another rule, or for the reasons that `rule_of` names.

    Examples
    --------
    >>> import torch
    >>> from ganclean.training.torch_optimizers import rule_of, settings_of
    >>> optimizer = torch.optim.SGD([torch.zeros(2)], lr=0.1)
    >>> rule = rule_of(optimizer)
    >>> optimizer.param_groups[0]["lr"] = 0.05
    >>> settings_of(optimizer, rule)
    {'lr': 0.05}
    """
    kind, values = _read(optimizer)
    _check_kind(optimizer, kind, rule)
    return differing(values, rule)


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
    >>> from ganclean.training.torch_optimizers import moments_of, rule_of
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
    keys = _STATE[type(rule.unclipped)]

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
    keys = _STATE[type(rule.unclipped)]
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
    >>> from ganclean.training.torch_optimizers import n_updates
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
    >>> from ganclean.training.torch_optimizers import torch_optimizer_of
    >>> type(torch_optimizer_of(AdamW(), [torch.zeros(2)])).__name__
    'AdamW'
    """
    for optimizer, kind in RULES.items():
        if type(rule) is kind:
            return optimizer(params, **{name: _plain(value) for name, value in rule.get_params(deep=False).items()})
    raise ValueError(
        f"torch.optim has no optimiser for {rule!r}; expected SGD, Adam, AdamW or RMSprop of ganclean.optim. Call "
        "rule.update in the training loop instead."
    )


def differing(values: Mapping[str, Any], rule: Optimizer) -> dict[str, Any]:
    """Return those hyper-parameters that differ from the ones of a rule, as plain numbers and tuples."""
    reference = rule.unclipped
    plain = {name: _plain(value) for name, value in values.items()}
    return {name: value for name, value in plain.items() if value != _plain(getattr(reference, name))}


def _plain(value: Any) -> Any:
    """Return a hyper-parameter as a float or a tuple of floats where it consists of numbers, also of tensors."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(entry) for entry in value)
    return float(value) if isinstance(value, (Real, Tensor)) and not isinstance(value, bool) else value


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


def _read(optimizer: torch.optim.Optimizer) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the kind of rule and its hyper-parameters, after checking that all parameter groups have them."""
    kind, name = _kind(optimizer), type(optimizer).__name__
    first, *others = optimizer.param_groups
    for option, off in _OFF.items():
        for group in optimizer.param_groups:
            if group.get(option, off) != off:
                raise ValueError(
                    f"A run cannot be differentiated through {name} with {option}={group[option]!r}; expected "
                    f"{option}={off!r}. Train without it."
                )
    values = {key: _plain(first[key]) for key in _HYPER_PARAMETERS[kind]}
    for group in others:
        unequal = [key for key, value in values.items() if _plain(group[key]) != value]
        if group.get("decoupled_weight_decay", False) != first.get("decoupled_weight_decay", False):
            unequal.append("decoupled_weight_decay")
        if unequal:
            raise ValueError(
                f"The parameter groups of the {name} differ in {', '.join(unequal)}; expected the same rule for all "
                "parameters of a network. Give all groups the same values."
            )
    return kind, values


def _check_kind(optimizer: torch.optim.Optimizer, kind: type[Optimizer], rule: Optimizer) -> None:
    if type(rule.unclipped) is not kind:
        raise ValueError(
            f"The {type(optimizer).__name__} follows the rule {kind.__name__}; got the rule {rule.unclipped!r}. Pass "
            "rule_of(optimizer)."
        )
