"""What tells a run from another: its networks, updates and settings, in a form that JSON knows."""

from __future__ import annotations

import functools
import hashlib
import inspect
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from ganclean._version import __version__
from ganclean.dynamics.step import Step
from ganclean.runs.tensorfile import content_hash

# Whose source is told by the version of a package.
_PACKAGES = ("ganclean", "torch", "torchvision", "torchmetrics", "numpy", "sklearn")


def describe_step(step: Step) -> dict[str, Any]:
    """Return what identifies the networks and the rules of a run."""
    weights = {
        f"{player}.{name}": p for player, module in step.players.items() for name, p in module.named_parameters()
    }
    buffers = {f"{player}.{name}": b for player, module in step.players.items() for name, b in module.named_buffers()}
    trained = {f"{player}.{name}" for pairs in step.names.values() for player, name in pairs}
    return {
        "version": __version__,
        "torch": str(torch.__version__),
        "parameters": {
            name: f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')}"
            for name, p in weights.items()
            if name in trained
        },
        "modules": {player: _structure(module) for player, module in step.players.items()},
        "frozen": content_hash({name: p for name, p in weights.items() if name not in trained}),
        "initial": content_hash(weights | buffers),
        "settings": {
            **{f"update {update.name}": identity(update) for update in step.updates},
            "averages": identity(dict(step.averages)),
            "carried": {name: torch.as_tensor(value).tolist() for name, value in step.carried.items()},
            "sampler": identity(step.sampler),
            "latents": identity(step.latents) if step.latents is not None else list(step.latent_shape),
            "conditional": step.conditional,
        },
    }


def identity(value: Any) -> Any:
    """Return what tells an object from another: class paths, all parameters, and for what a user wrote, its source.

    Examples
    --------
    >>> from ganclean.optim import SGD
    >>> from ganclean.runs.identity import identity
    >>> identity(SGD(lr=0.1))["lr"], identity(SGD(lr=0.1)) == identity(SGD(lr=0.2))
    (0.1, False)
    """
    return _identity(value, ())


def difference(recorded: Any, given: Any, path: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Any, Any] | None:
    """Return where two descriptions first differ, and what stands there in each; None where they are equal."""
    if isinstance(recorded, Mapping) and isinstance(given, Mapping):
        pairs = [(key, recorded.get(key), given.get(key)) for key in sorted({*recorded, *given})]
        # That it is another class says more than that this class has other parameters.
        pairs.sort(key=lambda pair: pair[0] != "class")
    elif isinstance(recorded, list) and isinstance(given, list) and len(recorded) == len(given):
        pairs = [(str(i), *both) for i, both in enumerate(zip(recorded, given))]
    else:
        return None if recorded == given else (path, recorded, given)
    found = (difference(one, other, (*path, key)) for key, one, other in pairs)
    return next((each for each in found if each is not None), None)


def _identity(value: Any, around: tuple[int, ...]) -> Any:
    """Return the identity of an object inside others, whose ids are given."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if id(value) in around:
        # Such as an object that holds the update whose objective is its own method.
        return {"class": _path(type(value))}
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return {str(key): _identity(child, around) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(child, around) for child in value]
    if isinstance(value, (Tensor, np.ndarray)):
        return content_hash({"": torch.as_tensor(value)})
    if isinstance(value, nn.Module):
        return _of_module(value)
    if isinstance(value, functools.partial):
        parts = {"partial": value.func, "args": value.args, "keywords": value.keywords}
        return {name: _identity(part, around) for name, part in parts.items()}
    if isinstance(value, types.MethodType):
        return {"method": _identity(value.__func__, around), "of": _identity(value.__self__, around)}
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return _of_function(value)
    if isinstance(value, type):
        return _path(value)
    return _of_object(value, around)


def _of_module(module: nn.Module) -> dict[str, Any]:
    described = {"class": _path(type(module)), "modules": _structure(module)}
    # The values of one that trains, such as a player that an objective knows besides, are not part of what it is.
    trains = module.training and any(p.requires_grad for p in module.parameters())
    return described if trains else {**described, "content": content_hash(module.state_dict())}


def _of_object(value: Any, around: tuple[int, ...]) -> dict[str, Any]:
    described: dict[str, Any] = {"class": _path(type(value))}
    if isinstance(value, BaseEstimator):
        params = value.get_params(deep=False)
    elif is_dataclass(value):
        params = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
    elif isinstance(value, torch.optim.Optimizer):
        # One that an objective's object happens to hold; its state changes with every step.
        params = {}
    elif hasattr(value, "__dict__"):
        params = vars(value)
    else:
        # What has a state of its own prints its address.
        params = {} if " at 0x" in repr(value) else {"is": repr(value)}
    described |= {name: _identity(child, around) for name, child in sorted(params.items())}
    if not _is_known(type(value).__module__):
        described["source"] = _source_hash(type(value))
    return described


def _of_function(function: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"function": _path(function)}
    if not _is_known(function.__module__ or ""):
        described["source"] = _source_hash(function)
    plain = [value for value in _held(function) if isinstance(value, (bool, str, int, float))]
    return described | ({"holds": plain} if plain else {})


def _held(function: Any) -> list[Any]:
    """Return what a function holds beside its source: what it closes over, and defaults."""
    held = [
        *(getattr(function, "__defaults__", None) or ()),
        *(getattr(function, "__kwdefaults__", None) or {}).values(),
    ]
    for cell in getattr(function, "__closure__", None) or ():
        # A variable that has no value yet.
        with suppress(ValueError):
            held.append(cell.cell_contents)
    return held


def _source_hash(what: Any) -> str | None:
    code = getattr(what, "__code__", None)
    try:
        text = inspect.getsource(what)
    except (OSError, TypeError):
        if code is None:
            return None
        text = code.co_code.hex() + repr([c for c in code.co_consts if not isinstance(c, types.CodeType)])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _structure(module: nn.Module) -> str:
    """Return a hash of the classes of all submodules and of what they say of themselves."""
    parts = [f"{name}: {_path(type(m))}({m.extra_repr()}){_written(m)}" for name, m in module.named_modules()]
    return f"{type(module).__qualname__} {hashlib.blake2b(chr(10).join(parts).encode(), digest_size=8).hexdigest()}"


def _written(module: nn.Module) -> str:
    """Return what tells a module of a user's own class from another of the class: its source, and plain attributes."""
    if _is_known(type(module).__module__):
        return ""
    plain = {
        n: v for n, v in sorted(vars(module).items()) if isinstance(v, (bool, str, int, float)) and n != "training"
    }
    return f" {_source_hash(type(module))} {plain}"


def _path(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in _PACKAGES
