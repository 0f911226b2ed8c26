"""AID: approximate implicit differentiation, from the final model alone (theory, section 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral, Real

import numpy as np
import torch
from joblib import effective_n_jobs
from sklearn.utils import check_random_state
from torch import Tensor

from ganclean.backends.base import InfluenceBackend
from ganclean.backends.ekfac import check_recipe, curvlinops_module
from ganclean.backends.game import Game, draw_chunks
from ganclean.backends.solvers import SOLVERS, Settings, solve
from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.network import PureBatchNorm
from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState
from ganclean.parallel import side_by_side
from ganclean.progress import Progress
from ganclean.runs.trajectory import Trajectory

DERIVATIVES = ("secant", "exact")
CHUNK = 256


class AID(InfluenceBackend):
    """Influence by approximate implicit differentiation at the end of training: only the final model is needed.

    Where training has settled, all players' gradients g vanish, those of a GAN g_G and g_D, and removing an instance
    moves the point where they do. With the game Jacobian J = ∂g/∂θ over the training data, Jᵀu = ∇V is solved once for
    each metric V, and then, for every instance x_j of weight w_j,

        influence_j = ⟨u, ∂g/∂w_j⟩ ,    for the usual GAN ⟨u_D, ∇_{θ_D} ℓ_D(x_j)⟩ / n .

    It predicts what training to the end without the instance would change. The less training has settled
    (`gradient_norms_`), the less it means; `ITD` has no such condition, but needs the run.

    Objectives of one's own are looked at as in the step after the last, each update as often as it is due. A player
    that several updates train settles, as far as AID knows, where the sum of their gradients vanishes: as if their
    learning rates were the same.

    Parameters
    ----------
    solver : {"gmres", "lgmres", "neumann", "ekfac"}, default="gmres"
        How Jᵀu = ∇V is solved. J is not symmetric, which rules out conjugate gradients. "gmres" is fastest and holds up
        to 100 vectors of the size of the model, "lgmres" 33; "neumann" sums a series, holds three, and converges where
        `damping` and `scale` let it. "ekfac" is GMRES preconditioned by EK-FAC curvature of both players (extra
        ``ekfac``), which makes the first few products count where there is damping; it knows the usual GAN alone.
    derivative : {"secant", "exact"}, default="secant"
        "exact" takes second derivatives of the networks, and forward-mode derivatives for the instances of the usual
        GAN. "secant" takes central differences of first gradients and of losses.
    delta : float, default=1e-3
        Relative width of the secant, δ = ε‖v‖/‖θ‖.
    damping : float, default=0.0
        Solve with J + damping·I instead, which takes far fewer products where J is nearly singular, as those of large
        networks are. It shrinks influences, those through directions of little curvature most. Where training has not
        settled, J has negative curvature too; damping must be larger than that, or 0.
    scale : float or "auto", default="auto"
        Step of the Neumann series; "auto" begins with the reciprocal of how far Jᵀ stretches vectors, and halves it
        as long as the series diverges.
    depth : int, default=1000
        Terms of the Neumann series at most.
    tol : float, default=1e-2
        Solve until the residual is so small a part of ∇V.
    max_iter : int, default=500
        Products with Jᵀ that "gmres" and "lgmres" make at most; each costs about as much as two epochs of training.
    batch_size : int or "auto", default="auto"
        Instances that pass through the networks at a time. "auto" is 256; with batch normalisation, where it matters
        beside speed, the batch size of the run.
    n_batch : int, optional
        Compute J from so many random instances; default all.
    random_state : int, RandomState instance or None, default=0
        Draws these instances, latents, and whatever else is random in the losses. They stay fixed throughout.
    n_jobs : int, optional
        How many processes score instances, through joblib.

    Attributes
    ----------
    influences_ : dict of str to ndarray of shape (n_samples,), float64
    solver_info_ : dict of str to dict
        For each metric ``residual``, ‖Jᵀu − ∇V‖/‖∇V‖; ``damped_residual``, that of the damped system, which is the one
        solved; ``iterations``, the products with Jᵀ; ``seconds``; ``converged``.
    gradient_norms_ : dict of str to float
        ‖g_p‖ of each player, such as ``"G"`` and ``"D"``; all are 0 where training has settled.

    Raises
    ------
    NonFiniteError
        If the solver diverges.
    ValueError
        If "ekfac" is to solve for other objectives than those of the usual GAN.

    Warns
    -----
    ConvergenceWarning
        If the solver has not reached `tol`, or damping has made the system nearly singular.

    References
    ----------
    Terashita, Ohashi, Hara, Data cleansing for GANs, 2025; Koh, Liang, Understanding black-box predictions via
    influence functions, 2017.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.backends import AID
    >>> from ganclean.losses import R1
    >>> _ = torch.manual_seed(0)
    >>> X, G, D = torch.randn(64, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))
    >>> trainer = GANTrainer(latent_dim=2, penalty=R1(gamma=1.0))
    >>> cleanser = GANInfluence(G, D, trainer=trainer, backend=AID(damping=0.1), random_state=0)
    >>> cleanser = cleanser.fit(X, trained=True)
    >>> cleanser.influence_.shape, cleanser.backend_.solver_info_["fid"]["converged"]
    ((64,), True)
    """

    needs_run = False

    def __init__(
        self,
        solver="gmres",
        derivative="secant",
        delta=1e-3,
        damping=0.0,
        scale="auto",
        depth=1000,
        tol=1e-2,
        max_iter=500,
        batch_size="auto",
        n_batch=None,
        random_state=0,
        n_jobs=None,
    ):
        self.solver = solver
        self.derivative = derivative
        self.delta = delta
        self.damping = damping
        self.scale = scale
        self.depth = depth
        self.tol = tol
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.n_batch = n_batch
        self.random_state = random_state
        self.n_jobs = n_jobs

    def passes(self):
        return int(self.depth if self.solver == "neumann" else self.max_iter)

    def fit(self, trajectory, gradients, progress=None):
        self._check_parameters()
        self._seed = check_random_state(self.random_state).randint(2**31)
        game = self._game(trajectory, trajectory.source, self.n_batch)
        self.gradient_norms_ = {player: float(g.double().norm()) for player, g in game.gradients().items()}
        self.solver_info_, self._solved = {}, {}
        for name, gradient in gradients.items():
            b = game.cotangent(gradient)
            u, self.solver_info_[name] = self._solve(game, b, name, progress)
            self._solved[name] = b, u
        self.influences_ = {
            name: self._scores(trajectory, u, trajectory.source, progress) for name, (_, u) in self._solved.items()
        }
        return self

    def score_samples(self, trajectory, gradient, samples):
        game = self._game(trajectory, trajectory.source, self.n_batch)
        b = game.cotangent(gradient)
        known = [u for solved, u in self._solved.values() if torch.equal(solved, b)]
        u = known[0] if known else self._solve(game, b, "score_samples")[0]
        return self._scores(trajectory, u, samples)

    def probe(self, step: AnyStep, state: TrainingState, record: StepRecord, x: Tensor) -> None:
        """Multiply by the Jacobian of one batch after a step, to find out whether the networks allow it."""
        self._check_parameters()
        if self.solver == "ekfac":
            check_recipe(step)
        step(state, record, x)
        source = DataSource(x, labels=record.labels).cast(x.dtype, x.device)
        chunks = draw_chunks(step, len(x), len(x))
        game = Game(step, state, source, chunks, self.derivative, float(self.delta))
        ones = x.new_ones(sum(game.sizes))
        game.rmatvec(ones)
        game.along(ones)

    def _game(self, trajectory: Trajectory, source: DataSource, n_batch: int | None = None) -> Game:
        """Return the game of the final state on some data: that of training, or of instances to be scored."""
        step, last = trajectory.step, len(trajectory)
        chunks = draw_chunks(step, len(source), self._chunk_size(trajectory), n_batch, self._seed, last)
        return Game(step, trajectory.state(last), source, chunks, self.derivative, float(self.delta))

    def _chunk_size(self, trajectory: Trajectory) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        normalised = any(
            isinstance(module, PureBatchNorm)
            for network in trajectory.step.networks.values()
            for module in network.module.modules()
        )
        return trajectory.batch_size if normalised else CHUNK

    def _solve(self, game: Game, b: Tensor, name: str, progress: Progress | None = None):
        settings = Settings(
            damping=float(self.damping),
            tol=float(self.tol),
            max_iter=int(self.max_iter),
            scale=self.scale if isinstance(self.scale, str) else float(self.scale),
            depth=int(self.depth),
        )
        limit = self.passes()

        def report(count: int) -> None:
            if progress is not None:
                progress("solving", min(count, limit), limit)

        return solve(self.solver, game, b, settings, name, report)

    def _scores(
        self, trajectory: Trajectory, u: Tensor, source: DataSource, progress: Progress | None = None
    ) -> np.ndarray:
        """Return the influence of every instance of a source: those of training, or others."""
        game = self._game(trajectory, source)
        parts = np.array_split(np.arange(len(game.records)), min(effective_n_jobs(self.n_jobs), len(game.records)))
        jobs = [(replace(game, records=tuple(game.records[i] for i in part)), u) for part in parts]
        scores = side_by_side(Game.along, jobs, self.n_jobs, progress, "scoring")
        return torch.cat(scores).double().cpu().numpy() / len(trajectory.source)

    def _check_parameters(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {list(SOLVERS)}; got {self.solver!r}.")
        if self.solver == "ekfac":
            curvlinops_module()
        if self.derivative not in DERIVATIVES:
            raise ValueError(f"derivative must be one of {list(DERIVATIVES)}; got {self.derivative!r}.")
        for name in ("delta", "tol"):
            if not _is_real(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number; got {getattr(self, name)!r}.")
        if not _is_real(self.damping) or self.damping < 0:
            raise ValueError(f"damping must be a number from 0; got {self.damping!r}.")
        if self.scale != "auto" and not (_is_real(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a positive number or 'auto'; got {self.scale!r}.")
        for name, exception in (("depth", ()), ("max_iter", ()), ("batch_size", ("auto",)), ("n_batch", (None,))):
            value = getattr(self, name)
            if value in exception:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                alternative = "".join(f" or {other!r}" for other in exception)
                raise ValueError(f"{name} must be a positive integer{alternative}; got {value!r}.")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
