import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import spectral_norm as spectral_norm_by_hook
from torch.nn.utils.parametrizations import spectral_norm

from ganclean import GANInfluence, GANTrainer
from ganclean.data import DataSource
from ganclean.exceptions import GANCleanError, NetworkError, NonFiniteError
from ganclean.losses import LOSSES, R1
from ganclean.optim import SGD, Adam
from tests.reference.eager_training import LOSSES as REFERENCE
from tests.reference.eager_training import train_eagerly
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks, toy_trainer


def recorded(trainer, X, networks=None, random_state=0):
    generator, discriminator = toy_networks() if networks is None else networks
    step = trainer.make_step(generator, discriminator)
    return trainer.train(step, DataSource(X), trainer.describe(step, len(X), ""), random_state=random_state)


def assert_same(params, module):
    expected = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    torch.testing.assert_close(params, expected, rtol=1e-9, atol=1e-11)


SETTINGS = {
    "sgd": {"optimizer": OPTIMIZERS["sgd"]},
    "nesterov": {"optimizer": OPTIMIZERS["nesterov"]},
    "adam": {"optimizer": Adam(lr=1e-2, betas=(0.0, 0.99), weight_decay=1e-2)},
    "moving average": {"optimizer": OPTIMIZERS["adam"], "ema_decay": 0.9},
    "two optimizers": {"optimizer_generator": OPTIMIZERS["adam"], "optimizer_discriminator": OPTIMIZERS["momentum"]},
}


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("loss", ["non_saturating", "minimax"])
def test_twenty_steps_equal_a_plain_loop_with_torch_optimizers(settings, update, loss):
    X = toy_data(19)
    trainer = toy_trainer(loss=loss, update=update, n_epochs=5, **settings)
    trajectory = recorded(trainer, X)
    assert len(trajectory) == 20
    final = trajectory.state(20)
    generator, discriminator, average = train_eagerly(*toy_networks(), trainer, torch.from_numpy(X), trajectory)
    assert_same(final.generator, generator)
    assert_same(final.discriminator, discriminator)
    assert_same(final.evaluated["G"], average)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_as_in_a_plain_loop(loss):
    X = toy_data()
    trainer = toy_trainer(loss=loss)
    trajectory = recorded(trainer, X)
    generator, discriminator, _ = train_eagerly(*toy_networks(), trainer, torch.from_numpy(X), trajectory)
    assert_same(trajectory.state(9).generator, generator)
    assert_same(trajectory.state(9).discriminator, discriminator)


@given(n_samples=st.integers(2, 40), data=st.data(), n_epochs=st.integers(1, 3))
def test_every_instance_is_drawn_exactly_once_in_an_epoch(n_samples, data, n_epochs):
    batch_size = data.draw(st.integers(1, n_samples))
    trainer = toy_trainer(batch_size=batch_size, n_epochs=n_epochs)
    step = trainer.make_step(*toy_networks())
    source = DataSource(np.zeros((n_samples, 2)))
    records = [step.drawn(record, source) for record in trainer.draw(step, source, random_state=1)]
    per_epoch = trainer.describe(step, n_samples, "")["steps_per_epoch"]
    assert [record.index for record in records] == list(range(n_epochs * per_epoch))
    for start in range(0, len(records), per_epoch):
        drawn = torch.cat([record.indices for record in records[start : start + per_epoch]])
        assert torch.equal(drawn.sort().values, torch.arange(n_samples))
    assert all(len(record.latents_d) == len(record.indices) == len(record.latents_g) for record in records)


def test_epochs_differ_in_their_order():
    trajectory = recorded(toy_trainer(batch_size=16, n_epochs=2), toy_data())
    assert not torch.equal(trajectory[0].indices, trajectory[1].indices)


def test_a_simultaneous_update_shares_its_latents_and_an_alternating_one_does_not():
    shared = recorded(toy_trainer(update="simultaneous"), toy_data())
    fresh = recorded(toy_trainer(update="alternating"), toy_data())
    records = [shared[t] for t in range(9)]
    assert all(record.latents_g is record.latents_d for record in records)
    assert not any(torch.equal(fresh[t].latents_g, fresh[t].latents_d) for t in range(9))


@pytest.mark.parametrize(("batch_size", "n_samples", "expected"), [("auto", 100, 64), ("auto", 20, 20), (7, 20, 7)])
def test_an_automatic_batch_holds_64_instances_or_all(batch_size, n_samples, expected):
    assert GANTrainer(batch_size=batch_size).batch_size_for(n_samples) == expected


def test_latents_may_have_any_shape():
    generator = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).double()
    trajectory = recorded(toy_trainer(latent_dim=(3, 2)), toy_data(), (generator, toy_networks()[1]))
    assert trajectory[0].latents_d.shape == (6, 3, 2)


