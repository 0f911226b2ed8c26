"""AID where the truth is known to machine precision: a linear generator against a quadratic discriminator."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils import check_random_state

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import AID, ITD
from ganclean.backends.game import draw_chunks
from ganclean.data import DataSource
from ganclean.metrics import FID, DiscriminatorLoss
from ganclean.optim import SGD
from ganclean.runs.trajectory import Trajectory
from tests.reference import lq_gan
from tests.toy_gans import toy_data

# Toys that were not trained to the end.
pytestmark = pytest.mark.filterwarnings("ignore:AID's damping of 0.1 makes")


class LQ:
    """The game, its stationary point, and the change of a metric where an instance's weight changes."""

    def __init__(self):
        self.X = torch.from_numpy(toy_data()) - 0.5
        rule = SGD(lr=0.1, weight_decay=lq_gan.DECAY)
        self.trainer = GANTrainer(loss="wasserstein", optimizer=rule, latent_dim=2, batch_size=16)
        self.step = self.trainer.make_step(*lq_gan.lq_networks())
        self.source = DataSource(self.X)
        (chunk,) = draw_chunks(self.step, 16, 256, None, check_random_state(self.seed).randint(2**31))
        self.record = self.step.drawn(chunk, self.source)
        self.data = self.X, self.record.latents_d, self.record.latents_g
        start = torch.cat([torch.eye(2).reshape(-1), torch.zeros(8)]).double()
        self.theta = self.solved(torch.ones(16, dtype=torch.float64), lq_gan.descended(start, *self.data))

    # With its latents, 700 steps of descent forget where they began.
    seed = 0

    def solved(self, weights, start=None):
        return lq_gan.stationary(self.theta if start is None else start, weights, *self.data)

    def cleanser(self, **settings):
        backend = AID(random_state=self.seed, **settings)
        networks = lq_gan.loaded_lq(self.theta)
        metric = {"fid": FID(n_samples=60), "loss": DiscriminatorLoss(n_samples=60)}
        return GANInfluence(*networks, trainer=self.trainer, metric=metric, backend=backend, random_state=0).fit(
            self.X, trained=True
        )

    def value(self, cleanser, name, theta):
        generator, discriminator = lq_gan.loaded_lq(theta)
        players = {"G": generator, "D": discriminator}
        params = {p: {n: t.detach() for n, t in module.named_parameters()} for p, module in players.items()}
        state = cleanser.trajectory_.state(0)._replace(params=params)
        return cleanser.evaluator(60).value(cleanser.metrics_[name], state)

    def true(self, cleanser, width=1e-3):
        result = {name: np.zeros(16) for name in cleanser.metrics_}
        for row in range(16):
            for sign in (-1, 1):
                weights = torch.ones(16, dtype=torch.float64)
                weights[row] += sign * width
                theta = self.solved(weights)
                for name, total in result.items():
                    total[row] -= sign * self.value(cleanser, name, theta) / (2 * width)
        return result


@pytest.fixture(scope="module")
def lq():
    return LQ()


@pytest.fixture(scope="module")
def lq_truth(lq):
    return lq.true(lq.cleanser())


def relative_error(found, expected):
    return max(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected)


@pytest.mark.parametrize("solver", ["gmres", "lgmres"])
@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_influence_is_what_the_stationary_point_does_without_an_instance(lq, lq_truth, solver, derivative):
    cleanser = lq.cleanser(solver=solver, derivative=derivative, tol=1e-8)
    assert relative_error(cleanser.influences_, lq_truth) < 1e-6
    assert max(cleanser.backend_.gradient_norms_.values()) < 1e-12
    info = cleanser.backend_.solver_info_["fid"]
    assert info["converged"] and info["residual"] < 1e-8 and info["iterations"] <= 14 and info["seconds"] > 0


@pytest.mark.parametrize("scale", [0.1, "auto"])
def test_the_neumann_series_adds_its_source_in_every_term(lq, lq_truth, scale):
    cleanser = lq.cleanser(solver="neumann", scale=scale, tol=5e-5, depth=2000)
    assert relative_error(cleanser.influences_, lq_truth) < 1e-3


def test_taking_away_a_little_of_an_instance_changes_the_metric_by_as_little_of_its_influence(lq):
    cleanser = lq.cleanser(tol=1e-6)
    row = int(np.argmax(np.abs(cleanser.influence_)))
    weights = torch.ones(16, dtype=torch.float64)
    weights[row] = 0.99
    change = lq.value(cleanser, "fid", lq.solved(weights)) - cleanser.metric_value_
    assert change == pytest.approx(0.01 * cleanser.influence_[row], rel=0.1)


@pytest.mark.filterwarnings("ignore:.*memory_budget")
def test_a_run_that_has_settled_has_the_same_influence_by_iterative_differentiation(lq, lq_truth):
    trainer = clone(lq.trainer).set_params(update="simultaneous")
    cleanser, step = lq.cleanser(tol=1e-8), trainer.make_step(*lq_gan.lq_networks())
    # Each update draws its own latents, as AID takes them to.
    updates, _ = step.plan(0, {}, lambda *_: {})
    drawn = zip(updates, lq.record.updates)
    record = replace(lq.record, updates=tuple(replace(u, draws=own.draws, samples_of=None) for u, own in drawn))
    trajectory = Trajectory({"n_steps": 700, "steps_per_epoch": 1}).bind(step, lq.source)
    for t in range(700):
        trajectory.store.checkpoint(t, cleanser.trajectory_.state(0))
        trajectory.store.add(replace(record, index=t))
    trajectory.store.checkpoint(700, cleanser.trajectory_.state(0))
    itd = ITD(delta=1e-3).fit(trajectory, {"fid": cleanser.gradients_["fid"]})
    assert relative_error(itd.influences_, {"fid": lq_truth["fid"]}) < 1e-4
    assert relative_error(itd.influences_, {"fid": cleanser.influences_["fid"]}) < 1e-4
