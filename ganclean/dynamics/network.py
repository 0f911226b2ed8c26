"""A module as a pure function of parameters, buffers, inputs and a seed.

Modules keep a state of their own beside their parameters: the running statistics of batch normalisation, the vectors
of spectral normalisation's power iteration. PyTorch updates them in place and outside of the graph, where no
derivative can follow. Here both are functions that return the new values (theory, section 1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ganclean.tensors import Tensors


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module, whatever graphs its last forward pass left behind in it."""
    # Spectral normalisation by a hook leaves the normalised weight, no leaf, which cannot be copied as it is.
    left_behind = [value for m in module.modules() for value in vars(m).values() if isinstance(value, Tensor)]
    memo = {id(tensor): tensor.detach().clone() for tensor in left_behind}
    module = copy.deepcopy(module, memo)
    # Before torch 2.5, what a compiled module computes does not follow the parameters that a call brings along.
    if torch.__version__ < "2.5":
        for compiled in [m for m in module.modules() if type(m).__name__ == "OptimizedModule"]:
            for name in ("forward", "dynamo_ctx", "get_compiler_config", "_torchdynamo_orig_callable"):
                vars(compiled).pop(name, None)
            compiled.__class__ = Uncompiled
            compiled.training = compiled._orig_mod.training  # type: ignore[union-attr, assignment]
    return module


def loaded(module: nn.Module, values: Tensors) -> nn.Module:
    """Return a copy of a module with other values of some parameters and buffers, in evaluation mode."""
    module = copied(module)
    assign(module, values)
    return module.eval()


def assign(module: nn.Module, values: Tensors) -> None:
    """Write values into the parameters and buffers of a module, by name."""
    # Not load_state_dict, which knows no buffers that are not persistent.
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


class Uncompiled(nn.Module):
    """What a compiled module becomes where it cannot be called as a pure function; names stay as they are."""

    def forward(self, *args, **kwargs):
        return self._orig_mod(*args, **kwargs)

    def __getattr__(self, name):
        original = super().__getattr__("_orig_mod")
        return original if name == "_orig_mod" else getattr(original, name)


