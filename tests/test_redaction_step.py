"""One training step of redaction against plain PyTorch, for every way of training."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ganclean import GANTrainer
from ganclean.data import DataSource
from ganclean.losses import LOSSES, NonSaturating
from ganclean.redaction.step import NegativeBuffer, RedactionRecord, RedactionStep, SmoothedLoss, guided
from ganclean.training.network import loaded
from ganclean.training.state import flatten_state
from tests.practice import LATENT, PRACTICE, practised
from tests.reference.redaction_training import redact_eagerly
from tests.toy_gans import OPTIMIZERS, toy_data, toy_networks, toy_trainer

DOUBLE = {"dtype": torch.float64}


def mean_score(x):
    """A score with values on both sides of 1."""
    return 2 * torch.sigmoid(3 * x.flatten(1).mean(dim=1))


def filled(shape, labels=None, n=11):
    buffer = NegativeBuffer(100)
    noise = torch.Generator().manual_seed(5)
    buffer.add(torch.randn(n, *shape, generator=noise, **DOUBLE), labels)
    return buffer


def run(trainer, step, source):
    """The records of a run and the state in its end."""
    steps = list(trainer.run(step, source, step.initial_state(), 0))
    return [step.drawn(record, source) for record, _ in steps], steps[-1][1]


def both_ways(trainer, networks, X, y=None, labels=None, lam=0.7, score=None, guide="penalty", smoothing=(0, 0)):
    """The networks that the library trains, and those that a plain loop trains on the same draws."""
    plain = trainer.make_step(*networks)
    loss = SmoothedLoss(plain.loss, *smoothing) if any(smoothing) else plain.loss
    buffer = filled(X.shape[1:], labels)
    step = RedactionStep.of(plain, loss=loss, lam=lam, buffer=buffer, score=score, guide=guide)
    records, state = run(trainer, step, DataSource(X, labels=y))
    ours = (
        loaded(step.generator, state.generator, state.buffers_generator),
        loaded(step.discriminator, state.discriminator, state.buffers_discriminator),
        loaded(step.generator, state.evaluated, state.buffers_generator),
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
    _, found = run(trainer, RedactionStep.of(step, **settings), source)
    found, expected = flatten_state(found), flatten_state(expected)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def one_step(lam, negatives, loss=None):
    step = toy_trainer().make_step(*toy_networks())
    step = RedactionStep.of(step, lam=lam, loss=loss or step.loss)
    real, fake = torch.from_numpy(toy_data(6)), torch.from_numpy(toy_data(7)[1:] - 1)
    record = RedactionRecord(0, torch.arange(6), 0, negatives=negatives)
    theta = {name: p.detach() for name, p in step.discriminator.named_parameters()}
    loss, _ = step.discriminator_loss(theta, {}, [{}] * 3, record, real, fake)
    return float(loss)


@given(lam=st.floats(0.01, 1.0), name=st.sampled_from(sorted(LOSSES)))
def test_the_loss_is_affine_in_lam(lam, name):
    negatives = torch.from_numpy(toy_data(6) + 2)
    ends = [one_step(x, negatives, LOSSES[name]()) for x in (0.0, 1.0)]
    assert one_step(lam, negatives, LOSSES[name]()) == pytest.approx((1 - lam) * ends[0] + lam * ends[1], rel=1e-12)


@given(lam=st.floats(0.01, 0.99))
def test_the_gradient_in_the_output_for_a_negative_is_the_weighted_sigmoid(lam):
    output = torch.linspace(-3, 3, 7, **DOUBLE).requires_grad_()

    class Identity(RedactionStep):
        def _judge(self, theta, buffers, samples, labels, seed):
            return samples.flatten(), buffers

    step = Identity.of(toy_trainer().make_step(*toy_networks()), lam=lam, loss=NonSaturating())
    record = RedactionRecord(0, torch.arange(7), 0, negatives=output)
    zeros = torch.zeros(7, **DOUBLE)
    loss, _ = step.discriminator_loss({}, {}, [{}] * 3, record, zeros, zeros)
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
