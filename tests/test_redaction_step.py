"""One training step of redaction against plain PyTorch, for every way of training."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ganclean import GANInfluence, GANTrainer, Update
from ganclean.backends import ITD
from ganclean.data import DataSource
from ganclean.dynamics import capture
from ganclean.dynamics.capture import CompiledStep
from ganclean.dynamics.network import loaded
from ganclean.dynamics.record import UpdateRecord
from ganclean.dynamics.state import flatten_state
from ganclean.dynamics.update import Batch
from ganclean.losses import LOSSES, R1, NonSaturating
from ganclean.metrics import FID
from ganclean.recipes import gan
from ganclean.recipes.adversarial import DiscriminatorObjective
from ganclean.recipes.redacting import NegativeBuffer, RedactingDiscriminator, guided, redaction
from tests.practice import LATENT, PRACTICE, practised
from tests.reference.redaction_training import redact_eagerly
from tests.toy_gans import OPTIMIZERS, toy_data, toy_networks, toy_trainer

DOUBLE = {"dtype": torch.float64}


def mean_score(x):
    """A score with values on both sides of 1."""
    return 2 * torch.sigmoid(3 * x.flatten(1).mean(dim=1))


def centred_score(x):
    """A score that takes its own mean for a constant."""
    score = mean_score(x)
    return score * (0.7 / score.mean().detach())


def filled(shape, labels=None, n=11):
    buffer = NegativeBuffer(100)
    noise = torch.Generator().manual_seed(5)
    buffer.add(torch.randn(n, *shape, generator=noise, **DOUBLE), labels)
    return buffer


def redacting(step, **settings):
    """A step with the updates of redaction."""
    return replace(step, updates=tuple(redaction(step.updates, **settings)))


def run(trainer, step, source):
    """The records of a run and the state in its end."""
    steps = list(trainer.run(step, source, step.initial_state(), 0))
    return [step.drawn(record, source) for record, _ in steps], steps[-1][1]


def both_ways(trainer, networks, X, y=None, labels=None, lam=0.7, score=None, guide="penalty", smoothing=(0, 0)):
    """The networks that the library trains, and those that a plain loop trains on the same draws."""
    settings = {"lam": lam, "score": score, "guide": guide, "label_smoothing": smoothing}
    step = redacting(trainer.make_step(*networks), buffer=filled(X.shape[1:], labels), **settings)
    records, state = run(trainer, step, DataSource(X, labels=y))
    ours = (
        loaded(step.generator, {**state.buffers["G"], **state.generator}),
        loaded(step.discriminator, {**state.buffers["D"], **state.discriminator}),
        loaded(step.generator, state.module_values("G")),
    )
    theirs = redact_eagerly(*networks, trainer, torch.from_numpy(X), records, lam, score, guide, smoothing)
    return ours, theirs


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        # Of tensors that a parametrisation computes, the last bits differ.
        torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(dict(one.named_buffers()), dict(other.named_buffers()), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("feature", PRACTICE)
def test_redaction_trains_as_a_plain_loop_does_with_every_practice(feature):
    networks, X, y, settings = practised(feature, n_epochs=2)
    trainer = GANTrainer(**{"latent_dim": LATENT, "batch_size": 6, "optimizer": OPTIMIZERS["adam"]} | settings)
    labels = None if y is None or not trainer.conditional else torch.from_numpy(y[:11])
    assert_same(*both_ways(trainer, networks, X, y if trainer.conditional else None, labels))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("guide", ["penalty", "guide"])
def test_a_classifier_guides_the_generator_as_in_a_plain_loop_with_every_loss(loss, guide):
    trainer = toy_trainer(loss=loss)
    assert_same(*both_ways(trainer, toy_networks(), toy_data(), score=mean_score, guide=guide))


@pytest.mark.parametrize("smoothing", [(0.1, 0.0), (0.2, 0.1)])
def test_labels_are_smoothed_as_in_a_plain_loop(smoothing):
    assert_same(*both_ways(toy_trainer(), toy_networks(), toy_data(), smoothing=smoothing))


@pytest.mark.parametrize("settings", [{"lam": 0.5}, {"lam": 1.0, "buffer": filled((2,))}])
def test_without_negatives_or_weight_for_them_redaction_is_training_to_the_last_bit(settings):
    trainer, source = toy_trainer(), DataSource(toy_data())
    step = trainer.make_step(*toy_networks())
    _, expected = run(trainer, step, source)
    _, found = run(trainer, redacting(step, **settings), source)
    found, expected = flatten_state(found), flatten_state(expected)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("score", [None, mean_score])
def test_a_compiled_step_redacts_as_the_plain_one_while_the_buffer_grows(score, monkeypatch):
    # Graphs are captured, but run as they are: to translate one to machine code takes half a minute.
    monkeypatch.setattr(capture.torch, "compile", lambda module, **_: module)
    trainer, source = toy_trainer(n_epochs=6), DataSource(toy_data())
    states = []
    for wrapped in (lambda step: step, CompiledStep):
        buffer = NegativeBuffer(30)
        step = wrapped(redacting(trainer.make_step(*toy_networks()), lam=0.7, buffer=buffer, score=score))
        noise = torch.Generator().manual_seed(5)
        run_of = []
        for record, state in trainer.run(step, source, step.initial_state(), 0):
            run_of.append(flatten_state(state))
            if record.index in (2, 7, 11):
                buffer.add(torch.randn(5, 2, generator=noise, **DOUBLE))
        states.append(run_of[-1])
    plain, compiled = states
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-9, atol=1e-9)
    # 16 instances in batches of 6, with negatives and without.
    assert all(step._graphs._graphs.values()) and len(step._graphs._graphs) == 4


@pytest.mark.parametrize(
    ("score", "guide"), [(None, "penalty"), (mean_score, "penalty"), (mean_score, "guide"), (centred_score, "guide")]
)
def test_influence_is_traced_through_redaction(score, guide):
    X, settings = toy_data(), {"lam": 0.6, "buffer": filled((2,)), "score": score, "guide": guide}
    rule = OPTIMIZERS["momentum"]
    trainer = GANTrainer(
        updates=redaction(gan("hinge", rule, rule), **settings), n_epochs=2, batch_size=6, latent_dim=3
    )
    found = []
    for backend in (ITD(derivative="exact"), ITD(derivative="secant", delta=1e-4)):
        cleanser = GANInfluence(
            *toy_networks(), trainer=trainer, metric=FID(n_samples=60), backend=backend, random_state=0
        ).fit(X)
        found.append(cleanser.influence_)
    trajectory, evaluator = cleanser.trajectory_, cleanser.evaluator(60)

    def metric_with(weights):
        state = trajectory.state(0)
        for t in range(len(trajectory)):
            record = trajectory[t]
            state = trajectory.step(state, record, trajectory.source[record.indices], weights[record.indices])
        return evaluator.value(cleanser.metric_, state)

    steps = 1e-3 * torch.eye(len(X), **DOUBLE)
    expected = [(metric_with(1 - step) - metric_with(1 + step)) / 2e-3 for step in steps]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(found[1], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_the_recipe_leaves_all_else_as_it_is():
    adam, sgd, penalty = OPTIMIZERS["adam"], OPTIMIZERS["sgd"], R1()
    options = {"update": "simultaneous", "penalty": penalty, "n_critic": 3, "scale": {"D": 0.5}}
    mine = Update("G", lambda nets, batch, weights: nets.G(batch.latents).mean(), "G", name="mine")
    before = [*gan("hinge", adam, sgd, **options), mine]
    after = redaction(before, lam=0.5, score=mean_score)
    for old, new in zip(before, after, strict=True):
        assert (new.name, new.trains, new.due, new.meets) == (old.name, old.trains, old.due, old.meets)
        assert new.optimizer is old.optimizer
    assert after[0].objective.penalty is penalty and after[0].objective.scale == 0.5
    assert after[2].objective is mine.objective
    again = redaction(after, lam=0.25)
    assert again[0].objective.lam == 0.25 and again[1].objective.score is mean_score


class Own(DiscriminatorObjective):
    """A discriminator's objective of one's own."""


def test_objectives_of_ones_own_are_not_redacted():
    d, g = gan()
    own = replace(d, objective=Own(NonSaturating()))
    with pytest.raises(ValueError, match=r"discriminator's objective of the usual GAN.*\(D: Own, G: GeneratorObj"):
        redaction([own, g])
    with pytest.raises(ValueError, match=r"generator's objective of the usual GAN.*\(D: DiscriminatorObjective\)"):
        redaction([d], score=mean_score)
    assert len(redaction([d])) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 0}, r"lam must lie in \(0, 1\]"),
        ({"guide": "both"}, "guide must be one of"),
        ({"label_smoothing": (0.5, 0)}, "label_smoothing must be two numbers"),
    ],
)
def test_the_recipe_says_what_it_expects(settings, message):
    with pytest.raises(ValueError, match=message):
        redaction(gan(), **settings)


def test_conditional_networks_need_labels_of_negatives():
    networks, X, y, settings = practised("conditional", n_epochs=1)
    trainer = GANTrainer(**{"latent_dim": LATENT, "batch_size": 6, "optimizer": OPTIMIZERS["adam"]} | settings)
    step = redacting(trainer.make_step(*networks), buffer=filled(X.shape[1:]))
    with pytest.raises(ValueError, match="negatives need labels"):
        run(trainer, step, DataSource(X, labels=y))


def loss_of(discriminator, lam, loss, real, fake, negatives):
    """The discriminator's objective, with functions for networks."""
    nets = SimpleNamespace(G=lambda z: z, D=discriminator)
    drawn = UpdateRecord("D", draws={"latents": fake, "negatives": negatives})
    batch = Batch(real, None, torch.arange(len(real)), 0, {}, drawn, lambda: fake)
    return RedactingDiscriminator(loss, lam=lam)(nets, batch, torch.ones(len(real), **DOUBLE))


