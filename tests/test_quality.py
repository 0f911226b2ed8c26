"""The quality of generated samples, which their credit is weighted by."""

import numpy as np
import pytest
import torch
from torch import nn

from ganclean.exceptions import MetricError
from ganclean.valuation import DiscriminatorQuality, GMValuator, realism_score
from tests.reference import gmvaluator as reference
from tests.toy_clouds import SAMPLES, TRAIN, UNSEEN


@pytest.mark.parametrize("k", [1, 3, 10])
def test_realism_is_that_of_loops_over_balls(k):
    expected = [reference.realism(sample, TRAIN, k) for sample in SAMPLES]
    np.testing.assert_allclose(realism_score(*map(torch.from_numpy, (SAMPLES, TRAIN)), k), expected, rtol=1e-12)


def test_copies_are_realistic_without_bound_also_where_instances_coincide():
    points = torch.from_numpy(np.repeat(TRAIN[:10], 5, axis=0))
    assert torch.isinf(realism_score(points, points)).all()
    assert (realism_score(points + 1, points) == 0).all()


def test_realism_as_quality_ends_at_one_and_is_judged_by_the_reference():
    for data, judges in (({}, TRAIN), ({"X_ref": UNSEEN}, UNSEEN)):
        valuator = GMValuator(quality="realism").fit(TRAIN, X_gen=SAMPLES, **data)
        expected = realism_score(*map(torch.from_numpy, (SAMPLES, judges))).clamp(max=1)
        np.testing.assert_array_equal(valuator.quality_, expected)
        np.testing.assert_array_equal(valuator.attribute(SAMPLES).sum(axis=1).round(12), expected.numpy().round(12))


def test_realism_needs_more_real_instances_than_a_ball_reaches_over():
    with pytest.raises(MetricError, match="k=3 nearest neighbours need more than 3 real instances; got 2"):
        GMValuator(quality="realism").fit(TRAIN, X_gen=SAMPLES, X_ref=UNSEEN[:2])


def test_a_discriminator_gives_the_probability_of_being_real():
    discriminator = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    quality = DiscriminatorQuality(discriminator)
    assert discriminator.training
    expected = torch.sigmoid(discriminator.eval()(torch.from_numpy(SAMPLES).float()).double())[:, 0]
    valuator = GMValuator(quality=quality).fit(TRAIN, X_gen=SAMPLES)
    np.testing.assert_allclose(valuator.quality_, expected.detach())


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        (lambda x: x.sum(), r"returned shape \(\) for 40 samples; expected shape \(40,\)"),
        (lambda x: x, r"returned shape \(40, 3\)"),
        (lambda x: x[:, 0], "returned -[0-9.]+ for one of them"),
        (lambda x: np.full(len(x), np.nan), "returned nan for one of them"),
        (lambda x: x[1:, 0].abs(), r"returned shape \(39,\)"),
    ],
)
def test_what_a_quality_function_returns_is_checked(quality, message):
    with pytest.raises(ValueError, match=message):
        GMValuator(quality=quality).fit(TRAIN, X_gen=SAMPLES)
