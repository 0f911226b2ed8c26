"""Solvers of the damped adjoint system."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from ganclean.backends.solvers import Settings, solve
from ganclean.exceptions import NonFiniteError

MATRIX_FREE = ["gmres", "lgmres", "neumann"]


class Dense:
    def __init__(self, matrix):
        self.matrix = torch.as_tensor(matrix)

    def rmatvec(self, v):
        return self.matrix.T @ v


def dense(n=30, seed=0, diagonal=3.0):
    rng = np.random.default_rng(seed)
    skew = rng.normal(size=(n, n))
    return diagonal * np.eye(n) + (skew - skew.T) / 4 + rng.normal(size=(n, n)) / 10, rng.normal(size=n)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("solver", MATRIX_FREE)
def test_solvers_agree_with_dense_algebra(solver, damping):
    J, b = dense()
    counts = []
    u, info = solve(solver, Dense(J), torch.from_numpy(b), Settings(damping, tol=1e-9), "v", counts.append)
    np.testing.assert_allclose(u.numpy(), np.linalg.solve(J.T + damping * np.eye(30), b), rtol=1e-6, atol=1e-8)
    assert info["converged"] and info["damped_residual"] < 1e-9
    assert info["residual"] == pytest.approx(np.linalg.norm(J.T @ u.numpy() - b) / np.linalg.norm(b), abs=1e-12)
    assert counts == list(range(1, info["iterations"] + 2))


def test_an_automatic_scale_finds_its_way_where_the_game_rotates():
    J = np.kron(np.eye(4), [[0.3, 1.0], [-1.0, 0.3]])
    u, info = solve("neumann", Dense(J), torch.ones(8, dtype=torch.float64), Settings(tol=1e-6))
    assert info["converged"]
    np.testing.assert_allclose(J.T @ u.numpy(), np.ones(8), atol=1e-5)


@pytest.mark.parametrize("solver", MATRIX_FREE)
def test_a_metric_without_gradient_has_no_influence(solver):
    u, info = solve(solver, Dense(np.eye(3)), torch.zeros(3, dtype=torch.float64), Settings())
    assert not u.any() and info["converged"] and info["residual"] == 0


@pytest.mark.parametrize(("solver", "limit"), [("gmres", "max_iter"), ("lgmres", "max_iter"), ("neumann", "depth")])
def test_a_solver_that_does_not_converge_warns_with_advice(solver, limit):
    J, b = dense(diagonal=1.0)
    settings = Settings(tol=1e-8, max_iter=5, depth=5)
    with pytest.warns(ConvergenceWarning, match=f"{solver!r} did not converge for the metric 'fid'.*damping.*{limit}"):
        info = solve(solver, Dense(J), torch.from_numpy(b), settings, "fid")[1]
    assert not info["converged"] and info["residual"] > 1e-8


@pytest.mark.parametrize("solver", MATRIX_FREE)
def test_the_solution_of_a_singular_game_is_finite_or_refused(solver):
    J = np.diag([1.0, 0.0])
    with pytest.warns(ConvergenceWarning, match="nearly singular"):
        u = solve(solver, Dense(J), torch.ones(2, dtype=torch.float64), Settings(max_iter=10, depth=10))[0]
    assert u.isfinite().all()
    u, info = solve(solver, Dense(J), torch.ones(2, dtype=torch.float64), Settings(damping=0.1, tol=1e-6))
    np.testing.assert_allclose(u.numpy(), [1 / 1.1, 10], rtol=1e-4)
    # With damping, what is solved is another system than the one without.
    assert info["converged"] and info["residual"] == pytest.approx(np.hypot(1 - 1 / 1.1, 1) / 2**0.5, rel=1e-4)


def test_damping_that_meets_negative_curvature_is_pointed_out():
    J, b = np.diag([1.0, -0.101]), torch.ones(2, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="damping of 0.1 makes the system for the metric 'v' nearly singular"):
        solve("gmres", Dense(J), b, Settings(damping=0.1, tol=1e-6), "v")


def test_a_series_that_diverges_says_what_to_do():
    J, b = dense()
    with pytest.raises(NonFiniteError, match=r"diverges with scale=5 .*Lower the scale, or add damping"):
        solve("neumann", Dense(J), torch.from_numpy(b), Settings(scale=5.0))


def test_a_product_that_is_not_finite_says_what_to_do():
    with pytest.raises(NonFiniteError, match="NaN or infinite while AID solved for the metric 'kid'"):
        solve("gmres", Dense(np.full((3, 3), np.inf)), torch.ones(3, dtype=torch.float64), Settings(), "kid")