def with_dropout():
    generator, discriminator = toy_networks()
    return generator.insert(1, nn.Dropout(0.4)), discriminator.insert(1, nn.Dropout(0.4))


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_dropout_is_replayed_from_the_recorded_seed(update):
    X = toy_data()
    trajectory = recorded(toy_trainer(update=update), X, with_dropout())
    record, state = trajectory[4], trajectory.state(4)
    real = torch.from_numpy(X)[record.indices]
    torch.manual_seed(99)
    again, other = trajectory.step(state, record, real), trajectory.step(state, replace(record, seed=1), real)
    expected = trajectory.state(5)
    for player in ("generator", "discriminator"):
        assert all(torch.equal(p, getattr(expected, player)[name]) for name, p in getattr(again, player).items())
        assert any(not torch.equal(p, getattr(expected, player)[name]) for name, p in getattr(other, player).items())


class Draws(nn.Module):
    """Notes a random number at each pass."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.drawn = []

    def forward(self, x):
        self.drawn.append(torch.rand(1).item())
        return self.module(x)


@pytest.mark.parametrize(("update", "n_different"), [("alternating", 2), ("simultaneous", 1)])
def test_the_generators_two_passes_share_their_randomness_where_they_share_their_latents(update, n_different):
    trainer = toy_trainer(update=update)
    step = trainer.make_step(*(Draws(network) for network in toy_networks()))
    source = DataSource(toy_data())
    record = step.drawn(next(trainer.draw(step, source, random_state=0)), source)
    step(step.initial_state(), record, torch.from_numpy(toy_data())[record.indices])
    generator, discriminator = (player.module.drawn for player in step.networks.values())
    assert len(generator) == 2 and len(set(generator)) == n_different
    assert len(discriminator) == len(set(discriminator)) == 3


def test_two_steps_do_not_drop_the_same_units():
    trajectory = recorded(toy_trainer(), toy_data(), with_dropout())
    assert len({trajectory[t].seed for t in range(9)}) == 9


def test_the_same_random_state_gives_the_same_numbers():
    first, second = (GANInfluence(trainer=toy_trainer(), random_state=3).fit(toy_data()) for _ in range(2))
    other = GANInfluence(trainer=toy_trainer(), random_state=4).fit(toy_data())
    assert np.array_equal(first.influence_, second.influence_)
    assert first.metric_value_ == second.metric_value_
    assert not np.array_equal(first.influence_, other.influence_)


@pytest.mark.parametrize(
    "networks", [toy_networks(), with_dropout(), (None, None)], ids=["given", "dropout", "default"]
)
def test_global_random_numbers_are_neither_used_nor_disturbed(networks):
    cleanser = toy_cleanser(networks)
    torch.manual_seed(5)
    np.random.seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    cleanser.fit(toy_data())
    cleanser.score_samples(toy_data(5))
    cleanser.score(toy_data())
    cleanser.sample(3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])


def one_step(loss="non_saturating", optimizer=OPTIMIZERS["sgd"], **settings):
    X = toy_data()
    trainer = toy_trainer(loss=loss, optimizer=optimizer, n_epochs=1, **settings)
    step = trainer.make_step(*toy_networks())
    source = DataSource(X)
    record = step.drawn(next(trainer.draw(step, source, random_state=0)), source)
    return step, step.initial_state(), record, torch.from_numpy(X)[record.indices]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("scale", "expected_divisor"), [(1.0, 6), (6 / 4, 4)])
def test_weights_of_zero_take_the_terms_out_of_the_discriminators_loss(loss, scale, expected_divisor):
    step, state, record, real = one_step(loss, SGD(lr=0.1))
    weights = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.float64)
    after = step(state, record, real, scale * weights)

    generator, discriminator = toy_networks()
    of_real, of_fake, _ = REFERENCE[loss]
    terms = of_real(discriminator(real[[0, 2, 3, 5]]).flatten())
    fake = of_fake(discriminator(generator(record.latents_d).detach()).flatten()).mean()
    (terms.sum() / expected_divisor + fake).backward()
    with torch.no_grad():
        expected = {name: p - 0.1 * p.grad for name, p in discriminator.named_parameters()}
    torch.testing.assert_close(after.discriminator, expected, rtol=1e-10, atol=1e-12)


def test_weights_of_one_change_nothing():
    step, state, record, real = one_step()
    plain, weighted = step(state, record, real), step(state, record, real, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(weighted.generator, plain.generator, rtol=1e-12, atol=0)


def test_a_step_leaves_the_state_before_it_alone():
    step, state, record, real = one_step(optimizer=OPTIMIZERS["adam"], ema_decay=0.5)
    before = copy.deepcopy(state)
    step(state, record, real)
    assert all(torch.equal(p, before.generator[name]) for name, p in state.generator.items())
    assert all(torch.equal(p, before.average[name]) for name, p in state.average.items())


class Autoencoder(nn.Module):
    """Encodes and decodes with one weight."""

    def __init__(self, n_in, n_hidden, n_out, activation):
        super().__init__()
        self.encode, self.decode, self.last = (
            nn.Linear(n_in, n_hidden),
            nn.Linear(n_in, n_hidden),
            nn.Linear(n_in, n_out),
        )
        self.decode.weight = self.encode.weight
        self.activation = activation

    def forward(self, x):
        hidden = self.activation(self.encode(x) + self.decode(x.flip(1)))
        return self.last(hidden @ self.decode.weight)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_networks_with_tied_weights_train_as_in_a_plain_loop(update):
    def make():
        torch.manual_seed(0)
        return Autoencoder(3, 6, 2, nn.Tanh()).double(), Autoencoder(2, 6, 1, nn.Softplus()).double()

    X = toy_data()
    trainer = toy_trainer(update=update)
    trajectory = recorded(trainer, X, make())
    generator, discriminator, _ = train_eagerly(*make(), trainer, torch.from_numpy(X), trajectory)
    assert_same(trajectory.state(9).generator, generator)
    assert_same(trajectory.state(9).discriminator, discriminator)


class Odd(nn.Module):
    """A network whose output is changed in some way."""

    def __init__(self, module, change):
        super().__init__()
        self.module = module
        self.change = change

    def forward(self, x):
        return self.change(self.module(x))


class TakesLabels(nn.Module):
    """A network that adds the label to its output."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, label):
        return self.module(x) + label[:, None]