def one_step(lam, negatives, loss):
    _, discriminator = toy_networks()
    real, fake = torch.from_numpy(toy_data(6)), torch.from_numpy(toy_data(7)[1:] - 1)
    return loss_of(discriminator, lam, loss, real, fake, negatives).item()


@given(lam=st.floats(0.01, 1.0), name=st.sampled_from(sorted(LOSSES)))
def test_the_loss_is_affine_in_lam(lam, name):
    negatives = torch.from_numpy(toy_data(6) + 2)
    ends = [one_step(x, negatives, LOSSES[name]()) for x in (0.0, 1.0)]
    assert one_step(lam, negatives, LOSSES[name]()) == pytest.approx((1 - lam) * ends[0] + lam * ends[1], rel=1e-12)


@given(lam=st.floats(0.01, 0.99))
def test_the_gradient_in_the_output_for_a_negative_is_the_weighted_sigmoid(lam):
    output, zeros = torch.linspace(-3, 3, 7, **DOUBLE).requires_grad_(), torch.zeros(7, **DOUBLE)
    loss = loss_of(lambda x: x, lam, NonSaturating(), zeros, zeros, output)
    (gradient,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(gradient, (1 - lam) * torch.sigmoid(output.detach()) / 7)


@given(output=st.floats(-20, 20), floor=st.floats(-8, 0))
def test_the_guide_is_the_discriminator_where_valid_and_the_floor_where_the_score_is_zero(output, floor):
    output = torch.full((4,), output, **DOUBLE)
    scores = torch.tensor([2.0, 1.0, 1 - 1e-9, 0.0], **DOUBLE)
    found = guided(output, scores, floor)
    torch.testing.assert_close(found[:2], output[:2])
    assert float(found[2]) == pytest.approx(float(output[2]), abs=1e-6)
    assert float(found[3]) == pytest.approx(floor)


def test_the_guide_leads_out_of_the_region_where_the_discriminator_is_flat():
    x = torch.full((3, 2), -0.5, **DOUBLE).requires_grad_()
    (gradient,) = torch.autograd.grad(guided(torch.zeros(3, **DOUBLE), mean_score(x), -4.0).sum(), x)
    assert (gradient > 0).all()


@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), capacity=st.integers(1, 10))
def test_a_buffer_keeps_the_newest(sizes, capacity):
    buffer, everything = NegativeBuffer(capacity), torch.arange(float(sum(sizes)))
    for part in everything.split(sizes):
        buffer.add(part[:, None], part.long())
    assert len(buffer) == min(capacity, len(everything))
    if len(buffer):
        assert torch.equal(buffer.samples[:, 0], everything[-capacity:])
        assert torch.equal(buffer.labels, everything[-capacity:].long())


def test_draws_from_a_buffer_are_uniform_and_keep_labels_with_their_samples():
    buffer = NegativeBuffer(100)
    buffer.add(torch.arange(5.0)[:, None], torch.arange(5))
    samples, labels = buffer.draw(5000, torch.Generator().manual_seed(0))
    assert torch.equal(samples[:, 0].long(), labels)
    np.testing.assert_allclose(torch.bincount(labels) / 5000, 0.2, atol=0.02)
