import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID, ITD, InfluenceBackend, resolve_backend
from ganclean.backends.game import Game, draw_chunks
from ganclean.backends.solvers import Settings, solve
from ganclean.data import DataSource
from ganclean.exceptions import NetworkError, NonFiniteError, TrajectoryError
from ganclean.losses import R1, GradientPenalty
from ganclean.metrics import FID, DiscriminatorLoss, SampleMean
from ganclean.optim import SGD, Adam, AdamW, Clipped
from ganclean.training.state import map_state, ravel
from ganclean.training.trajectory import Trajectory
from ganclean.validation import cleansing_curve, counterfactual_retrain
from tests.reference import lq_gan
from tests.reference.game_jacobian import flat, game_jacobian, instance_losses
from tests.toy_gans import toy_cleaner, toy_data, toy_networks

# Toys that were not trained to the end.
pytestmark = pytest.mark.filterwarnings("ignore:AID's damping of 0.1 makes")
X = toy_data()
MATRIX_FREE = ["gmres", "lgmres", "neumann"]
FEW = {"tol": 1e-8, "delta": 1e-4}


# A linear generator against a quadratic discriminator, where the truth is known to machine precision.


class LQ:
    """The game, its stationary point, and the change of a metric where an instance's weight changes."""

    def __init__(self):
        self.X = torch.from_numpy(X) - 0.5
        rule = SGD(lr=0.1, weight_decay=lq_gan.DECAY)
        self.trainer = GANTrainer(loss="wasserstein", optimizer=rule, latent_dim=2, batch_size=16)
        self.step = self.trainer.make_step(*lq_gan.lq_networks())
        self.source = DataSource(self.X)
        (chunk,) = draw_chunks(16, 256, None, check_random_state(self.seed).randint(2**31))
        self.record = self.step.drawn(chunk, self.source)
        self.data = self.X, self.record.latents_d, self.record.latents_g
        start = torch.cat([torch.eye(2).reshape(-1), torch.zeros(8)]).double()
        self.theta = self.solved(torch.ones(16, dtype=torch.float64), lq_gan.descended(start, *self.data))

    seed = 6

    def solved(self, weights, start=None):
        return lq_gan.stationary(self.theta if start is None else start, weights, *self.data)

    def cleaner(self, **settings):
        backend = AID(random_state=self.seed, **settings)
        networks = lq_gan.loaded_lq(self.theta)
        metric = {"fid": FID(n_samples=60), "loss": DiscriminatorLoss(n_samples=60)}
        return GANInfluence(*networks, trainer=self.trainer, metric=metric, backend=backend, random_state=0).fit(
            self.X, trained=True
        )

    def value(self, cleaner, name, theta):
        generator, discriminator = lq_gan.loaded_lq(theta)
        state = cleaner.trajectory_.state(0)._replace(
            generator={n: p.detach() for n, p in generator.named_parameters()},
            discriminator={n: p.detach() for n, p in discriminator.named_parameters()},
        )
        return cleaner._evaluator(60).value(cleaner.metrics_[name], state)

    def true(self, cleaner, width=1e-3):
        result = {name: np.zeros(16) for name in cleaner.metrics_}
        for row in range(16):
            for sign in (-1, 1):
                weights = torch.ones(16, dtype=torch.float64)
                weights[row] += sign * width
                theta = self.solved(weights)
                for name, total in result.items():
                    total[row] -= sign * self.value(cleaner, name, theta) / (2 * width)
        return result


@pytest.fixture(scope="module")
def lq():
    return LQ()


@pytest.fixture(scope="module")
def lq_truth(lq):
    return lq.true(lq.cleaner())


def relative_error(found, expected):
    return max(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected)