G, D = toy_networks()
WRONG_NETWORKS = {
    "generator returns a tuple": (Odd(G, lambda x: (x, x)), D, "generator's forward returned a tuple; expected one"),
    "generator returns another shape": (
        Odd(G, lambda x: x[:, :, None]),
        D,
        r"samples have shape \(2, 1\), the data's \(2,\)",
    ),
    "generator takes labels": (
        TakesLabels(nn.Linear(3, 2).double()),
        D,
        r"generator's forward does not take 1 input \(.*set GANTrainer\(conditional=True\)",
    ),
    "discriminator takes labels": (
        G,
        TakesLabels(D),
        r"discriminator's forward does not take 1 input \(.*set GANTrainer\(conditional=True\)",
    ),
    "generator takes other latents": (
        nn.Linear(4, 2).double(),
        D,
        r"generator fails on an input of shape \(2, 3\).*latent_dim of the trainer",
    ),
    "generator is frozen": (copy.deepcopy(G).requires_grad_(False), D, "generator has no trainable parameter"),
    "generator has no parameter": (nn.Identity(), D, "generator has no trainable parameter"),
    "generator mixes types": (
        nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2).double()),
        D,
        "generator's parameters mix types or devices",
    ),
    "discriminator returns a tuple": (G, Odd(D, lambda x: (x, x)), "discriminator's forward returned a tuple"),
    "discriminator returns two numbers": (
        G,
        nn.Linear(2, 2).double(),
        r"output for 2 samples has shape \(2, 2\); expected one number per sample",
    ),
    "discriminator returns one number": (
        G,
        Odd(D, lambda x: x.mean()),
        r"output for 2 samples has shape \(\); expected one number per sample",
    ),
    "discriminator takes other samples": (
        G,
        nn.Linear(5, 1).double(),
        r"discriminator fails on an input of shape \(2, 2\).*the shape of the data",
    ),
    "discriminator is in another precision": (
        G,
        nn.Linear(2, 1),
        r"generator's parameters are torch.float64 on cpu, the discriminator's\s+torch.float32",
    ),
}


@pytest.mark.parametrize(("generator", "discriminator", "message"), WRONG_NETWORKS.values(), ids=WRONG_NETWORKS)
def test_networks_that_cannot_take_part_are_refused_with_the_reason(generator, discriminator, message):
    with pytest.raises(NetworkError, match=f"(?s){message}"):
        toy_cleanser((generator, discriminator)).fit(toy_data())


@pytest.mark.parametrize(
    ("networks", "y", "message"),
    [
        ((TakesLabels(G), TakesLabels(D)), None, "networks are conditional, but there are no labels. Pass them as y"),
        ((G, TakesLabels(D)), range(16), r"generator's forward does not take 2 inputs \("),
        ((TakesLabels(G), D), range(16), r"discriminator's forward does not take 2 inputs \("),
    ],
    ids=["no labels", "generator ignores them", "discriminator ignores them"],
)
def test_conditional_training_needs_labels_and_networks_that_take_them(networks, y, message):
    with pytest.raises(NetworkError, match=message):
        toy_cleanser(networks, conditional=True).fit(toy_data(), y)