class Call(NamedTuple):
    """What is called, and with what.

    Parameters
    ----------
    args : tuple
    kwargs : dict
    path : str, default=""
        The submodule; default the module itself.
    method : str, optional
        Its method; default its forward pass.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    path: str = ""
    method: str | None = None


class Network:
    """A module as a pure function.

    Parameters
    ----------
    module : torch.nn.Module
        Copied. Its submodules' modes are those of training if it is itself in training mode; otherwise they are what
        ``module.train()`` makes them.

    Attributes
    ----------
    traced : tuple of str
        The names of the buffers that training changes as a differentiable function of the state. Other buffers that
        change are carried along as data.
    is_known : bool
        Whether all buffers are those of batch and spectral normalisation, of which it is known what a call makes.
    """

    def __init__(self, module: nn.Module):
        self.module = copied(module)
        if not self.module.training:
            self.module.train()
        for p in self.module.parameters():
            # Whoever differentiates brings leaves of his own along.
            p.requires_grad_(False)
        self._modes = [(m, m.training) for m in self.module.modules()]
        self._iterations: list[tuple[str, Callable[[], None]]] = []
        traced = []
        for prefix, owner in list(self.module.named_modules()):
            iterations: list[Callable[[], None]] = []
            names = _make_pure(owner, iterations)
            self._iterations += [(prefix, iterate) for iterate in iterations]
            traced += [f"{prefix}.{name}" if prefix else name for name in names]
        self.traced = tuple(traced)
        self._normals = [name for name in traced if not name.endswith(("running_mean", "running_var"))]
        self._places = self._find_places()
        self._is_stateless = not dict(self.module.named_buffers())
        self._calling = _Calling(self.module)
        self._iterating = _Iterating(self.module)
        counters = {name for name, _ in self.module.named_buffers() if name.endswith("num_batches_tracked")}
        self.is_known = all(name in {*traced, *counters} for name, _ in self.module.named_buffers())

    def buffers(self) -> Tensors:
        """Return copies of the module's buffers by name."""
        return {name: b.detach().clone() for name, b in self.module.named_buffers()}

    def trace(self, buffers: Tensors) -> Tensors:
        """Return the buffers that derivatives flow through."""
        return {name: buffers[name] for name in self.traced}

    @property
    def is_iterated(self) -> bool:
        """Whether there are spectral norms."""
        return bool(self._iterations)

    @property
    def is_stateless(self) -> bool:
        """Whether there are no buffers."""
        return self._is_stateless

    def __call__(self, theta: Tensors, buffers: Tensors, call: Call):
        """Return what a call in training mode gives, and the buffers afterwards.

        Power iteration is left to `iterate`, since the gradient that trains a network takes its vectors for constants,
        while the derivative of training does not.
        """
        self._train()
        if self._is_stateless:
            return self._call(theta, call), buffers
        # Clones, for modules that we do not know may write into their buffers.
        return self._call({name: b.clone() for name, b in buffers.items()} | theta, call, returns_buffers=True)

    @contextmanager
    def installed(self, theta: Tensors) -> Iterator[None]:
        """Hold parameters in the module for a backward pass.

        Checkpointed activations are computed anew in the backward pass, when the call that brought its own parameters
        along is over.
        """
        with ExitStack() as stack:
            for name, tensor in theta.items():
                held = tensor.detach().requires_grad_(tensor.requires_grad)
                for owner, leaf in self._places[name].values():
                    stack.callback(owner._parameters.__setitem__, leaf, owner._parameters[leaf])
                    owner._parameters[leaf] = held  # type: ignore[assignment]
            yield

    def iterate(self, theta: Tensors, buffers: Tensors, path: str = "") -> Tensors:
        """Return the vectors of spectral norms after the power iteration of one call of the module at a path."""
        due = [iterate for at, iterate in self._iterations if not path or f"{at}.".startswith(f"{path}.")]
        if not due:
            return {}
        self._train()
        self._iterating.due = due
        after = functional_call(self._iterating, self._places_of({**buffers, **theta}), (), tie_weights=False)
        return {name: after[name] for name in self._normals}

    def advanced(self, theta: Tensors, buffers: Tensors, path: str = "") -> Tensors:
        """Return the buffers after a call but for running statistics, on which nothing in training depends."""
        counted = {
            name: b + 1
            for name, b in buffers.items()
            if name.endswith("num_batches_tracked") and (not path or name.startswith(f"{path}."))
        }
        return {**buffers, **counted, **self.iterate(theta, buffers, path)}

    def evaluate(self, theta: Tensors, buffers: Tensors, call: Call):
        """Return what a call in evaluation mode gives."""
        if self.module.training:
            self.module.eval()
        return self._call({**buffers, **theta}, call)

    @contextmanager
    def own_statistics(self, n_own: int, n_rows: int) -> Iterator[None]:
        """Let batches of `n_rows`, and several in one, be normalised by the statistics of their first `n_own` rows."""
        norms = [m for m in self.module.modules() if isinstance(m, PureBatchNorm)]
        for norm in norms:
            norm.rows = (n_own, n_rows)
        try:
            yield
        finally:
            for norm in norms:
                norm.rows = None

    def _call(self, tensors: Tensors, call: Call, returns_buffers: bool = False):
        """Call the module with other parameters and buffers."""
        return functional_call(self._calling, self._places_of(tensors), (call, returns_buffers), tie_weights=False)

    def _places_of(self, tensors: Tensors) -> Tensors:
        # Left to torch, tied tensors of a module with two names would not all be put back.
        return {f"module.{full}": tensor for name, tensor in tensors.items() for full in self._places[name]}

    def _find_places(self) -> dict[str, dict[str, tuple[nn.Module, str]]]:
        """Return where each parameter and buffer is held, by the names of all places; tied ones are in several."""
        first: dict[int, str] = {}
        places: dict[str, dict[str, tuple[nn.Module, str]]] = {}
        for prefix, owner in self.module.named_modules():
            for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is not None:
                    full = f"{prefix}.{leaf}" if prefix else leaf
                    places.setdefault(first.setdefault(id(tensor), full), {})[full] = (owner, leaf)
        return places

    def _train(self) -> None:
        if not self.module.training:
            for module, mode in self._modes:
                module.training = mode


class _Calling(nn.Module):
    """Makes a call and returns the buffers beside the output, read where they are still those of the call."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, call: Call, returns_buffers: bool):
        target = self.module.get_submodule(call.path)
        called = target if call.method is None else getattr(target, call.method)
        output = called(*call.args, **call.kwargs)
        return (output, dict(self.module.named_buffers())) if returns_buffers else output


class _Iterating(nn.Module):
    """Makes one power iteration in the spectral normalisations that are due and returns the buffers."""

    due: list[Callable[[], None]]

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self):
        for iterate in self.due:
            iterate()
        return dict(self.module.named_buffers())


def _make_pure(module: nn.Module, iterations: list[Callable[[], None]]) -> list[str]:
    """Turn a module that updates its buffers into one that replaces them; return the buffers' names."""
    names = []
    if isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        module.__class__ = PureBatchNorm
        if module.running_mean is not None:
            names += ["running_mean", "running_var"]
    if isinstance(module, _SpectralNorm) and hasattr(module, "_u"):
        module.__class__ = PureSpectralNorm
        names += ["_u", "_v"]
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            if any(isinstance(part, _SpectralNorm) and hasattr(part, "_u") for part in chain):
                iterations.append(_ParametrizedIteration(module, name))
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, SpectralNorm):
            pure = PureSpectralNormHook(hook)
            module._forward_pre_hooks[key] = pure
            iterations.append(_HookedIteration(module, pure))
            names += [f"{hook.name}_u", f"{hook.name}_v"]
    return names


