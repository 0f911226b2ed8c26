"""Inverses of both players' own curvature by EK-FAC, and of the whole game Jacobian from them (theory, section 5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from ganclean.backends.game import Game
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.network import Network
from ganclean.dynamics.players import Players
from ganclean.dynamics.randomness import stream
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.update import Batch
from ganclean.exceptions import missing_extra
from ganclean.recipes.adversarial import DiscriminatorObjective, GeneratorObjective, generated, judged
from ganclean.tensors import Tensors, leaves, ravel, unravel

# Eigenvalues below so much of their mean are noise: the inverse without damping adds it.
FLOOR = 1e-3
# The largest Kronecker factor: decomposing a larger one takes minutes.
MAX_FACTOR = 5000
# Random signs for each chunk, of the diagonal.
PROBES = 8
# What each player is trained by where its curvature is known.
RECIPE = {("G",): GeneratorObjective, ("D",): DiscriminatorObjective}


class GameInverse:
    """An approximate inverse of Jᵀ + damping·I: one sweep of block Gauss–Seidel.

    J's two diagonal blocks are the curvatures of both players' own losses, which `CurvatureInverse` inverts. Those
    beside the diagonal are exact:

        u_G = H_G⁻¹ v_G ,      u_D = H_D⁻¹ (v_D − (∂g_G/∂θ_D)ᵀ u_G) .

    Parameters
    ----------
    game : Game
    damping : float, default=0.0
    coupled : bool, default=True
        Without it the second term is left out: the inverse of the diagonal blocks, for which nothing is propagated
        through the networks.

    Attributes
    ----------
    blocks : dict of str to CurvatureInverse
        By player.

    Raises
    ------
    ValueError
        If updates are others than those of the usual GAN, whose curvature is known.

    Examples
    --------
    >>> import torch
    >>> from ganclean import GANTrainer
    >>> from ganclean.backends.ekfac import GameInverse
    >>> from ganclean.backends.game import Game, draw_chunks
    >>> from ganclean.data import DataSource
    >>> from ganclean.networks import default_pair
    >>> source = DataSource(torch.randn(50, 2))
    >>> step = GANTrainer().make_step(*default_pair((2,), 32))
    >>> game = Game(step, step.initial_state(), source, draw_chunks(step, len(source), 25))
    >>> v = torch.randn(sum(game.sizes))
    >>> torch.allclose(GameInverse(game, damping=1e6)(v), v / 1e6, rtol=1e-3, atol=1e-8)
    True
    """

    def __init__(self, game: Game, damping: float = 0.0, coupled: bool = True):
        check_recipe(game.step)
        self.game = game
        self.coupled = coupled
        self.blocks = {player: _player_inverse(game, player, damping) for player in game.players}

    def __call__(self, v: Tensor) -> Tensor:
        """Return the inverse times a vector."""
        parts = self.game.split(v)
        u = {"G": self.blocks["G"](parts["G"])}
        if self.coupled:
            parts["D"] = parts["D"] - self.game.products("G", u["G"], into=["D"])["D"]
        u["D"] = self.blocks["D"](parts["D"])
        return torch.cat([u[player] for player in self.game.players])


class CurvatureInverse:
    """(F + damping·I)⁻¹ for a Gauss–Newton matrix F = Σ_i c_i ∇f_i ∇f_iᵀ of a network with one output f_i per sample.

    Weights and biases of Linear and Conv2d layers form one block a layer, its inverse by EK-FAC from `curvlinops`:
    eigenvectors of a Kronecker product, eigenvalues fitted to the matrix itself. Every other parameter has a block of
    its own, the diagonal of F, estimated without bias from random signs: those of normalisations, embeddings and
    transposed or grouped convolutions, of layers called more than once, with a weight that they compute, or with 5,000
    inputs or outputs and more.

    Parameters
    ----------
    network : Network
    theta : dict of str to Tensor
        The trained parameters of the network.
    outputs : sequence of callable
        One for each chunk of samples: from parameters to √c_i f_i, shape (n,). The √c_i carry no derivative.
    damping : float, default=0.0
    decay : float, default=0.0
        Weight decay, which adds to the curvature.

    Attributes
    ----------
    by_layers, by_diagonal : list of str
        The names of the parameters of either kind.
    """

    def __init__(
        self,
        network: Network,
        theta: Tensors,
        outputs: list[Callable[[Tensors], Tensor]],
        damping: float = 0.0,
        decay: float = 0.0,
    ):
        operators = curvlinops_module()
        self._theta = leaves(theta)
        with network.installed(self._theta), torch.enable_grad():
            model = _Indexed(network.module, [partial(output, self._theta) for output in outputs])
            sizes, layers = _survey(model)
            self.by_layers = _kronecker_names(network.module, self._theta, layers)
            self.by_diagonal = [name for name in theta if name not in self.by_layers]
            self._layers = self._diagonal = None
            if self.by_layers:
                factors = operators.EKFACLinearOperator(
                    model,
                    nn.MSELoss(),
                    [self._theta[name] for name in self.by_layers],
                    # The second derivative of the squared error is 2, which √½ in the outputs takes back.
                    [(torch.full((n,), i), torch.zeros(n, 1)) for i, n in enumerate(sizes)],
                    check_deterministic=False,
                    fisher_type=operators.FisherType.TYPE2,
                    num_per_example_loss_terms=1,
                    separate_weight_and_bias=False,
                    num_data=sum(sizes),
                )
                # Factors are means over the samples, F is a sum.
                n = sum(sizes)
                mean = float(factors.trace) / sum(self._theta[name].numel() for name in self.by_layers)
                self._scale = n
                shift = damping + decay + FLOOR * n * mean
                self._layers = operators.KFACInverseLinearOperator(factors, damping=shift / n, use_exact_damping=True)
            if self.by_diagonal:
                diagonal = _diagonal(model, {name: self._theta[name] for name in self.by_diagonal}, sizes)
                self._diagonal = diagonal + (damping + decay + FLOOR * float(diagonal.mean()))
            # They hold the samples.
            model.outputs.clear()

    def __call__(self, v: Tensor) -> Tensor:
        """Return the inverse times a flat vector, in its type."""
        parts = unravel(v.to(next(iter(self._theta.values()))), self._theta)
        if self._layers is not None:
            solved = self._layers @ [parts[name] for name in self.by_layers]
            parts |= {name: u / self._scale for name, u in zip(self.by_layers, solved)}
        if self._diagonal is not None:
            rest = {name: parts[name] for name in self.by_diagonal}
            parts |= unravel(ravel(rest) / self._diagonal, rest)
        return ravel(parts).to(v.dtype)


class _Indexed(nn.Module):
    """What curvlinops takes for the model: its input says which chunk to evaluate."""

    def __init__(self, module: nn.Module, outputs: list[Callable[[], Tensor]]):
        super().__init__()
        self.module = module
        self.outputs = outputs

    def forward(self, chunk: Tensor) -> Tensor:
        return self.outputs[int(chunk[0])]().unsqueeze(1) * 0.5**0.5


def check_recipe(step: AnyStep) -> None:
    """Raise `ValueError` where updates are others than those of the usual GAN, whose curvature is known."""
    for update in step.updates:
        kind = RECIPE.get(tuple(update.trains))
        if kind is None or not isinstance(update.objective, kind):
            raise ValueError(
                f"solver='ekfac' takes the curvature of the usual GAN, but the update {update.name!r} has an objective "
                "of its own. Choose solver='gmres', which takes any."
            )


def _player_inverse(game: Game, player: str, damping: float) -> CurvatureInverse:
    with torch.no_grad():
        outputs = [
            output
            for record, x, share in game.chunks()
            for done in record.updates
            if game.step.update_named(done.name).trains == (player,)
            for output in _outputs(game, record, done, x, share)
        ]
    theta = game.state.params[player]
    # One number for all parameters, which is what a Kronecker product can take.
    n = sum(p.numel() for p in theta.values())
    decay = sum(own * theta[name].numel() for name, own in game.decay(player).items()) / n
    return CurvatureInverse(game.step.networks[player], theta, outputs, damping, decay)


def _outputs(
    game: Game, record: StepRecord, done: UpdateRecord, x: Tensor, share: float
) -> list[Callable[[Tensors], Tensor]]:
    """Return the discriminator's outputs on what an update's loss looks at, as functions of the update's parameters."""
    step, state = game.step, game.state
    update = step.update_named(done.name)
    objective: Any = update.objective
    player = update.trains[0]
    weight = game.frequencies[done.name] * objective.scale * share / len(x)
    batch = Batch(x, record.labels, record.indices, record.index, {}, done, lambda: done.draws["latents"])

    def nets(name: str, theta: Tensors) -> Players:
        return Players(
            step.networks,
            state.params,
            {**state.params, player: theta},
            game.buffers,
            seed_of=lambda called, i: stream(record.seed, done.name, name, called, i),
            device=x.device,
        )

    def weighed(output: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        return output * (_bend(loss, output) * weight).sqrt()

    if player == "D":
        fake = generated(nets("fake", state.params["D"]), batch)
        looks = {
            "real": (x, batch.y if objective.conditional else None, objective.loss.real),
            "fake": (fake, done.draws.get("labels"), objective.loss.fake),
        }

        def rated(theta: Tensors, name: str) -> Tensor:
            samples, labels, loss = looks[name]
            return weighed(judged(nets(name, theta), batch, name, samples, labels), loss)

        return [partial(rated, name=name) for name in looks]

    def answered(theta: Tensors) -> Tensor:
        players = nets("generator", theta)
        output = judged(players, batch, "generator", generated(players, batch), done.draws.get("labels"))
        return weighed(output, objective.loss.generator)

    return [answered]


def _bend(loss: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Return |ℓ''| of each output; where a loss is piecewise linear, ℓ'² (the empirical Fisher matrix)."""
    with torch.enable_grad():
        output = output.detach().requires_grad_()
        (slope,) = grad(loss(output).sum(), output, create_graph=True)
        bend = torch.zeros_like(slope)
        if slope.requires_grad:
            (bend,) = grad(slope.sum(), output, materialize_grads=True)
    return bend.abs().detach() if bool(bend.any()) else slope.detach().square()


def _survey(model: _Indexed) -> tuple[list[int], set[nn.Module]]:
    """Return the sizes of all chunks, and the layers that each call of the model calls once, on one row per sample."""
    calls: Counter[nn.Module] = Counter()
    rows: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs, output) -> None:
        calls[module] += 1
        rows[module] = len(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], Tensor) else 0

    candidates = [m for m in model.modules() if _is_supported(m)]
    handles = [m.register_forward_hook(note) for m in candidates]
    sizes = []
    with torch.no_grad():
        for i in range(len(model.outputs)):
            calls.clear()
            sizes.append(len(model(torch.tensor([i]))))
            candidates = [m for m in candidates if calls[m] == 1 and rows[m] == sizes[-1]]
    for handle in handles:
        handle.remove()
    return sizes, set(candidates)


