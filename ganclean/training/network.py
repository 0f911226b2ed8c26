"""A module as a pure function of parameters, buffers, inputs and a seed.

Modules keep a state of their own beside their parameters: the running statistics of batch normalisation, the vectors
of spectral normalisation's power iteration. PyTorch updates them in place and outside of the graph, where no
derivative can follow. Here both are functions that return the new values (theory, section 1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ganclean.training.state import Tensors


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generator of a device inside the block and restore it afterwards."""
    # Not torch.manual_seed, which on a build with CUDA formats a stack trace whenever it is called.
    if device is not None and device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    else:
        generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


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


def loaded(module: nn.Module, params: Tensors, buffers: Tensors) -> nn.Module:
    """Return a copy of a module with other values of some parameters and buffers, in evaluation mode."""
    module = copied(module)
    assign(module, {**buffers, **params})
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
    """

    def __init__(self, module: nn.Module):
        self.module = copied(module)
        if not self.module.training:
            self.module.train()
        self._modes = [(m, m.training) for m in self.module.modules()]
        self._iterations: list[Callable[[], None]] = []
        traced = []
        for prefix, owner in list(self.module.named_modules()):
            names = _make_pure(owner, self._iterations)
            traced += [f"{prefix}.{name}" if prefix else name for name in names]
        self.traced = tuple(traced)
        self._normals = [name for name in traced if not name.endswith(("running_mean", "running_var"))]
        self._places = self._find_places()
        self._is_stateless = not dict(self.module.named_buffers())
        self._calling = _Calling(self.module)
        self._iterating = _Iterating(self.module, self._iterations)

    def buffers(self) -> Tensors:
        """Return copies of the module's buffers by name."""
        return {name: b.detach().clone() for name, b in self.module.named_buffers()}

    def trace(self, buffers: Tensors) -> Tensors:
        """Return the buffers that derivatives flow through."""
        return {name: buffers[name] for name in self.traced}

    def __call__(self, theta: Tensors, buffers: Tensors, inputs: tuple[Tensor, ...], seed: int):
        """Return the module's output in training mode, and its buffers afterwards.

        Power iteration is left to `iterate`, since the gradient that trains a network takes its vectors for constants,
        while the derivative of training does not.
        """
        self._train()
        with seeded(seed, inputs[0].device):
            if self._is_stateless:
                return self._call(theta, inputs), buffers
            # Clones, for modules that we do not know may write into their buffers.
            return self._call({name: b.clone() for name, b in buffers.items()} | theta, inputs, self._calling)

    @contextmanager
    def installed(self, theta: Tensors, trained: bool = True) -> Iterator[None]:
        """Hold parameters in the module for a backward pass, with or without a derivative in them.

        Checkpointed activations are computed anew in the backward pass, when the call that brought its own parameters
        along is over.
        """
        with ExitStack() as stack:
            for name, tensor in theta.items():
                held = tensor.detach().requires_grad_(trained)
                for owner, leaf in self._places[name].values():
                    stack.callback(owner._parameters.__setitem__, leaf, owner._parameters[leaf])
                    owner._parameters[leaf] = held  # type: ignore[assignment]
            yield

    def iterate(self, theta: Tensors, buffers: Tensors) -> Tensors:
        """Return the vectors of all spectral norms after the power iteration of one call in training mode."""
        if not self._iterations:
            return {}
        self._train()
        after = self._call({**buffers, **theta}, (), self._iterating)
        return {name: after[name] for name in self._normals}

    def evaluate(self, theta: Tensors, buffers: Tensors, inputs: tuple[Tensor, ...]):
        """Return the module's output in evaluation mode."""
        if self.module.training:
            self.module.eval()
        return self._call({**buffers, **theta}, inputs)

    def _call(self, tensors: Tensors, inputs: tuple[Tensor, ...], around: nn.Module | None = None):
        """Call the module, or what is around it, with other parameters and buffers."""
        prefix = "" if around is None else "module."
        inside = {prefix + full: tensor for name, tensor in tensors.items() for full in self._places[name]}
        # Left to torch, tied tensors of a module with two names would not all be put back.
        return functional_call(self.module if around is None else around, inside, inputs, tie_weights=False)

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
    """Returns the buffers beside the output, read where they are still those of the call."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs), dict(self.module.named_buffers())


class _Iterating(nn.Module):
    """Makes one power iteration in every spectral normalisation and returns the buffers."""

    def __init__(self, module: nn.Module, iterations: list[Callable[[], None]]):
        super().__init__()
        self.module = module
        self.iterations = iterations

    def forward(self):
        for iterate in self.iterations:
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
        # First, since it refuses a batch of which there are no statistics.
        output = F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if self.training and self.running_mean is not None:
            self.num_batches_tracked = self.num_batches_tracked + 1
            share = self.momentum
            if share is None:
                share = 1 / self.num_batches_tracked.to(input.dtype)
            dims = [0, *range(2, input.ndim)]
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
