import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

from ganclean import GANInfluence
from ganclean.backends import ITD
from ganclean.metrics import FID
from ganclean.networks import MLPDiscriminator, MLPGenerator
from ganclean.optim import Adam
from tests.toy_gans import toy_cleanser, toy_networks, toy_trainer


def test_the_same_random_state_reproduces_everything(cleanser, X):
    again = toy_cleanser().fit(X)
    assert np.array_equal(again.influence_, cleanser.influence_)
    assert again.score(X[:9]) == cleanser.score(X[:9])
    other = toy_cleanser().set_params(random_state=1).fit(X)
    assert not np.array_equal(other.influence_, cleanser.influence_)


def test_a_random_state_instance_is_drawn_from(X):
    first, second = (toy_cleanser().set_params(random_state=np.random.RandomState(7)).fit(X) for _ in range(2))
    assert np.array_equal(first.influence_, second.influence_)


def test_fitting_twice_forgets_the_first_time(cleanser, X):
    twice = toy_cleanser().fit(X[:10] + 3, X_val=X[:4]).fit(X)
    assert np.array_equal(twice.influence_, cleanser.influence_)
    assert twice.metric_value_ == cleanser.metric_value_


@pytest.mark.parametrize("training", [True, False])
def test_the_given_parts_are_never_changed(training, X):
    generator, discriminator = toy_networks()
    extractor = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).double()
    parts = [part.train(training) for part in (generator, discriminator, extractor)]
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    metric, trainer, backend = FID(extractor, n_samples=60), toy_trainer(), ITD()
    cleanser = GANInfluence(generator, discriminator, trainer=trainer, metric=metric, backend=backend, random_state=0)
    cleanser.fit(X).score_samples(X[:3])
    for part, state in zip(parts, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in part.parameters())
        assert all(module.training == training for module in part.modules())
    assert not hasattr(metric, "mean_") and not hasattr(backend, "influences_")
    assert cleanser.trainer is trainer and cleanser.generator is generator and cleanser.metric is metric


def test_modules_factories_and_defaults_are_interchangeable(X):
    shapes = []

    def make_generator(sample_shape):
        shapes.append(sample_shape)
        return toy_networks()[0]

    from_factories = toy_cleanser((make_generator, lambda _: toy_networks()[1])).fit(X)
    assert shapes == [(2,)]
    assert np.array_equal(from_factories.influence_, toy_cleanser().fit(X).influence_)
    assert np.isfinite(toy_cleanser((None, toy_networks()[1])).fit(X).influence_).all()
    default = toy_cleanser((None, None)).fit(X)
    assert isinstance(default.generator_, MLPGenerator) and isinstance(default.discriminator_, MLPDiscriminator)


def test_factories_draw_their_weights_from_the_random_state(X):
    def cleanser(seed):
        def generator(sample_shape):
            return MLPGenerator(sample_shape, latent_dim=3, width=4).double()

        return GANInfluence(generator, trainer=toy_trainer(n_epochs=1), random_state=seed).fit(X)

    torch.manual_seed(1)
    first = cleanser(0)
    torch.manual_seed(2)
    assert np.array_equal(cleanser(0).influence_, first.influence_)
    assert not torch.equal(
        cleanser(1).trajectory_.state(0).generator["0.weight"], first.trajectory_.state(0).generator["0.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_run_has_the_type_of_the_modules(dtype, X):
    networks = [network.to(dtype) for network in toy_networks()]
    for data in (X, X.astype(np.float32), torch.from_numpy(X.astype(np.float32)), (10 * X).astype(np.int64)):
        cleanser = toy_cleanser(networks, n_epochs=1).fit(data)
        assert cleanser.trajectory_[0].latents_d.dtype == dtype
        assert cleanser.trajectory_.state(1).generator["0.weight"].dtype == dtype
        assert cleanser.trajectory_.source[[0]].dtype == dtype
        assert cleanser.influence_.dtype == np.float64


def test_default_networks_take_the_precision_of_the_data(X):
    for data, dtype in ((X, torch.float64), (X.astype(np.float32), torch.float32)):
        cleanser = GANInfluence(trainer=toy_trainer(n_epochs=1), random_state=0).fit(data)
        assert next(cleanser.generator_.parameters()).dtype == dtype


def test_a_default_network_takes_the_precision_of_the_one_beside_it(X):
    generator, discriminator = (network.float() for network in toy_networks())
    for networks in ((generator, None), (None, discriminator)):
        cleanser = toy_cleanser(networks, n_epochs=1).fit(X)
        assert {p.dtype for p in cleanser.generator_.parameters()} == {torch.float32}


def test_single_and_double_precision_agree(cleanser, X):
    single = toy_cleanser([network.float() for network in toy_networks()])
    single.fit(X)
    assert np.corrcoef(single.influence_, cleanser.influence_)[0, 1] > 0.9


def test_every_part_is_reached_through_set_params():
    cleanser = toy_cleanser(optimizer=Adam())
    cleanser.set_params(backend__last_epochs=2, trainer__optimizer__lr=0.5, metric__n_samples=9, n_remove=3)
    assert cleanser.backend.last_epochs == 2
    assert cleanser.trainer.optimizer.lr == 0.5
    assert cleanser.metric.n_samples == 9
    params = cleanser.get_params()
    assert params["backend__delta"] == 1e-2 and params["trainer__optimizer__betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="Invalid parameter 'epochs'"):
        cleanser.set_params(trainer__epochs=3)


def test_a_clone_has_the_parameters_and_nothing_learned(cleanser, X):
    copied = clone(cleanser)
    assert not hasattr(copied, "influence_")
    assert copied.generator is not cleanser.generator
    assert copied.get_params()["trainer__optimizer__lr"] == cleanser.trainer.optimizer.lr
    assert np.array_equal(copied.fit(X).influence_, cleanser.influence_)


def test_the_constructor_stores_its_arguments_untouched():
    arguments = {"trainer": object(), "metric": object(), "backend": object(), "n_remove": object()}
    cleanser = GANInfluence("anything", 3, **arguments)
    assert (cleanser.generator, cleanser.discriminator) == ("anything", 3)
    assert all(getattr(cleanser, name) is value for name, value in arguments.items())


def test_a_fitted_cleanser_survives_pickling(cleanser, X):
    again = pickle.loads(pickle.dumps(cleanser))
    new = np.random.default_rng(5).normal(size=(9, 2))
    assert np.array_equal(again.influence_, cleanser.influence_)
    assert np.array_equal(again.transform(X), cleanser.transform(X))
    assert np.array_equal(again.score_samples(new), cleanser.score_samples(new))
    assert np.array_equal(again.sample(3)[0], cleanser.sample(3)[0])


def test_a_fitted_cleanser_with_a_trajectory_on_disk_survives_pickling(X, tmp_path):
    cleanser = toy_cleanser(store=tmp_path / "run").fit(X)
    again = pickle.loads(pickle.dumps(cleanser))
    assert np.array_equal(again.score_samples(X[:3]), cleanser.score_samples(X[:3]))
