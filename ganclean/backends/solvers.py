"""Solvers of (Jᵀ + damping·I) u = b for the game Jacobian, which is not symmetric (theory, section 4)."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from scipy.sparse import linalg
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ganclean.backends.ekfac import GameInverse
from ganclean.backends.game import Game
from ganclean.exceptions import NonFiniteError

# Krylov vectors that are held at a time.
RESTART = 100
INNER, OUTER = 30, 3
# Where the game's curvature is positive, damping leaves a residual of at most 1 of the system without it.
LARGEST_RESIDUAL = 2.0
# A residual that has grown by more than this will not shrink again.
GROWTH = 100.0
POWER_ITERATIONS = 20


class Operator(Protocol):
    """What a solver multiplies by; `Game` offers the four blocks of J too."""

    def rmatvec(self, v: Tensor) -> Tensor:
        """Return Jᵀ v."""
        ...


@dataclass(frozen=True)
class Settings:
    """When to stop, and what else solvers are told.

    Parameters
    ----------
    damping : float, default=0.0
    tol : float, default=1e-2
        Stop at a residual of so much of ‖b‖.
    max_iter : int, default=500
        Products with Jᵀ that a Krylov method makes at most.
    scale : float or "auto", default="auto"
        Step of the Neumann series; "auto" begins with the reciprocal of how far Jᵀ + damping·I stretches vectors.
    depth : int, default=1000
        Terms of the Neumann series at most.
    """

    damping: float = 0.0
    tol: float = 1e-2
    max_iter: int = 500
    scale: float | str = "auto"
    depth: int = 1000


Multiply = Callable[[Tensor], Tensor]
Solver = Callable[[Operator, Multiply, Tensor, Settings], Tensor]


def neumann(operator: Operator, multiply: Multiply, b: Tensor, settings: Settings) -> Tensor:
    """Sum the Neumann series: u ← u + scale·(b − (Jᵀ + damping·I) u), from zero.

    It converges where all eigenvalues of scale·(Jᵀ + damping·I) are within 1 of 1; `gmres` has no such condition. With
    ``scale="auto"`` the scale is halved where the sum diverges, and it goes on from where it was best.
    """
    scale, size = _scale(multiply, b, settings), float(b.norm())
    u, residual = torch.zeros_like(b), b
    best, start = (1.0, u, residual), 1.0
    for _ in range(settings.depth):
        u = u + scale * residual
        residual = b - multiply(u)
        relative = float(residual.norm()) / size
        if relative < best[0]:
            best = relative, u, residual
        if relative <= settings.tol:
            break
        if relative <= GROWTH * start:
            continue
        if settings.scale != "auto":
            raise _diverging(scale, settings)
        scale /= 2
        start, u, residual = best
    if best[0] >= 1:
        raise _diverging(scale, settings)
    return best[1]


def _diverging(scale: float, settings: Settings) -> NonFiniteError:
    return NonFiniteError(
        f"The Neumann series of AID diverges with scale={scale:.2g} and damping={settings.damping:.2g}. Lower the "
        "scale, or add damping (damping=0.1), which a game that rotates needs; or choose solver='gmres'."
    )


def _scale(multiply: Multiply, b: Tensor, settings: Settings) -> float:
    if not isinstance(settings.scale, str):
        return float(settings.scale)
    v, stretch = b / b.norm(), 0.0
    for _ in range(POWER_ITERATIONS):
        v = multiply(v)
        size = float(v.norm())
        if not size:
            break
        stretch, v = max(stretch, size), v / size
    return 1 / stretch if stretch else 1.0


def gmres(operator: Operator, multiply: Multiply, b: Tensor, settings: Settings) -> Tensor:
    """Minimise the residual over a Krylov space, which is begun anew after every 100 products (Saad, Schultz, 1986)."""
    restart = min(len(b), settings.max_iter, RESTART)
    return _krylov(
        linalg.gmres, multiply, b, rtol=settings.tol, restart=restart, maxiter=-(-settings.max_iter // restart)
    )


def lgmres(operator: Operator, multiply: Multiply, b: Tensor, settings: Settings) -> Tensor:
    """GMRES with short cycles that remember the directions of the last ones: less memory (Baker et al., 2005)."""
    inner = min(len(b), settings.max_iter, INNER)
    return _krylov(
        linalg.lgmres,
        multiply,
        b,
        rtol=settings.tol,
        inner_m=inner,
        outer_k=OUTER,
        maxiter=-(-settings.max_iter // (inner + OUTER)),
    )


def ekfac(operator: Operator, multiply: Multiply, b: Tensor, settings: Settings) -> Tensor:
    """GMRES whose unknowns are preconditioned by `GameInverse`: (Jᵀ + damping·I) M⁻¹ y = b, u = M⁻¹ y (theory, 5).

    Where damping is small, the first few products usually bring it closer than those of `gmres`; later ones need not.
    The sweep alone, repeated, diverges on games that rotate. It needs a `Game`; each product takes half of one more.
    """
    assert isinstance(operator, Game), "EK-FAC needs the networks of a Game"
    # The factors serve all metrics.
    if settings.damping not in operator.inverses:
        operator.inverses[settings.damping] = GameInverse(operator, settings.damping)
    inverse = operator.inverses[settings.damping]
    return inverse(gmres(operator, lambda v: multiply(inverse(v)), b, settings))


def _krylov(method, multiply: Multiply, b: Tensor, **settings: Any) -> Tensor:
    def matvec(v: np.ndarray) -> np.ndarray:
        return multiply(torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(b)).cpu().numpy()

    operator = linalg.LinearOperator((len(b), len(b)), matvec=matvec, dtype=np.float64)
    return torch.from_numpy(method(operator, b.cpu().numpy(), atol=0.0, **settings)[0]).to(b)


SOLVERS: dict[str, Solver] = {"gmres": gmres, "lgmres": lgmres, "neumann": neumann, "ekfac": ekfac}


def solve(
    solver: str,
    operator: Operator,
    b: Tensor,
    settings: Settings,
    name: str = "",
    report: Callable[[int], None] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Solve (Jᵀ + damping·I) u = b and say how well that went.

    Parameters
    ----------
    solver : str
        A key of `SOLVERS`.
    operator : Operator
    b : Tensor of shape (n,), float64
    settings : Settings
    name : str
        What messages call b.
    report : callable, optional
        Called with the number of products so far.

    Returns
    -------
    u : Tensor of shape (n,), float64
    info : dict
        ``residual``, ‖Jᵀu − b‖/‖b‖; ``damped_residual``, that of the damped system, which is the one solved;
        ``iterations``, products with Jᵀ; ``seconds``; ``converged``.

    Raises
    ------
    NonFiniteError
        If a product is NaN or infinite, or a series diverges.

    Examples
    --------
    >>> import torch
    >>> from ganclean.backends.solvers import Settings, solve
    >>> class Rotation:
    ...     def rmatvec(self, v):
    ...         return torch.stack([v[0] + 3 * v[1], v[1] - 3 * v[0]])
    >>> u, info = solve("gmres", Rotation(), torch.tensor([10.0, 0.0], dtype=torch.float64), Settings())
    >>> torch.allclose(u, torch.tensor([1.0, 3.0], dtype=torch.float64)), info["converged"]
    (True, True)
    """
    count, begin, size = 0, time.perf_counter(), float(b.norm())

    def multiply(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if report is not None:
            report(count)
        product = operator.rmatvec(v)
        if not bool(product.isfinite().all()):
            raise NonFiniteError(
                f"A product with the game Jacobian became NaN or infinite while AID solved for the metric {name!r}. "
                "Check that the final networks are sound (their samples and losses are finite); then lower delta, or "
                "add damping (damping=0.1)."
            )
        return product + settings.damping * v

    if size:
        u = SOLVERS[solver](operator, multiply, b, settings)
        iterations = count
        left = multiply(u) - b
        damped = float(left.norm()) / size
        residual = float((left - settings.damping * u).norm()) / size
    else:
        u, iterations, damped, residual = torch.zeros_like(b), 0, 0.0, 0.0
    info = {
        "residual": residual,
        "damped_residual": damped,
        "iterations": iterations,
        "seconds": time.perf_counter() - begin,
        "converged": damped <= settings.tol,
    }
    if not math.isfinite(damped):
        raise NonFiniteError(
            f"AID's solution for the metric {name!r} is NaN or infinite: the game Jacobian is singular. Add damping "
            "(damping=1e-2)."
        )
    if not info["converged"]:
        longer = f"depth (now {settings.depth})" if solver == "neumann" else f"max_iter (now {settings.max_iter})"
        warnings.warn(
            f"AID's solver {solver!r} did not converge for the metric {name!r}: the residual is {damped:.1e} of the "
            f"gradient after {iterations} products, not {settings.tol:.0e}. Influences may be wrong. Add damping (now "
            f"{settings.damping:.2g}; try ten times as much, or 1e-2), which is needed where the Jacobian is nearly "
            f"singular; raise {longer}; or accept a larger tol.",
            ConvergenceWarning,
            stacklevel=3,
        )
    elif residual > LARGEST_RESIDUAL:
        warnings.warn(
            f"AID's damping of {settings.damping:.2g} makes the system for the metric {name!r} nearly singular: of the "
            f"one without it, the residual is {residual:.1e} of the gradient, more than that of no solution. The game "
            "has negative curvature of that size, since training has not settled. Influences may be wrong. Take three "
            "times as much damping, or none.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return u, info
