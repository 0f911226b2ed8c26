import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import grad, gradcheck

from ganclean.exceptions import MetricError
from ganclean.metrics import MMD
from ganclean.metrics.kernel import median_distance
from tests.reference.mmd import brute_force_median_distance, brute_force_mmd
from tests.toy_gans import toy_cleanser


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REAL, FAKE = normal(30, 3), 0.8 * normal(20, 3, seed=1) + 0.3


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidth", [0.2, 1.0, 7.0, "median"])
def test_mmd_is_the_mean_over_all_pairs_under_the_gaussian_kernel(bandwidth, unbiased):
    width = brute_force_median_distance(REAL.numpy()) if bandwidth == "median" else bandwidth
    expected = brute_force_mmd(REAL.numpy(), FAKE.numpy(), width, unbiased)
    metric = MMD(bandwidth=bandwidth, unbiased=unbiased).fit(REAL)
    assert metric.bandwidth_ == pytest.approx(width, rel=1e-12)
    assert float(metric(FAKE)) == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidth", [0.5, "median"])
def test_the_gradient_equals_finite_differences(bandwidth, unbiased):
    samples = (0.5 * normal(9, 3, seed=2) + 0.2).requires_grad_()
    assert gradcheck(MMD(bandwidth=bandwidth, unbiased=unbiased).fit(REAL), samples)


def test_the_gradient_at_samples_that_coincide_with_each_other_and_with_the_reference_equals_finite_differences():
    assert gradcheck(MMD().fit(REAL), torch.cat([REAL[:2], REAL[:2]]).requires_grad_())


def test_the_gradient_of_collapsed_samples_is_finite():
    samples = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = grad(MMD().fit(REAL)(samples), samples)
    assert gradient.isfinite().all() and gradient.any()


def test_the_biased_estimate_of_the_reference_itself_is_zero_and_never_negative():
    metric = MMD(unbiased=False).fit(REAL)
    assert float(metric(REAL)) == pytest.approx(0, abs=1e-14)
    assert float(metric(FAKE)) > 0


def test_the_unbiased_estimate_is_right_on_average():
    values = [
        float(MMD(bandwidth=1.0).fit(normal(25, 2, seed=2 * i))(normal(25, 2, seed=2 * i + 1))) for i in range(200)
    ]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * error and min(values) < 0
    assert float(MMD(bandwidth=1.0, unbiased=False).fit(normal(25, 2))(normal(25, 2, seed=1))) > 5 * error


def test_far_samples_are_worse_than_near_ones_and_the_value_is_bounded():
    metric = MMD().fit(REAL)
    assert float(metric(FAKE)) < float(metric(FAKE + 2)) < float(metric(FAKE + 1e6)) < 2


@given(seed=st.integers(0, 1000))
def test_the_order_of_the_instances_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    shuffled = MMD().fit(REAL[rng.permutation(30)])(FAKE[rng.permutation(20)])
    assert float(shuffled) == pytest.approx(float(MMD().fit(REAL)(FAKE)), rel=1e-10)


@given(shift=st.sampled_from([-1e7, 0.0, 1e7]), scale=st.floats(1e-3, 1e3))
def test_units_do_not_matter_with_the_median(shift, scale):
    value = MMD().fit(REAL * scale + shift * scale)(FAKE * scale + shift * scale)
    assert float(value) == pytest.approx(float(MMD().fit(REAL)(FAKE)), rel=1e-6)


def test_distances_are_those_in_feature_space():
    torch.manual_seed(0)
    extractor = nn.Sequential(nn.Linear(3, 6), nn.Tanh()).double().requires_grad_(False)
    assert float(MMD(extractor).fit(REAL)(FAKE)) == float(MMD().fit(extractor(REAL))(extractor(FAKE)))


def test_single_precision_agrees_with_double():
    value = MMD().fit(REAL.float())(FAKE.float())
    assert float(value) == pytest.approx(float(MMD().fit(REAL)(FAKE)), rel=1e-5)


def test_the_median_of_many_is_that_of_rows_spread_evenly():
    assert median_distance(REAL, 10) == brute_force_median_distance(REAL[::3].numpy())
    blocks = torch.cat([normal(1000, 1), normal(1000, 1, seed=1) + 100])
    assert median_distance(blocks) == pytest.approx(brute_force_median_distance(blocks[::8].numpy()), abs=2)
    assert median_distance(blocks) > 50


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("nan"), float("inf"), "mean", None])
def test_a_bandwidth_is_a_positive_number(bandwidth):
    with pytest.raises(MetricError, match="bandwidth must be 'median' or a positive number"):
        MMD(bandwidth=bandwidth).fit(REAL)


def test_a_median_of_zero_is_refused_and_a_number_helps():
    ones = torch.ones(8, 2)
    with pytest.raises(MetricError, match=r"got 'median', which is 0\.0 here\. Give a number"):
        MMD().fit(ones)
    assert float(MMD(bandwidth=1.0).fit(ones)(ones)) == 0


def test_one_instance_is_too_few():
    with pytest.raises(MetricError, match="needs at least 2 reference instances; got 1"):
        MMD().fit(REAL[:1])
    with pytest.raises(MetricError, match="at least 2 samples on either side; got 1"):
        MMD().fit(REAL)(FAKE[:1])
    assert MMD(unbiased=False).fit(REAL)(FAKE[:1]).isfinite()


def test_influence_on_it_is_found_by_name(X):
    cleanser = toy_cleanser(metric="mmd").fit(X)
    assert isinstance(cleanser.metric_, MMD) and cleanser.metric_name_ == "mmd"
    assert np.isfinite(cleanser.influence_).all() and cleanser.influence_.any()