def _is_supported(module: nn.Module) -> bool:
    # Subclasses may compute anything from their weight.
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    else:
        plain = type(module) is nn.Linear
    weight = getattr(module, "weight", None)
    return plain and isinstance(weight, Tensor) and max(len(weight), weight[0].numel()) < MAX_FACTOR


def _kronecker_names(module: nn.Module, theta: Tensors, layers: set[nn.Module]) -> list[str]:
    holders = Counter(p.data_ptr() for m in module.modules() for p in m.parameters(recurse=False))
    inside = {
        p.data_ptr()
        for m in layers
        for name, p in m._parameters.items()
        if p is not None and name in ("weight", "bias")
    }
    return [name for name, t in theta.items() if t.data_ptr() in inside and holders[t.data_ptr()] == 1]


def _diagonal(model: _Indexed, theta: Mapping[str, Tensor], sizes: list[int]) -> Tensor:
    """Estimate Σ_i (∂f_i)²: the expectation of (Σ_i ±∂f_i)² over independent signs."""
    signs = torch.Generator().manual_seed(0)
    total = torch.zeros_like(ravel(theta))
    for i, n in enumerate(sizes):
        output = model(torch.tensor([i])).squeeze(1)
        for probe in range(PROBES):
            sign = torch.randint(0, 2, (n,), generator=signs).to(output) * 2 - 1
            parts = grad(output @ sign, list(theta.values()), retain_graph=probe < PROBES - 1, materialize_grads=True)
            total += 2 * ravel(dict(zip(theta, parts))).square() / PROBES
    return total.detach()


def curvlinops_module():
    try:
        import curvlinops
    except ImportError as error:
        raise missing_extra("curvlinops-for-pytorch", "ekfac") from error
    return curvlinops
