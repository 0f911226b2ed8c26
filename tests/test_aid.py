"""AID as a back-end."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.nn.functional import softplus

from ganclean import GANInfluence, GANTrainer, Update
from ganclean.backends import AID, ITD, InfluenceBackend, resolve_backend
from ganclean.data import DataSource
from ganclean.dynamics.state import map_state, ravel
from ganclean.exceptions import NetworkError, TrajectoryError
from ganclean.losses import R1
from ganclean.metrics import FID, SampleMean
from ganclean.optim import SGD
from ganclean.validation import cleansing_curve, counterfactual_retrain
from tests.reference.game_jacobian import flat
from tests.toy_games import GAMES, LABELS, X, frozen_networks
from tests.toy_gans import toy_cleanser, toy_networks

# Toys that were not trained to the end.
pytestmark = pytest.mark.filterwarnings("ignore:AID's damping of 0.1 makes")
FEW = {"tol": 1e-8, "delta": 1e-4}


def trained_cleanser(networks=None, **settings):
    trainer = settings.pop("trainer", GANTrainer(latent_dim=3, penalty=R1(gamma=1.0)))
    settings = {"metric": FID(n_samples=60), "backend": AID(damping=0.1), "n_remove": 4, "random_state": 0} | settings
    return GANInfluence(*(toy_networks() if networks is None else networks), trainer=trainer, **settings)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_scores_do_not_depend_on_chunks_or_processes(derivative, monkeypatch):
    def elsewhere(function, jobs, *_):
        assert len(jobs) == 2
        return [function(*pickle.loads(pickle.dumps(job))) for job in jobs]

    whole = toy_cleanser(backend=AID(derivative=derivative, damping=0.1)).fit(X)
    u = next(iter(whole.backend_._solved.values()))[1]
    whole.backend_.set_params(batch_size=3, n_jobs=2)
    monkeypatch.setattr("ganclean.backends.aid.side_by_side", elsewhere)
    found = whole.backend_._scores(whole.trajectory_, u, whole.trajectory_.source)
    np.testing.assert_allclose(found, whole.influence_, rtol=1e-9)


def test_instances_that_were_not_trained_on_are_scored_alike():
    cleanser = toy_cleanser(
        backend=AID(damping=0.1, batch_size=5, **FEW), metric={"a": FID(n_samples=40), "b": SampleMean()}
    )
    cleanser.fit(X)
    np.testing.assert_allclose(cleanser.score_samples(X), cleanser.harmfulness_, rtol=1e-12)
    np.testing.assert_allclose(cleanser.score_samples(X[4:6]), cleanser.harmfulness_[4:6], rtol=1e-9)
    scaled = map_state(lambda t: 2 * t, cleanser.gradients_["b"])
    doubled = cleanser.backend_.score_samples(cleanser.trajectory_, scaled, DataSource(X))
    np.testing.assert_allclose(doubled, 2 * cleanser.influences_["b"], rtol=1e-5)


def test_a_recorded_run_and_its_final_networks_alone_give_the_same():
    recorded = toy_cleanser(backend=AID(damping=0.1, **FEW), n_epochs=4).fit(X)
    state = recorded.trajectory_.state(len(recorded.trajectory_))
    networks = recorded.generator_, recorded.discriminator_
    alone = trained_cleanser(networks, trainer=clone(recorded.trainer), backend=clone(recorded.backend)).fit(
        X, trained=True
    )
    np.testing.assert_allclose(alone.influence_, recorded.influence_, rtol=1e-10)
    assert len(alone.trajectory_) == 0
    assert torch.equal(ravel(alone.trajectory_.state(0).generator), ravel(state.generator))


def test_a_trained_model_alone_is_cleansed_and_not_trained(monkeypatch):
    monkeypatch.setattr(GANTrainer, "train", lambda *_, **__: pytest.fail("training has begun"))
    generator, discriminator = toy_networks()
    before = copy.deepcopy(generator.state_dict())
    cleanser = trained_cleanser((generator, discriminator))
    kept, labels = cleanser.fit_resample(X, np.arange(16), trained=True)
    assert kept.shape == (12, 2) and np.array_equal(kept, X[labels])
    assert all(torch.equal(p, before[n]) for n, p in cleanser.generator_.state_dict().items())
    assert np.array_equal(cleanser.transform(X), kept)
    assert cleanser.sample(5)[0].shape == (5, 2)
    assert cleanser.score(X) == pytest.approx(-cleanser.metric_value_)
    np.testing.assert_allclose(cleanser.score_samples(X), cleanser.harmfulness_)
    assert len(cleanser.transform(X[:3])) == cleanser.support_[:3].sum()


@pytest.mark.parametrize(
    "ask",
    [
        lambda cleanser: cleanser.smoothness_,
        lambda cleanser: counterfactual_retrain(cleanser, [[3]]),
        lambda cleanser: counterfactual_retrain(cleanser, [[3]], seeds=[0]),
        lambda cleanser: counterfactual_retrain(cleanser, [[3]], first_step=0),
        lambda cleanser: cleansing_curve(cleanser, X, n_seeds=1),
        lambda cleanser: ITD().fit(cleanser.trajectory_, cleanser.gradients_),
    ],
)
def test_what_needs_a_run_says_so(ask):
    cleanser = trained_cleanser().fit(X, trained=True)
    with pytest.raises(TrajectoryError, match=r"needs a recorded run to trace or replay.*Leave trained out"):
        ask(cleanser)


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
        trained_cleanser().set_params(**changes).fit(X, trained=True, **fit)


def test_latents_that_do_not_fit_trained_networks_are_named():
    with pytest.raises(NetworkError, match="latent_dim of the trainer"):
        trained_cleanser(trainer=None).fit(X, trained=True)


@pytest.mark.parametrize("derivative", ["secant", "exact"])
def test_an_average_is_followed_and_frozen_parameters_are_left_out(derivative):
    backend = AID(damping=0.1, derivative=derivative, **FEW)
    plain = trained_cleanser(frozen_networks(), backend=backend).fit(X, trained=True)
    averaged = trained_cleanser(frozen_networks(), backend=backend)
    averaged.set_params(trainer__ema_decay=0.9).fit(X, trained=True)
    np.testing.assert_allclose(averaged.influence_, plain.influence_, rtol=1e-10)
    generator, discriminator = frozen_networks()
    assert sum(plain.backend_._game(plain.trajectory_, plain.trajectory_.source).sizes) == len(
        torch.cat([flat(generator), flat(discriminator)])
    )


def test_networks_in_single_precision_take_part():
    cleanser = trained_cleanser([net.float() for net in toy_networks()]).fit(X, trained=True)
    exact = trained_cleanser([net.float() for net in toy_networks()], backend=AID(damping=0.1, derivative="exact"))
    assert cleanser.backend_.solver_info_["FID"]["converged"] and cleanser.influence_.dtype == np.float64
    expected = exact.fit(X, trained=True).influence_
    np.testing.assert_allclose(cleanser.influence_, expected, atol=0.02 * np.abs(expected).max())


def test_conditional_networks_take_part():
    networks = GAMES["conditional"][0]()
    cleanser = trained_cleanser(networks, trainer=GANTrainer(latent_dim=3, conditional=True)).fit(
        X, LABELS, trained=True
    )
    np.testing.assert_allclose(cleanser.score_samples(X, LABELS), cleanser.harmfulness_)
    assert cleanser.sample(4)[1].shape == (4,)


def test_the_network_of_a_lazy_penalty_sees_it_as_it_is_on_average():
    lazy, steady = (
        trained_cleanser(trainer=GANTrainer(latent_dim=3, penalty=R1(1.0, every=every))).fit(X, trained=True).influence_
        for every in (8, 1)
    )
    np.testing.assert_allclose(lazy, steady)


def test_progress_is_reported():
    calls = []
    cleanser = trained_cleanser().fit(X, trained=True)
    cleanser.backend_.fit(cleanser.trajectory_, cleanser.gradients_, lambda *args: calls.append(args))
    solving = [call for call in calls if call[0] == "solving"]
    assert solving[0] == ("solving", 1, 500) and solving[1] == ("solving", 2, 500)
    assert calls[-1] == ("scoring", 1, 1)


def test_a_run_for_aid_keeps_no_more_than_its_ends():
    cleanser = toy_cleanser(backend=AID(damping=0.1), n_epochs=5).fit(X)
    assert len(cleanser.trajectory_.store.kept()) == 5


def test_the_cost_is_that_of_as_many_products_as_the_solver_may_take():
    costs = [toy_cleanser(backend=AID(max_iter=n)).estimate_cost(X) for n in (10, 1000)]
    assert costs[0].n_traced == 3 and costs[1].seconds_tracing > 10 * costs[0].seconds_tracing > 0
    assert AID(solver="neumann", depth=7).passes() == 7 and ITD().passes() == 1


def test_aid_is_an_estimator_with_a_name():
    assert isinstance(resolve_backend("aid"), AID) and isinstance(AID(), InfluenceBackend)
    backend = AID(solver="neumann", damping=0.2)
    assert clone(backend).get_params() == backend.get_params()
    cleanser = trained_cleanser().set_params(backend__damping=0.3)
    assert cleanser.backend.damping == 0.3 and AID.needs_run is False and ITD.needs_run is True
    influences = [trained_cleanser().fit(X, trained=True).influence_ for _ in range(2)]
    assert np.array_equal(*influences)
    other = trained_cleanser(backend=AID(damping=0.1, random_state=1)).fit(X, trained=True).influence_
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
    monkeypatch.setattr(GANTrainer, "train", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(ValueError, match=message):
        toy_cleanser(backend=AID(**settings)).fit(X)


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
    assert trained_cleanser(networks, trainer=trainer).fit(X, trained=True).influence_.any()
    with pytest.raises(NetworkError, match="derivative='secant'"):
        trained_cleanser(networks, trainer=trainer, backend=AID(derivative="exact")).fit(X, trained=True)


def test_players_and_objectives_of_ones_own_take_part():
    def judge(nets, batch, weights):
        return (weights * softplus(-nets.D(batch.x).flatten())).mean() + softplus(nets.D(nets.G(batch.latents))).mean()

    def convince(nets, batch, weights):
        return softplus(-nets.D(nets.G(batch.latents))).mean()

    def recover(nets, batch, weights):
        return (nets.Q(nets.G(batch.latents)) - batch.latents).square().mean()

    rule = SGD(lr=0.1)
    updates = [Update("D", judge, rule), Update("G", convince, rule), Update(("G", "Q"), recover, rule, due=2)]
    cleanser = toy_cleanser(updates=updates, optimizer=None, backend=AID(damping=0.5, batch_size=5, **FEW))
    cleanser.set_params(players={"Q": nn.Linear(2, 3).double()}).fit(X)
    assert {*cleanser.backend_.gradient_norms_} == {"G", "D", "Q"} and np.ptp(cleanser.influence_) > 0
    np.testing.assert_allclose(cleanser.score_samples(X[4:6]), cleanser.harmfulness_[4:6], rtol=1e-9)
    exact = clone(cleanser).set_params(backend__derivative="exact").fit(X, trajectory=cleanser.trajectory_)
    np.testing.assert_allclose(exact.influence_, cleanser.influence_, rtol=1e-4)