class PureBatchNorm(_BatchNorm):
    """Batch normalisation whose running statistics are functions of the batch, not written in place."""

    # How many of how many rows the statistics are taken from, where it is not all of them.
    rows: tuple[int, int] | None = None

    def _check_input_dim(self, input):
        pass

    def forward(self, input):
        if not self.training and self.running_mean is not None:
            # Not F.batch_norm, which has no derivative in the running statistics.
            shape = (1, -1) + (1,) * (input.ndim - 2)
            scale = (self.running_var + self.eps).rsqrt()
            shift = -self.running_mean * scale
            if self.weight is not None:
                scale, shift = scale * self.weight, shift * self.weight + self.bias
            return input * scale.view(shape) + shift.view(shape)
        dims = [0, *range(2, input.ndim)]
        if self.rows is not None and len(input) % self.rows[1] == 0:
            # Several batches where real and generated samples come in one call.
            own = input.unflatten(0, (-1, self.rows[1]))[:, : self.rows[0]].flatten(0, 1)
            var, mean = torch.var_mean(own, dims, correction=0, keepdim=True)
            output = (input - mean) * (var + self.eps).rsqrt()
            if self.weight is not None:
                shape = (1, -1) + (1,) * (input.ndim - 2)
                output = output * self.weight.view(shape) + self.bias.view(shape)
            input = own
        else:
            # First, since it refuses a batch of which there are no statistics.
            output = F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.training and self.running_mean is not None:
            self.num_batches_tracked = self.num_batches_tracked + 1
            share = self.momentum
            if share is None:
                share = 1 / self.num_batches_tracked.to(input.dtype)
            var, mean = torch.var_mean(input, dims)
            self.running_mean = (1 - share) * self.running_mean + share * mean
            self.running_var = (1 - share) * self.running_var + share * var
        return output


class PureSpectralNorm(_SpectralNorm):
    """Spectral normalisation as a parametrisation, with the power iteration only where it is asked for."""

    iterating = False

    def forward(self, weight):
        matrix = self._reshape_weight_to_matrix(weight)
        if self.iterating and self.training:
            u, v = self._u, self._v
            for _ in range(self.n_power_iterations):
                u = F.normalize(matrix @ v, dim=0, eps=self.eps)
                v = F.normalize(matrix.mT @ u, dim=0, eps=self.eps)
            self._u, self._v = u, v
        return weight / torch.dot(self._u, matrix @ self._v)


class PureSpectralNormHook:
    """Spectral normalisation as a hook before the forward pass, without the power iteration."""

    def __init__(self, hook: SpectralNorm):
        self.hook = hook

    def __call__(self, module: nn.Module, inputs) -> None:
        name = self.hook.name
        weight, u, v = (getattr(module, f"{name}_{part}") for part in ("orig", "u", "v"))
        matrix = self.hook.reshape_weight_to_matrix(weight)
        setattr(module, name, weight / torch.dot(u, matrix @ v))

    def iterate(self, module: nn.Module) -> None:
        """Replace the module's vectors by those after the power iteration."""
        name, eps = self.hook.name, self.hook.eps
        weight, u, v = (getattr(module, f"{name}_{part}") for part in ("orig", "u", "v"))
        matrix = self.hook.reshape_weight_to_matrix(weight)
        for _ in range(self.hook.n_power_iterations):
            v = F.normalize(matrix.mT @ u, dim=0, eps=eps)
            u = F.normalize(matrix @ v, dim=0, eps=eps)
        setattr(module, f"{name}_u", u)
        setattr(module, f"{name}_v", v)


class _ParametrizedIteration:
    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    def __call__(self) -> None:
        chain = self.owner.parametrizations[self.name]  # type: ignore[index]
        parts = [part for part in chain if isinstance(part, PureSpectralNorm)]
        for part in parts:
            part.iterating = True
        try:
            getattr(self.owner, self.name)
        finally:
            for part in parts:
                part.iterating = False


class _HookedIteration:
    def __init__(self, owner: nn.Module, hook: PureSpectralNormHook):
        self.owner, self.hook = owner, hook

    def __call__(self) -> None:
        if self.owner.training:
            self.hook.iterate(self.owner)
