"""Redaction on a space of five points, where everything is known: the library's own losses against closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ganclean.dynamics.record import UpdateRecord
from ganclean.dynamics.update import Batch
from ganclean.losses import NonSaturating
from ganclean.recipes.redacting import RedactingDiscriminator, SmoothedLoss
from ganclean.redaction.invalidity import residual_invalidity
from tests.reference.redaction_optimum import (
    invalid_after_deletion,
    optimal_discriminator,
    optimal_generator,
)

DATA = np.array([0.25, 0.2, 0.25, 0.2, 0.1])
REDACTED = np.array([0.0, 0.0, 0.0, 2 / 3, 1 / 3])  # the last two points, π = 0.3
VALID = np.array([5 / 14, 4 / 14, 5 / 14, 0.0, 0.0])


def points(probabilities, n):
    """A batch of n one-hot points in which each is as frequent as it is probable."""
    counts = np.round(np.asarray(probabilities) * n).astype(int)
    assert counts.sum() == n
    return torch.eye(5, dtype=torch.float64)[np.repeat(np.arange(5), counts)]


def solved(objective, real, fake, negatives):
    """The logits of a tabular discriminator at the minimum of its own objective."""
    drawn = UpdateRecord("D", draws={"latents": fake, "negatives": negatives})
    batch = Batch(real, None, torch.arange(len(real)), 0, {}, drawn, lambda: fake)
    weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    nets = SimpleNamespace(G=lambda z: z, D=lambda x: x @ weight)
    exact = {"max_iter": 100, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    search = torch.optim.LBFGS([weight], **exact)

    def closure():
        search.zero_grad()
        loss = objective(nets, batch, real.new_ones(len(real)))
        loss.backward()
        return loss

    search.step(closure)
    return weight.detach().numpy()


@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0])
@pytest.mark.parametrize(("flip_real", "flip_fake"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.1)])
def test_the_best_discriminator_is_the_share_of_real_mass(lam, flip_real, flip_fake):
    real, fake, negatives = ([0.2, 0.3, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.2, 0.2], [0, 0, 0.1, 0.6, 0.3])
    objective = RedactingDiscriminator(SmoothedLoss(NonSaturating(), flip_real, flip_fake), lam=lam)
    logits = solved(objective, points(real, 10), points(fake, 10), points(negatives, 10))
    mixture = lam * np.array(fake) + (1 - lam) * np.array(negatives)
    expected = optimal_discriminator(np.array(real), mixture, 1 - flip_real, flip_fake)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, atol=1e-6)


def trained_distribution(p_real, lam, n_steps=1500):
    """The generator's distribution where the library's loss is minimal against the best discriminator.

    The discriminator is in its optimum, so that its own derivative does not count (envelope theorem).
    """
    real, redacted = torch.from_numpy(p_real), torch.from_numpy(REDACTED)
    loss = NonSaturating()
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(n_steps):
        p = logits.softmax(0)
        mixture = lam * p.detach() + (1 - lam) * redacted
        output = (real.clamp(min=1e-300) / mixture).log()
        optimizer.zero_grad()
        (-lam * (p * loss.fake(output)).sum()).backward()
        optimizer.step()
    return logits.detach().softmax(0).numpy()


@pytest.mark.parametrize("lam", [0.3, 0.8, 1.0])
def test_with_sifted_data_the_valid_distribution_is_the_optimum_for_every_lam(lam):
    found = trained_distribution(VALID, lam, 3000)
    np.testing.assert_allclose(found, VALID, atol=1e-3)
    np.testing.assert_allclose(optimal_generator(VALID, REDACTED, lam), VALID, atol=1e-3)


@pytest.mark.parametrize("lam", [0.95, 0.9, 0.8])
def test_with_unsifted_data_the_predicted_invalidity_remains(lam):
    predicted = residual_invalidity(0.3, lam)
    assert predicted == pytest.approx((0.3 - (1 - lam)) / lam) and predicted > 0.1
    assert trained_distribution(DATA, lam)[3:].sum() == pytest.approx(predicted, abs=1e-3)
    assert optimal_generator(DATA, REDACTED, lam)[3:].sum() == pytest.approx(predicted, abs=1e-3)


def test_with_unsifted_data_nothing_remains_once_lam_is_small_enough():
    assert residual_invalidity(0.3, 0.5) == 0
    assert trained_distribution(DATA, 0.5)[3:].sum() < 1e-3


@given(lam=st.floats(0.5, 1.0))
def test_the_prediction_is_that_of_a_general_solver_for_every_lam(lam):
    left = optimal_generator(DATA, REDACTED, lam)[3:].sum()
    assert left == pytest.approx(residual_invalidity(0.3, lam), abs=1e-3)


@pytest.mark.parametrize(
    ("half_width", "before", "after"), [(0.25, 0.197, 0.178), (0.5, 0.383, 0.310), (1.0, 0.683, 0.471)]
)
def test_a_gaussian_that_is_refitted_without_the_middle_still_produces_it(half_width, before, after):
    assert invalid_after_deletion(half_width) == pytest.approx((before, after), abs=5e-4)