class Counts(nn.Module):
    """Adds up in a buffer what passes through."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.total += x.detach().sum()
        return x


def test_a_buffer_that_changes_in_an_unknown_way_gives_a_warning_that_names_it():
    generator = nn.Sequential(*G, Counts())
    with pytest.warns(UserWarning, match=r"generator's buffer '3.total' \(Counts\) changes .* no derivative flows"):
        toy_cleanser((generator, D)).fit(toy_data())
    assert generator[3].total == 0


@pytest.mark.parametrize(
    "networks",
    [
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), D),
        (G, nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)).double()),
        (G, nn.Sequential(spectral_norm(nn.Linear(2, 6).double()), nn.Tanh(), nn.Linear(6, 1).double())),
        (G, nn.Sequential(nn.Linear(2, 6), nn.Tanh(), spectral_norm_by_hook(nn.Linear(6, 1))).double()),
    ],
    ids=["generator, batch", "discriminator, batch", "spectral", "spectral, hook"],
)
def test_normalisations_are_known_and_give_no_warning(networks, recwarn):
    toy_cleanser(networks).fit(toy_data())
    assert not [warning for warning in recwarn if "buffer" in str(warning.message)]


NORMALISED = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


@pytest.mark.parametrize(
    ("networks", "player"),
    [((NORMALISED, D), "generator"), ((G, nn.Sequential(nn.BatchNorm1d(2), *D).double()), "discriminator")],
    ids=["generator", "discriminator"],
)
@pytest.mark.parametrize("batch_size", [1, 5, 15])
def test_a_last_batch_that_is_too_small_for_batch_normalisation_is_refused_before_training(
    networks, player, batch_size, monkeypatch
):
    monkeypatch.setattr(GANTrainer, "train", lambda *_, **__: pytest.fail("training has begun"))
    message = f"The {player} fails on a batch of one instance, which 16 instances in batches of {batch_size} leave"
    for call in ("fit", "estimate_cost"):
        with pytest.raises(NetworkError, match=rf"(?s){message}: .* Choose a batch_size that leaves none or several"):
            getattr(toy_cleanser(networks, batch_size=batch_size), call)(toy_data())


@pytest.mark.parametrize("batch_size", [6, 14, 16])
def test_a_last_batch_of_two_is_enough_for_batch_normalisation(batch_size):
    assert np.isfinite(toy_cleanser((NORMALISED, D), batch_size=batch_size).fit(toy_data()).influence_).all()


def test_a_last_batch_of_one_instance_is_allowed_where_the_networks_take_it():
    assert len(toy_cleanser(batch_size=5).fit(toy_data()).trajectory_[3].indices) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 17}, "batch_size=17 is larger than the data, which has 16 instances"),
        ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer; got 2.5"),
        ({"n_epochs": 0}, "n_epochs must be a positive integer; got 0"),
        ({"checkpoint_every": -1}, "checkpoint_every must be a positive integer or 'auto'; got -1"),
        ({"update": "both"}, r"update must be one of \['alternating', 'simultaneous'\]; got 'both'"),
        ({"n_critic": 0}, "n_critic must be a positive integer; got 0"),
        ({"memory_budget": 1.5}, "memory_budget must be a positive integer; got 1.5"),
        ({"penalty": "r1"}, r"penalty must be None, R1\(\), GradientPenalty\(\) or a Penalty of your own; got 'r1'"),
        ({"penalty": R1(every=0)}, r"every must be a positive integer; got R1\(every=0\)"),
        ({"ema_decay": 1.0}, r"ema_decay must be None, a number in \[0, 1\), .*; got 1.0"),
        ({"loss": "bce"}, "loss must be one of"),
        ({"optimizer": "adam"}, "optimizer must be a ganclean.optim rule such as SGD or Adam; got 'adam'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        toy_cleanser(**settings).fit(toy_data())


@pytest.mark.parametrize("network", ["generator", 3], ids=["string", "number"])
def test_a_network_must_be_a_module_or_a_factory(network):
    with pytest.raises(ValueError, match=r"generator must be a torch.nn.Module, a function from the shape of one"):
        toy_cleanser((network, D)).fit(toy_data())


def test_diverging_training_names_the_step():
    with pytest.raises(NonFiniteError, match="Training diverged: a parameter is NaN or infinite by step 3 of 9"):
        toy_cleanser(loss="least_squares", optimizer=SGD(lr=1e200)).fit(toy_data())


def test_every_error_of_the_package_has_one_base_class():
    assert issubclass(NetworkError, GANCleanError) and issubclass(NetworkError, ValueError)
    assert issubclass(NonFiniteError, GANCleanError) and issubclass(NonFiniteError, ArithmeticError)
