"""Rules made of rules: one for each group of parameters, and a projection after a rule."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ganclean.optim.base import Optimizer, Wrapping
from ganclean.tensors import Tensors, ravel, unravel


class Grouped(Optimizer):
    """Several rules for the parameters of one update, as the parameter groups of an optimiser of `torch.optim`.

    Parameters
    ----------
    rules : dict of str or tuple of str to Optimizer
        The rule of each group. A group is named by a part of the network, ``"G.mapping"``, by a pattern with ``*``, or
        by several of these; the first that fits takes a parameter.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import SGD, Grouped
    >>> rule = Grouped({"G.mapping": SGD(lr=0.01), "*": SGD(lr=1.0)})
    >>> params = {"G.mapping.bias": torch.ones(1), "G.last.bias": torch.ones(1)}
    >>> {name: float(p) for name, p in rule.update(params, params, rule.init(params), step=1)[0].items()}
    {'G.mapping.bias': 0.9900000095367432, 'G.last.bias': 0.0}
    """

    def __init__(self, rules):
        self.rules = rules

    def get_params(self, deep=True):
        params = {"rules": self.rules}
        if deep:
            for i, rule in enumerate(self.rules.values()):
                params |= {f"{i}__{name}": value for name, value in rule.get_params().items()}
        return params

    @property
    def moment_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(name for rule in self.rules.values() for name in rule.moment_names))

    def init(self, params):
        """Return the moments before the first step.

        Raises
        ------
        ValueError
            If no rules are given, one is no rule, or a parameter is in no group.
        """
        if not isinstance(self.rules, Mapping) or not self.rules:
            raise ValueError(f"Grouped needs a dict from groups to rules; got {self.rules!r}.")
        for rule in self.rules.values():
            if not isinstance(rule, Optimizer):
                raise ValueError(f"Grouped needs rules of ganclean.optim such as SGD or Adam; got {rule!r}.")
        return self._merged([rule.init(part) for rule, part in self._parts(params)])

    def at(self, settings):
        """Return the rules with other hyper-parameters: a dict for each group that changes, by its number as a str."""
        if not settings:
            return self
        rules = {key: rule.at(settings.get(str(i), {})) for i, (key, rule) in enumerate(self.rules.items())}
        return Grouped(rules)

    def decay_in_gradient(self, name):
        return self._rule_for(name)[1].decay_in_gradient(name)

    def update(self, params, grads, moments, step):
        done = [
            rule.update(part, {n: grads[n] for n in part}, self._moments_of(rule, part, moments), step)
            for rule, part in self._parts(params)
        ]
        new = {name: p for part, _ in done for name, p in part.items()}
        return {name: new[name] for name in params}, self._merged([moments for _, moments in done])

    def pullback(self, params, before, after, step, gradient=None):
        evaluated: Tensors = {}

        def once() -> Tensors:
            if not evaluated and gradient is not None:
                evaluated.update(gradient())
            return evaluated

        parts = self._parts(params)
        pulls = [
            rule.pullback(
                part,
                self._moments_of(rule, part, before),
                self._moments_of(rule, part, after),
                step,
                None if gradient is None else lambda part=part: {n: once()[n] for n in part},
            )
            for rule, part in parts
        ]

        def pull(cotangent: Tensors, cotangent_moments: dict[str, Tensors]):
            to_params: Tensors = {}
            to_gradient: Tensors = {}
            moments = []
            for (rule, part), one in zip(parts, pulls):
                d_param, d_grad, d_moments = one(
                    {n: cotangent[n] for n in part}, self._moments_of(rule, part, cotangent_moments)
                )
                to_params |= unravel(d_param, part)
                to_gradient |= unravel(d_grad, part)
                moments.append(d_moments)
            both = ({name: tensors[name] for name in params} for tensors in (to_params, to_gradient))
            return (*map(ravel, both), self._merged(moments))

        return pull

    def _parts(self, params: Tensors) -> list[tuple[Optimizer, Tensors]]:
        parts: list[tuple[Optimizer, Tensors]] = [(rule, {}) for rule in self.rules.values()]
        for name, param in params.items():
            parts[self._rule_for(name)[0]][1][name] = param
        return [(rule, part) for rule, part in parts if part]

    def _rule_for(self, name: str) -> tuple[int, Optimizer]:
        """Return the number of a parameter's group, and its rule."""
        for place, (key, rule) in enumerate(self.rules.items()):
            if _fits(key, name):
                return place, rule
        raise ValueError(f"The parameter {name!r} is in no group of {list(self.rules)}. Add a group '*'.")

    @staticmethod
    def _moments_of(rule: Optimizer, part: Tensors, moments: Mapping[str, Tensors]) -> dict[str, Tensors]:
        return {moment: {n: moments[moment][n] for n in part} for moment in rule.moment_names}

    def _merged(self, parts: list[dict[str, Tensors]]) -> dict[str, Tensors]:
        return {
            moment: {n: t for part in parts for n, t in part.get(moment, {}).items()} for moment in self.moment_names
        }


class Projected(Wrapping):
    """A rule, and a projection of the new parameters after it, such as weight clipping.

    Parameters
    ----------
    optimizer : Optimizer
    after : callable
        From the new parameters, a dict of str to Tensor, to projected ones of the same names and shapes.
    prefix : str, default=""
        What all names begin with, which `after` does not get to see.

    Examples
    --------
    >>> import torch
    >>> from ganclean.optim import SGD, Projected
    >>> rule = Projected(SGD(lr=1.0), lambda params: {n: p.clamp(-0.1, 0.1) for n, p in params.items()})
    >>> rule.update({"w": torch.zeros(1)}, {"w": torch.ones(1)}, {}, step=1)[0]
    {'w': tensor([-0.1000])}
    """

    def __init__(self, optimizer, after, prefix=""):
        self.optimizer = optimizer
        self.after = after
        self.prefix = prefix

    def update(self, params, grads, moments, step):
        params, moments = self.optimizer.update(params, grads, moments, step)
        return self._projected(params), moments

    def pullback(self, params, before, after, step, gradient=None):
        if gradient is None:
            raise ValueError("The derivative of a projection depends on the gradient. Pass gradient, a function.")
        grads = gradient()
        inner = self.optimizer.pullback(params, before, after, step, lambda: grads)
        point, _ = self.optimizer.update(params, grads, before, step)
        vjp = torch.func.vjp(self._projected, point)[1]

        def pull(cotangent: Tensors, cotangent_moments: dict[str, Tensors]):
            return inner(vjp(cotangent)[0], cotangent_moments)

        return pull

    def _projected(self, params: Tensors) -> Tensors:
        given = {name.removeprefix(self.prefix): p for name, p in params.items()}
        projected = self.after(given)
        if not isinstance(projected, Mapping) or any(
            not isinstance(projected.get(n), Tensor) or projected[n].shape != p.shape for n, p in given.items()
        ):
            shapes = {name: tuple(p.shape) for name, p in given.items()}
            raise ValueError(
                f"after must return all parameters in their shapes, {shapes}; it returned {_form(projected)}."
            )
        return {name: projected[name.removeprefix(self.prefix)] for name in params}


def _form(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in value.items()}
    return type(value).__name__


def _fits(key: str | tuple[str, ...], name: str) -> bool:
    if isinstance(key, tuple):
        return any(_fits(part, name) for part in key)
    return name == key or name.startswith(f"{key}.") or fnmatchcase(name, key)
