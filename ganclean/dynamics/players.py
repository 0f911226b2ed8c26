"""The networks as an objective meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ganclean.dynamics.cuts import Cuts
from ganclean.dynamics.network import Call, Network
from ganclean.dynamics.randomness import seeded
from ganclean.tensors import Tensors

PLAYER_KEEPS = "It stays as training has it: training mode, gradients and types are not the objective's business."


class Players:
    """The networks of a step in one evaluation of an objective: ``nets.G(z)``, ``nets["G"]``, ``nets.G.mapping(z)``.

    Calls change the buffers that later calls start from. Randomness in a call has a stream of its own, or continues
    torch's global one.

    Parameters
    ----------
    networks : dict of str to Network
    theta : dict of str to dict of str to Tensor
        The parameters, by player, that power iterations look at.
    live : dict of str to dict of str to Tensor
        The parameters that calls look at: the same, or others whose gradient is taken.
    buffers : dict of str to dict of str to Tensor
    seed_of : callable, optional
        From a player and the number of a call to the seed of the call's stream; default torch's global generator as it
        is.
    device : torch.device, optional
        Where the parameters are.
    once : Cuts, optional
        Makes calls of players that are not moved only once.
    scope : tuple
        What tells calls of these players from those of others, for `once`.
    earlier : callable, optional
        From the number of an update to the players as that update met them.
    training : bool, default=True
        Whether calls are those of training mode.
    functional : bool, default=False
        Whether the evaluation is inside a transform of `torch.func`.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        theta: Mapping[str, Tensors],
        live: Mapping[str, Tensors],
        buffers: Mapping[str, Tensors],
        *,
        seed_of: Callable[[str, int], int] | None = None,
        device: torch.device | None = None,
        once: Cuts | None = None,
        scope: tuple = (),
        earlier: Callable[[int], Players] | None = None,
        training: bool = True,
        functional: bool = False,
    ):
        self._networks = networks
        self._theta, self._live, self._buffers = theta, live, dict(buffers)
        self._seed_of, self._device, self._once = seed_of, device, once
        self._scope, self._earlier = scope, earlier
        self._training, self._functional = training, functional
        self._calls: list[tuple[str, str]] = []

    def __getattr__(self, name: str) -> Player:
        if name.startswith("_") or name not in self._networks:
            raise AttributeError(f"There is no player {name!r}; the players are {', '.join(self._networks)}.")
        return Player(self, name)

    def __getitem__(self, name: str) -> Player:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._networks)

    def __contains__(self, name: object) -> bool:
        return name in self._networks

    def of_update(self, index: int) -> Players:
        """Return the players as an earlier update of the step met them: calls give its samples once more."""
        if self._earlier is None:
            raise ValueError("There is no earlier update in this evaluation.")
        return self._earlier(index)

    def slope(self, function: Callable[[Tensor], Tensor], samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a function gives for some samples, and the gradient of its sum in them, for gradient penalties.

        The same as ``torch.autograd.grad(function(x).sum(), x, create_graph=True)``, which may be used as well; this
        one also allows several runs to be replayed at once.
        """
        if self._functional:

            def called(x: Tensor) -> tuple[Tensor, dict[str, Tensors]]:
                return function(x), dict(self._buffers)

            output, pull, self._buffers = torch.func.vjp(called, samples, has_aux=True)  # type: ignore[misc]
            return output, pull(torch.ones_like(output))[0]
        if not samples.requires_grad:
            samples = samples.detach().requires_grad_()
        output = function(samples)
        return output, torch.autograd.grad(output.sum(), samples, create_graph=True)[0]


def buffers_of(players: Players) -> Mapping[str, Tensors]:
    """Return the buffers that the calls of an evaluation have left."""
    return players._buffers


def calls_of(players: Players) -> tuple[tuple[str, str], ...]:
    """Return which player, and which submodule of it, was called, in order."""
    return tuple(players._calls)


class Player:
    """A network, or a part of one, inside an objective. Called as the module is.

    Its submodules are players too, its parameters and buffers the tensors of the moment, its methods are called with
    them; everything else is read off the module.
    """

    def __init__(self, players: Players, name: str, path: str = ""):
        self._players, self._name, self._path = players, name, path

    def __repr__(self) -> str:
        return f"Player({'.'.join(filter(None, (self._name, self._path)))})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(None, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as a call."""
        return self._call(None, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("train", "eval", "zero_grad", "to", "cuda", "cpu", "half", "double", "float", "load_state_dict"):
            raise AttributeError(f"A player has no {name}(). {PLAYER_KEEPS}")
        players = self._players
        module = players._networks[self._name].module.get_submodule(self._path)
        full = f"{self._path}.{name}" if self._path else name
        if name in module._modules:
            return Player(players, self._name, full)
        if name in module._parameters or name in module._buffers:
            for values in (players._live[self._name], players._buffers[self._name]):
                if full in values:
                    return values[full]
        value = getattr(module, name)
        if callable(value) and getattr(value, "__self__", None) is module:
            return lambda *args, **kwargs: self._call(name, args, kwargs)
        return value

    def __getitem__(self, index: Any) -> Any:
        """Return an entry of a list or dict of modules, or of a sequence of them."""
        module = self._players._networks[self._name].module.get_submodule(self._path)
        names = list(module._modules)
        name = index if isinstance(index, str) else names[index]
        return Player(self._players, self._name, f"{self._path}.{name}" if self._path else name)

    def __len__(self) -> int:
        return len(self._players._networks[self._name].module.get_submodule(self._path)._modules)

    def __iter__(self) -> Iterator[Player]:
        return (self[i] for i in range(len(self)))

    def requires_grad_(self, requires_grad: bool = True) -> Player:
        """Do nothing: an update's gradient is taken in what it trains, whatever is switched off meanwhile."""
        return self

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the parameters of the moment, the trained ones first."""
        players, prefix = self._players, f"{self._path}." if self._path else ""
        live = players._live[self._name]
        yield from (tensor for name, tensor in live.items() if name.startswith(prefix))
        module = players._networks[self._name].module
        yield from (p for name, p in module.named_parameters() if name.startswith(prefix) and name not in live)

    def _call(self, method: str | None, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        players, player = self._players, self._name
        number = sum(name == player for name, _ in players._calls)
        players._calls.append((player, self._path))
        network, call = players._networks[player], Call(args, kwargs, self._path, method)
        theta, live, buffers = players._theta[player], players._live[player], players._buffers[player]

        def made() -> tuple[Any, Tensors]:
            seed = None if players._seed_of is None else players._seed_of(player, number)
            with nullcontext() if seed is None else seeded(seed, players._device):
                if not players._training:
                    return network.evaluate(live, buffers, call), buffers
                started = {**buffers, **network.iterate(theta, buffers, self._path)} if network.is_iterated else buffers
                return network(live, started, call)

        if players._once is None:
            output, after = made()
        else:
            with torch._C.DisableTorchFunction():
                output, after = players._once.call(
                    (players._scope, player, number), player, (call, live, buffers), made
                )
        players._buffers[player] = after
        return output


@contextmanager
def installed(networks: Mapping[str, Network], live: Mapping[str, Tensors]) -> Iterator[None]:
    """Hold parameters in all networks for a backward pass; see `Network.installed`."""
    with ExitStack() as stack:
        for player, network in networks.items():
            stack.enter_context(network.installed(live[player]))
        yield