@pytest.mark.parametrize("solver", ["gmres", "lgmres"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_influence_is_what_the_stationary_point_does_without_an_instance(lq, lq_truth, solver, derivative):
    cleaner = lq.cleaner(solver=solver, derivative=derivative, tol=1e-8)
    assert relative_error(cleaner.influences_, lq_truth) < 1e-6
    assert max(cleaner.backend_.gradient_norms_.values()) < 1e-12
    info = cleaner.backend_.solver_info_["fid"]
    assert info["converged"] and info["residual"] < 1e-8 and info["iterations"] <= 14 and info["seconds"] > 0


@pytest.mark.parametrize("scale", [0.1, "auto"])
def test_the_neumann_series_adds_its_source_in_every_term(lq, lq_truth, scale):
    cleaner = lq.cleaner(solver="neumann", scale=scale, tol=5e-5, depth=2000)
    assert relative_error(cleaner.influences_, lq_truth) < 1e-3


def test_taking_away_a_little_of_an_instance_changes_the_metric_by_as_little_of_its_influence(lq):
    cleaner = lq.cleaner(tol=1e-6)
    row = int(np.argmax(np.abs(cleaner.influence_)))
    weights = torch.ones(16, dtype=torch.float64)
    weights[row] = 0.99
    change = lq.value(cleaner, "fid", lq.solved(weights)) - cleaner.metric_value_
    assert change == pytest.approx(0.01 * cleaner.influence_[row], rel=0.1)


@pytest.mark.filterwarnings("ignore:.*memory_budget")
def test_a_run_that_has_settled_has_the_same_influence_by_iterative_differentiation(lq, lq_truth):
    cleaner, step = lq.cleaner(tol=1e-8), replace(lq.step, update="simultaneous")
    trajectory = Trajectory({"n_steps": 700, "steps_per_epoch": 1}).bind(step, lq.source)
    for t in range(700):
        trajectory.store.checkpoint(t, cleaner.trajectory_.state(0))
        trajectory.store.add(replace(lq.record, index=t))
    trajectory.store.checkpoint(700, cleaner.trajectory_.state(0))
    itd = ITD(delta=1e-3).fit(trajectory, {"fid": cleaner.gradients_["fid"]})
    assert relative_error(itd.influences_, {"fid": lq_truth["fid"]}) < 1e-4
    assert relative_error(itd.influences_, {"fid": cleaner.influences_["fid"]}) < 1e-4


# The Jacobian as an operator.


class Conditional(nn.Module):
    def __init__(self, body, n_features):
        super().__init__()
        self.body, self.embed = body, nn.Embedding(3, n_features).double()

    def forward(self, x, y):
        return self.body(x + self.embed(y))


def make_game(networks=None, derivative="secant", batch_size=5, n_batch=None, labels=None, **settings):
    generator, discriminator = toy_networks() if networks is None else networks
    trainer = GANTrainer(latent_dim=3, conditional=labels is not None, **settings)
    step, source = trainer.make_step(generator, discriminator), DataSource(X, labels=labels)
    chunks = tuple(step.drawn(chunk, source) for chunk in draw_chunks(16, batch_size, n_batch))
    return Game(step, step.initial_state(), source, chunks, derivative, 1e-4)


def frozen_networks():
    generator, discriminator = toy_networks()
    generator[0].weight.requires_grad_(False)
    discriminator[2].bias.requires_grad_(False)
    return generator, discriminator


LABELS = np.arange(16) % 3
GAMES = {
    "plain": (toy_networks, {}),
    "simultaneous": (toy_networks, {"update": "simultaneous"}),
    "R1": (toy_networks, {"penalty": R1(gamma=0.7)}),
    "lazy R1": (toy_networks, {"penalty": R1(gamma=0.7, every=4)}),
    "gradient penalty": (toy_networks, {"penalty": GradientPenalty(weight=0.5)}),
    "weight decay": (toy_networks, {"optimizer": Clipped(SGD(weight_decay=0.3), max_norm=1.0)}),
    "frozen": (frozen_networks, {}),
    "some rows": (toy_networks, {"n_batch": 11}),
    "conditional": (
        lambda: tuple(Conditional(net, n) for net, n in zip(toy_networks(), (3, 2))),
        {"labels": LABELS, "penalty": R1(gamma=0.7)},
    ),
}
GAMES["conditional gradient penalty"] = (GAMES["conditional"][0], {"labels": LABELS, "penalty": GradientPenalty(0.5)})


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_products_are_those_of_the_explicit_jacobian(name, derivative):
    make, settings = GAMES[name]
    networks = make()
    game = make_game(networks, derivative, **settings)
    decay = 0.3 if name == "weight decay" else 0.0
    J, gradient = game_jacobian(*networks, game.records, game.source, settings.get("penalty"), decay)
    v = torch.randn(len(J), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n_g, tolerance = game.sizes[0], {"rtol": 0, "atol": (1e-11 if derivative == "exact" else 1e-6) * float(J.norm())}
    torch.testing.assert_close(game.rmatvec(v), J.T @ v, **tolerance)
    v_g, v_d = v.split(game.sizes)
    torch.testing.assert_close(game.own("generator", v_g), J[:n_g, :n_g].T @ v_g, **tolerance)
    torch.testing.assert_close(game.cross("generator", v_g), J[:n_g, n_g:].T @ v_g, **tolerance)
    torch.testing.assert_close(game.own("discriminator", v_d), J[n_g:, n_g:].T @ v_d, **tolerance)
    torch.testing.assert_close(game.cross("discriminator", v_d), J[n_g:, :n_g].T @ v_d, **tolerance)
    found = torch.cat([game.gradient("generator"), game.gradient("discriminator")])
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13)


def random_networks(kind):
    generator, discriminator = toy_networks()
    if kind == "dropout":
        return generator.insert(1, nn.Dropout(0.3)), discriminator.insert(1, nn.Dropout(0.3))
    if kind == "batch norm":
        return generator.insert(1, nn.BatchNorm1d(6).double()), discriminator.insert(1, nn.BatchNorm1d(6).double())
    for network in (generator, discriminator):
        nn.utils.parametrizations.spectral_norm(network[0])
    return generator, discriminator


def moved_game(game, player, move):
    params = getattr(game.state, player)
    pieces = move.split([p.numel() for p in params.values()])
    moved = {n: p + piece.view_as(p) for (n, p), piece in zip(params.items(), pieces)}
    return replace(game, state=game.state._replace(**{player: moved}))


@pytest.mark.parametrize("kind", ["dropout", "batch norm", "spectral norm"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_whatever_networks_do_in_training_is_part_of_a_fixed_linear_map(kind, derivative):
    game = make_game(random_networks(kind), derivative)
    generator = torch.Generator().manual_seed(0)
    v, w = (torch.randn(sum(game.sizes), generator=generator, dtype=torch.float64) for _ in range(2))
    h = 1e-5

    def both(sign):
        at = game
        for player, move in zip(("generator", "discriminator"), w.split(game.sizes)):
            at = moved_game(at, player, sign * h * move)
        return torch.cat([at.gradient("generator"), at.gradient("discriminator")])

    expected = float(v @ (both(1) - both(-1)) / (2 * h))
    assert float(game.rmatvec(v) @ w) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(game.rmatvec(v), game.rmatvec(v))
    assert float(game.rmatvec(2 * v + w) @ w) == pytest.approx(float((2 * game.rmatvec(v) + game.rmatvec(w)) @ w), 1e-5)


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


def test_activations_that_are_computed_anew_are_those_of_the_moved_parameters():
    plain, checkpointed = make_game(), make_game([Checkpointed(net) for net in toy_networks()])
    v = torch.randn(sum(plain.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(checkpointed.rmatvec(v), plain.rmatvec(v), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(checkpointed.gradient("generator"), plain.gradient("generator"))


def test_running_statistics_and_averages_pass_their_cotangent_to_the_parameters():
    networks = random_networks("batch norm")
    game = make_game(networks, ema_decay=0.9)
    state = game.state
    gradient = map_state(torch.zeros_like, game.step.differentiable(state))
    gradient = gradient._replace(average=map_state(torch.ones_like, state).average)
    assert torch.equal(game.cotangent(gradient), torch.cat([torch.ones(game.sizes[0]), torch.zeros(game.sizes[1])]))
    c = {n: torch.randn_like(b) for n, b in gradient.buffers_generator.items()}
    found = game.cotangent(gradient._replace(average={}, buffers_generator=c))

    def settled(sign, move):
        at, total = moved_game(game, "generator", sign * 1e-5 * move), 0
        for record in at.records:
            after = at.step.generate(at.state.generator, at.state.buffers_generator, record)[1]
            # b' = 0.9 b + 0.1 s, so that it settles at s.
            for name, piece in c.items():
                s = (after[name] - 0.9 * state.buffers_generator[name]) / 0.1
                total += float((piece * s).sum()) * len(record.indices) / 16
        return total

    move = torch.randn(game.sizes[0], dtype=torch.float64)
    expected = (settled(1, move) - settled(-1, move)) / 2e-5
    assert float(found[: game.sizes[0]] @ move) == pytest.approx(expected, rel=1e-6)


# Scores of instances.


@pytest.mark.parametrize("name", ["plain", "R1", "gradient penalty", "conditional gradient penalty", "frozen"])
def test_scores_are_inner_products_with_the_gradients_of_single_instances(name):
    make, settings = GAMES[name]
    networks = make()
    game = make_game(networks, "exact", **settings)
    v = torch.randn(game.sizes[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    discriminator, parts = networks[1], []
    for record in game.records:
        fake = game.step.generate(game.state.generator, {}, record)[0]
        real = game.source[record.indices]

        def loss(theta, i, record=record, fake=fake, real=real):
            labels = None if record.labels is None else record.labels[i : i + 1]
            mixing = None if record.mixing is None else record.mixing[i : i + 1]
            row = slice(i, i + 1)
            penalty = settings.get("penalty")
            return instance_losses(discriminator, theta, real[row], labels, fake[row], mixing, penalty)[0]

        gradients = [torch.func.grad(loss)(flat(discriminator), i) for i in range(len(record.indices))]
        parts += [float(g @ v) for g in gradients]
    np.testing.assert_allclose(game.along(v).numpy(), parts, rtol=1e-10, atol=1e-13)
    errors = []
    for delta in (2e-2, 1e-2, 1e-3):
        found = replace(game, derivative="secant", delta=delta).along(v).numpy()
        errors.append(np.abs(found - parts).max() / np.abs(parts).max())
    assert errors[1] < 0.3 * errors[0] and errors[2] < 1e-4


@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_scores_do_not_depend_on_chunks_or_processes(derivative, monkeypatch):
    def elsewhere(function, jobs, *_):
        assert len(jobs) == 2
        return [function(*pickle.loads(pickle.dumps(job))) for job in jobs]

    whole = toy_cleaner(backend=AID(derivative=derivative, damping=0.1)).fit(X)
    u = next(iter(whole.backend_._solved.values()))[1]
    whole.backend_.set_params(batch_size=3, n_jobs=2)
    monkeypatch.setattr("ganclean.backends.aid.side_by_side", elsewhere)
    found = whole.backend_._scores(whole.trajectory_, u, whole.trajectory_.source)
    np.testing.assert_allclose(found, whole.influence_, rtol=1e-9)


def test_instances_that_were_not_trained_on_are_scored_alike():
    cleaner = toy_cleaner(
        backend=AID(damping=0.1, batch_size=5, **FEW), metric={"a": FID(n_samples=40), "b": SampleMean()}
    )
    cleaner.fit(X)
    np.testing.assert_allclose(cleaner.score_samples(X), cleaner.harmfulness_, rtol=1e-12)
    np.testing.assert_allclose(cleaner.score_samples(X[4:6]), cleaner.harmfulness_[4:6], rtol=1e-9)
    scaled = map_state(lambda t: 2 * t, cleaner.gradients_["b"])
    doubled = cleaner.backend_.score_samples(cleaner.trajectory_, scaled, DataSource(X))
    np.testing.assert_allclose(doubled, 2 * cleaner.influences_["b"], rtol=1e-5)


# Solvers.


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


# As a back-end.


def trained_cleaner(networks=None, **settings):
    trainer = settings.pop("trainer", GANTrainer(latent_dim=3, penalty=R1(gamma=1.0)))
    settings = {"metric": FID(n_samples=60), "backend": AID(damping=0.1), "n_remove": 4, "random_state": 0} | settings
    return GANInfluence(*(toy_networks() if networks is None else networks), trainer=trainer, **settings)


def test_a_recorded_run_and_its_final_networks_alone_give_the_same():
    recorded = toy_cleaner(backend=AID(damping=0.1, **FEW), n_epochs=4).fit(X)
    state = recorded.trajectory_.state(len(recorded.trajectory_))
    networks = recorded.generator_, recorded.discriminator_
    alone = trained_cleaner(networks, trainer=clone(recorded.trainer), backend=clone(recorded.backend)).fit(
        X, trained=True
    )
    np.testing.assert_allclose(alone.influence_, recorded.influence_, rtol=1e-10)
    assert len(alone.trajectory_) == 0
    assert torch.equal(ravel(alone.trajectory_.state(0).generator), ravel(state.generator))


def test_a_trained_model_alone_is_cleansed_and_not_trained(monkeypatch):
    monkeypatch.setattr(GANTrainer, "record", lambda *_, **__: pytest.fail("training has begun"))
    generator, discriminator = toy_networks()
    before = copy.deepcopy(generator.state_dict())
    cleaner = trained_cleaner((generator, discriminator))
    kept, labels = cleaner.fit_resample(X, np.arange(16), trained=True)
    assert kept.shape == (12, 2) and np.array_equal(kept, X[labels])
    assert all(torch.equal(p, before[n]) for n, p in cleaner.generator_.state_dict().items())
    assert np.array_equal(cleaner.transform(X), kept)
    assert cleaner.sample(5)[0].shape == (5, 2)
    assert cleaner.score(X) == pytest.approx(-cleaner.metric_value_)
    np.testing.assert_allclose(cleaner.score_samples(X), cleaner.harmfulness_)
    assert len(cleaner.transform(X[:3])) == cleaner.support_[:3].sum()


@pytest.mark.parametrize(
    "ask",
    [
        lambda cleaner: cleaner.smoothness_,
        lambda cleaner: counterfactual_retrain(cleaner, [[3]]),
        lambda cleaner: counterfactual_retrain(cleaner, [[3]], seeds=[0]),
        lambda cleaner: counterfactual_retrain(cleaner, [[3]], first_step=0),
        lambda cleaner: cleansing_curve(cleaner, X, n_seeds=1),
        lambda cleaner: ITD().fit(cleaner.trajectory_, cleaner.gradients_),
    ],
)
def test_what_needs_a_run_says_so(ask):
    cleaner = trained_cleaner().fit(X, trained=True)
    with pytest.raises(TrajectoryError, match=r"needs a recorded run to trace or replay.*Leave trained out"):
        ask(cleaner)


@pytest.mark.parametrize(
    ("changes", "fit", "message"),
    [
        ({"backend": ITD()}, {}, r"trained=True needs a back-end .* such as 'aid'; ITD\(\) traces a recorded run"),
        ({"generator": None}, {}, "takes the networks as they are: give the trained generator and discriminator"),
        ({"n_runs": 2}, {}, "n_runs train again, which trained=True rules out"),
        ({"n_remove": "auto"}, {"X_val": X}, "n_remove='auto' and n_runs train again"),
        ({}, {"trajectory": "folder"}, "Give a recorded trajectory or trained=True, not both"),
    ],
)
def test_what_a_trained_model_alone_does_not_allow_is_refused(changes, fit, message):
    with pytest.raises(ValueError, match=message):
        trained_cleaner().set_params(**changes).fit(X, trained=True, **fit)


def test_latents_that_do_not_fit_trained_networks_are_named():
    with pytest.raises(NetworkError, match="latent_dim of the trainer"):
        trained_cleaner(trainer=None).fit(X, trained=True)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_an_average_is_followed_and_frozen_parameters_are_left_out(derivative):
    backend = AID(damping=0.1, derivative=derivative, **FEW)
    plain = trained_cleaner(frozen_networks(), backend=backend).fit(X, trained=True)
    averaged = trained_cleaner(frozen_networks(), backend=backend)
    averaged.set_params(trainer__ema_decay=0.9).fit(X, trained=True)
    np.testing.assert_allclose(averaged.influence_, plain.influence_, rtol=1e-10)
    generator, discriminator = frozen_networks()
    assert sum(plain.backend_._game(plain.trajectory_, plain.trajectory_.source).sizes) == len(
        torch.cat([flat(generator), flat(discriminator)])
    )


@pytest.mark.parametrize("kind", ["plain", "batch norm", "spectral norm"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_single_precision_gives_what_double_precision_gives(kind, derivative):
    networks = toy_networks() if kind == "plain" else random_networks(kind)
    double = replace(make_game(networks, derivative), delta=1e-3)
    records = tuple(replace(r, latents_d=r.latents_d.float(), latents_g=r.latents_g.float()) for r in double.records)
    single = replace(make_game([net.float() for net in networks], derivative), delta=1e-3)
    single = replace(single, source=double.source.cast(torch.float32, None), records=records)
    v = torch.randn(sum(double.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = single.rmatvec(v), double.rmatvec(v)
    assert found.dtype == torch.float64
    assert (found - expected).norm() < 2e-3 * expected.norm()
    found, expected = (game.along(v.split(game.sizes)[1]) for game in (single, double))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_networks_in_single_precision_take_part():
    cleaner = trained_cleaner([net.float() for net in toy_networks()]).fit(X, trained=True)
    exact = trained_cleaner([net.float() for net in toy_networks()], backend=AID(damping=0.1, derivative="exact"))
    assert cleaner.backend_.solver_info_["FID"]["converged"] and cleaner.influence_.dtype == np.float64
    expected = exact.fit(X, trained=True).influence_
    np.testing.assert_allclose(cleaner.influence_, expected, atol=0.02 * np.abs(expected).max())


def test_conditional_networks_take_part():
    networks = GAMES["conditional"][0]()
    cleaner = trained_cleaner(networks, trainer=GANTrainer(latent_dim=3, conditional=True)).fit(X, LABELS, trained=True)
    np.testing.assert_allclose(cleaner.score_samples(X, LABELS), cleaner.harmfulness_)
    assert cleaner.sample(4)[1].shape == (4,)


def test_the_network_of_a_lazy_penalty_sees_it_as_it_is_on_average():
    lazy, steady = (
        trained_cleaner(trainer=GANTrainer(latent_dim=3, penalty=R1(1.0, every=every))).fit(X, trained=True).influence_
        for every in (8, 1)
    )
    np.testing.assert_allclose(lazy, steady)


def test_progress_is_reported():
    calls = []
    cleaner = trained_cleaner().fit(X, trained=True)
    cleaner.backend_.fit(cleaner.trajectory_, cleaner.gradients_, lambda *args: calls.append(args))
    solving = [call for call in calls if call[0] == "solving"]
    assert solving[0] == ("solving", 1, 500) and solving[1] == ("solving", 2, 500)
    assert calls[-1] == ("scoring", 1, 1)


def test_a_run_for_aid_keeps_no_more_than_its_ends():
    cleaner = toy_cleaner(backend=AID(damping=0.1), n_epochs=5).fit(X)
    assert len(cleaner.trajectory_.store.kept()) == 5


def test_the_cost_is_that_of_as_many_products_as_the_solver_may_take():
    costs = [toy_cleaner(backend=AID(max_iter=n)).estimate_cost(X) for n in (10, 1000)]
    assert costs[0].n_traced == 3 and costs[1].seconds_tracing > 10 * costs[0].seconds_tracing > 0
    assert AID(solver="neumann", depth=7).passes() == 7 and ITD().passes() == 1


def test_aid_is_an_estimator_with_a_name():
    assert isinstance(resolve_backend("aid"), AID) and isinstance(AID(), InfluenceBackend)
    backend = AID(solver="neumann", damping=0.2)
    assert clone(backend).get_params() == backend.get_params()
    cleaner = trained_cleaner().set_params(backend__damping=0.3)
    assert cleaner.backend.damping == 0.3 and AID.needs_run is False and ITD.needs_run is True
    influences = [trained_cleaner().fit(X, trained=True).influence_ for _ in range(2)]
    assert np.array_equal(*influences)
    other = trained_cleaner(backend=AID(damping=0.1, random_state=1)).fit(X, trained=True).influence_
    assert not np.allclose(other, influences[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "cg"}, r"solver must be one of \['gmres', 'lgmres', 'neumann'.*\]; got 'cg'"),
        ({"derivative": "auto"}, r"derivative must be one of \['secant', 'exact'\]; got 'auto'"),
        ({"delta": 0}, "delta must be a positive number; got 0"),
        ({"tol": None}, "tol must be a positive number; got None"),
        ({"damping": -1}, "damping must be a number from 0; got -1"),
        ({"damping": float("nan")}, "damping must be a number from 0; got nan"),
        ({"scale": "large"}, "scale must be a positive number or 'auto'; got 'large'"),
        ({"depth": 0}, "depth must be a positive integer; got 0"),
        ({"max_iter": 2.5}, "max_iter must be a positive integer; got 2.5"),
        ({"batch_size": 0}, "batch_size must be a positive integer or 'auto'; got 0"),
        ({"n_batch": -3}, "n_batch must be a positive integer or None; got -3"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(settings, message, monkeypatch):
    monkeypatch.setattr(GANTrainer, "record", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(ValueError, match=message):
        toy_cleaner(backend=AID(**settings)).fit(X)


def test_networks_without_second_derivative_need_the_secant():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

    class Layer(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    networks = toy_networks()[0], toy_networks()[1].insert(1, Layer())
    trainer = GANTrainer(latent_dim=3)
    assert trained_cleaner(networks, trainer=trainer).fit(X, trained=True).influence_.any()
    with pytest.raises(NetworkError, match="derivative='secant'"):
        trained_cleaner(networks, trainer=trainer, backend=AID(derivative="exact")).fit(X, trained=True)


@pytest.mark.parametrize("rule", [Adam(weight_decay=0.2), AdamW(weight_decay=0.2)])
def test_decay_that_is_no_part_of_the_gradient_is_no_part_of_the_game(rule):
    game, plain = make_game(optimizer=rule), make_game()
    v = torch.ones(game.sizes[0], dtype=torch.float64)
    expected = plain.own("generator", v) + (0.0 if isinstance(rule, AdamW) else 0.2) * v
    torch.testing.assert_close(game.own("generator", v), expected)
