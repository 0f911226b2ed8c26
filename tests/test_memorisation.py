"""C_T, authenticity and FLD are what their definitions say, and see the copies that a Fréchet distance cannot."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import nn

from ganclean.distances import nearest
from ganclean.exceptions import MetricError, NonFiniteError
from ganclean.metrics import FID, FLD, KID, PRDC, Authenticity, CTTest
from ganclean.metrics.fld import fit_log_variances, log_likelihood
from ganclean.metrics.memorisation import mann_whitney_z
from ganclean.validation import cleansing_curve, counterfactual_retrain
from tests.reference.memorisation import (
    brute_force_authenticity,
    brute_force_ct,
    brute_force_mean_log_density,
    mixture_objective,
    optimised_log_variances,
)
from tests.toy_gans import toy_cleanser, toy_data

KINDS = [CTTest, Authenticity, FLD]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRAIN, TEST, FAKE = normal(60, 3), normal(50, 3, seed=1), 0.9 * normal(45, 3, seed=2) + 0.2


@pytest.fixture(scope="module", params=range(3))
def digits(request):
    """Digits in 16 components: three disjoint parts of 590 each, and the last one's without the digits from 5 on."""
    X, y = load_digits(return_X_y=True)
    X = torch.from_numpy(PCA(16, random_state=0).fit_transform(X / 16))
    parts = torch.from_numpy(np.random.default_rng(request.param).permutation(len(X))[:1770]).split(590)
    return [*(X[rows] for rows in parts), X[parts[2]][y[parts[2]] < 5]]


def noisy(points, scale, seed=0):
    """Points with normal noise of so many standard deviations of each feature."""
    return points + scale * points.std(dim=0) * normal(*points.shape, seed=seed)


@given(seed=st.integers(0, 1000), n_cells=st.integers(1, 4), size=st.sampled_from([1, 6]), n=st.integers(25, 40))
def test_ct_is_that_of_loops_over_pairs(seed, n_cells, size, n):
    # On a grid, distances tie.
    train, test, fake = points = [(8 * normal(n + i, 2, seed=seed + i)).round() / 8 for i in range(3)]
    metric = CTTest(train, n_cells=n_cells, min_cell_size=size).fit(test)
    arrays, cells = [x.numpy() for x in points], [metric.kmeans_.predict(x.numpy()) for x in points]
    assert float(metric(fake)) == pytest.approx(brute_force_ct(*arrays, cells, size), abs=1e-9)


@given(seed=st.integers(0, 1000))
def test_the_z_score_of_one_cell_has_the_p_value_of_scipy(seed):
    distances = [
        NearestNeighbors(n_neighbors=1).fit(TRAIN).kneighbors(x)[0].ravel()
        for x in (TEST, noisy(FAKE, 0.1, seed).numpy())
    ]
    z = float(CTTest(TRAIN, n_cells=1).fit(TEST)(noisy(FAKE, 0.1, seed)))
    p = mannwhitneyu(*distances[::-1], alternative="less", use_continuity=False, method="asymptotic").pvalue
    assert math.erfc(-z / math.sqrt(2)) / 2 == pytest.approx(p, rel=1e-9)


@given(seed=st.integers(0, 1000))
def test_the_z_score_changes_its_sign_with_the_sides(seed):
    x, y = normal(20, seed=seed).round(decimals=1), normal(30, seed=seed + 1).round(decimals=1)
    assert mann_whitney_z(x, y) == pytest.approx(-mann_whitney_z(y, x))


def test_ct_of_copies_has_a_closed_form():
    n, m = len(TEST), len(TRAIN)
    expected = -n * m / 2 / math.sqrt(n * m * (n + m + 1) / 12)
    assert float(CTTest(TRAIN, n_cells=1).fit(TEST)(TRAIN)) == pytest.approx(expected)


def test_within_cells_too_many_samples_of_a_dense_region_do_not_look_like_copies():
    def two_regions(n_dense, n_wide, seed):
        return torch.cat([0.1 * normal(n_dense, 2, seed=seed), 3 * normal(n_wide, 2, seed=seed + 1) + 30])

    train, test, samples = two_regions(200, 200, 0), two_regions(200, 200, 2), two_regions(300, 100, 4)
    pooled, within = (float(CTTest(train, n_cells=n).fit(test)(samples)) for n in (1, 2))
    assert pooled < -5 and abs(within) < 2


@given(seed=st.integers(0, 1000), n=st.integers(2, 30))
def test_authenticity_is_that_of_loops_over_pairs(seed, n):
    train, fake = normal(n, 2, seed=seed), normal(25, 2, seed=seed + 1)
    value = Authenticity(train).fit(TEST[:, :2])(fake)
    assert float(value) == pytest.approx(brute_force_authenticity(train.numpy(), fake.numpy()), abs=1e-14)


def test_of_a_doubled_training_instance_only_equal_samples_are_copies():
    train = torch.cat([TRAIN, TRAIN[:1]])
    metric = Authenticity(train).fit(TEST)
    assert metric(TRAIN[:1]) == 0 and metric(TRAIN[:1] + 1e-6) == 1 and metric(TRAIN[1:2] + 1e-6) == 0


@given(seed=st.integers(0, 1000), shift=st.sampled_from([0.0, 1e3]))
def test_neighbours_are_those_of_scikit_learn(seed, shift):
    points, centres = normal(20, 3, seed=seed) + shift, normal(30, 3, seed=seed + 1) + shift
    distances, rows = nearest(points, centres)
    expected, expected_rows = NearestNeighbors(n_neighbors=2).fit(centres).kneighbors(points)
    np.testing.assert_allclose(distances, expected[:, 0], rtol=1e-9)
    assert np.array_equal(rows, expected_rows[:, 0])
    others, _ = nearest(points, centres, itself=rows)
    np.testing.assert_allclose(others, expected[:, 1], rtol=1e-9)


def test_copies_are_at_distance_zero_whatever_the_scale():
    points = 1e6 + normal(40, 200)
    distances, rows = nearest(points, points)
    assert not distances.any() and torch.equal(rows, torch.arange(40))


@pytest.mark.parametrize("width", [2, 6])
def test_the_variances_are_those_that_a_general_optimiser_finds(width):
    data, centres = normal(60, width), normal(20, width, seed=1)
    ours = fit_log_variances(centres, data, max_iter=20000, tol=0.0).numpy()
    theirs, objective = optimised_log_variances(centres.numpy(), data.numpy())
    np.testing.assert_allclose(ours, theirs, atol=1e-2)
    assert mixture_objective(ours, centres.numpy(), data.numpy())[0] == pytest.approx(objective, abs=1e-8)


@given(seed=st.integers(0, 1000))
def test_a_step_of_the_fit_never_lowers_the_likelihood(seed):
    data, centres = normal(30, 3, seed=seed), normal(15, 3, seed=seed + 1)
    fits = [fit_log_variances(centres, data, max_iter=n, tol=-math.inf).numpy() for n in (0, 1, 2, 5, 30)]
    values = [mixture_objective(fit, centres.numpy(), data.numpy())[0] for fit in fits]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(values))


def test_the_likelihood_is_the_mean_of_the_log_of_a_mean_of_densities():
    log_variances = normal(45, seed=3)
    expected = brute_force_mean_log_density(TEST.numpy(), FAKE.numpy(), log_variances.numpy())
    assert float(log_likelihood(TEST, FAKE, log_variances)) == pytest.approx(expected, abs=1e-12)


def test_fld_is_the_difference_of_two_fits_on_standardised_features():
    metric = FLD(TRAIN, random_state=3).fit(TEST)
    train, test, fake = ((x - TEST.mean(dim=0)) / TEST.std(dim=0) for x in (TRAIN, TEST, FAKE[:20]))
    order = np.random.RandomState(3).permutation(60)
    fitted = fit_log_variances(fake, train, 100, 1e-6)[:-1]
    baseline = fit_log_variances(train[order[:20]], train[order[20:]], 100, 1e-6)[:-1]
    on_train, on_test = (brute_force_mean_log_density(x.numpy(), fake.numpy(), fitted.numpy()) for x in (train, test))
    at_best = brute_force_mean_log_density(test.numpy(), train[order[:20]].numpy(), baseline.numpy())
    values = metric.compute(FAKE[:20])
    assert values == pytest.approx({"fld": 100 * (at_best - on_test), "gap": 100 * (on_test - on_train)}, abs=1e-8)
    assert not metric.greater_is_better and FLD(TRAIN, quantity="gap").greater_is_better
    assert float(FLD(TRAIN, quantity="gap", random_state=3).fit(TEST)(FAKE[:20])) == values["gap"]


@given(scale=st.sampled_from([0.01, 7.0]), shift=st.sampled_from([-3.0, 100.0]))
def test_units_do_not_matter(scale, shift):
    for kind in KINDS:
        expected = float(kind(TRAIN).fit(TEST)(FAKE))
        assert float(kind(TRAIN * scale + shift).fit(TEST * scale + shift)(FAKE * scale + shift)) == pytest.approx(
            expected, abs=1e-6
        )


@given(seed=st.integers(0, 1000))
def test_the_order_of_samples_and_test_data_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        shuffled = kind(TRAIN).fit(TEST[rng.permutation(50)])(FAKE[rng.permutation(45)])
        assert float(shuffled) == pytest.approx(float(kind(TRAIN).fit(TEST)(FAKE)), abs=1e-9)


def test_a_constant_feature_does_not_matter_to_fld():
    with_constant = [torch.cat([x, torch.ones(len(x), 1)], dim=1) for x in (TRAIN, TEST, FAKE)]
    assert np.isfinite(list(FLD(with_constant[0]).fit(with_constant[1]).compute(with_constant[2]).values())).all()


def test_real_data_are_neither_copies_nor_underfitted(digits):
    train, test, fresh, _ = digits
    assert abs(float(CTTest(train).fit(test)(fresh))) < 2
    assert 0.4 < float(Authenticity(train).fit(test)(fresh)) < 0.6
    values = FLD(train).fit(test).compute(fresh[:295])
    assert abs(values["fld"]) < 10 and -10 < values["gap"] < 0


def test_copies_are_seen_by_ct_authenticity_and_the_gap_and_not_by_distances_of_distributions(digits):
    train, test, fresh, _ = digits
    fid, kid, coverage = FID().fit(test), KID().fit(test), PRDC().fit(test)
    for copies in (train, noisy(train, 0.1)):
        assert abs(float(fid(copies) - fid(fresh))) < 0.05
        assert abs(float(kid(copies) - kid(fresh))) < 0.005
        assert abs(float(coverage(copies) - coverage(fresh))) < 0.1
        assert float(CTTest(train).fit(test)(copies)) < -5
        assert float(Authenticity(train).fit(test)(copies)) < 0.05
        values = FLD(train).fit(test).compute(copies)
        assert values["gap"] < -100 and values["fld"] > 100


def test_noise_and_missing_classes_are_seen_by_distances_of_distributions(digits):
    _, test, fresh, half = digits
    fid, kid, prdc = FID().fit(test), KID().fit(test), PRDC().fit(test)
    for worse in (noisy(fresh, 1), half):
        assert fid(worse) > fid(fresh) + 0.3 and kid(worse) > kid(fresh) + 0.01
    assert prdc.compute(noisy(fresh, 1))["precision"] < 0.2 and prdc.compute(half)["coverage"] < 0.7
    values = [float(fid(noisy(fresh, scale))) for scale in (0, 0.3, 0.6, 1, 1.5)]
    assert values == sorted(values)


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_both_sides_come_from_one_extractor(kind):
    torch.manual_seed(0)
    extractor = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    features = [extractor(x.float()).detach() for x in (TRAIN, TEST, FAKE)]
    value = kind(TRAIN.numpy(), extractor).fit(TEST)(FAKE)
    assert value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    assert float(value) == pytest.approx(float(kind(features[0]).fit(features[1])(features[2])), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_cloned_and_pickled_with_its_training_data(kind):
    metric = kind(TRAIN, n_samples=40).fit(TEST)
    copied = clone(metric)
    assert torch.equal(copied.train, TRAIN) and not hasattr(copied, "features_") and copied.sample_size == 40
    assert float(copied.fit(TEST)(FAKE)) == float(metric(FAKE)) == float(pickle.loads(pickle.dumps(metric))(FAKE))
    assert not metric.is_differentiable


@pytest.mark.parametrize("kind", KINDS)
def test_it_judges_what_removal_does(kind, cleanser, X):
    # Small samples need few and small cells.
    settings = {"n_cells": 1, "min_cell_size": 5} if kind is CTTest else {}
    metric = kind(X, n_samples=30, **settings)
    test = toy_data(60)[20:]
    values = counterfactual_retrain(cleanser, [[], list(range(8))], metric=clone(metric).fit(test))
    samples = cleanser.generator_(cleanser.evaluator(30).latents).detach()
    assert values[0] == pytest.approx(float(clone(metric).fit(test)(samples))) and np.isfinite(values).all()
    curve = cleansing_curve(cleanser, test, [0.25], metrics={"it": metric}, n_seeds=2)
    assert curve.values["it"]["influence"].shape == (2, 1) and np.isfinite(curve.baseline["it"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_influence_on_it_is_refused(kind, X):
    with pytest.raises(MetricError, match="is for evaluation only"):
        toy_cleanser(metric=kind(X)).fit(X)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_do_not_fit_are_refused(kind):
    with pytest.raises(MetricError, match="`train` have 2 features and the reference data 3"):
        kind(TRAIN[:, :2]).fit(TEST)
    broken = TRAIN.clone()
    broken[7, 1] = math.nan
    with pytest.raises(NonFiniteError, match="features of 1 of 60 training instances are NaN"):
        kind(broken).fit(TEST)
    with pytest.raises(NonFiniteError, match="features of 1 of 60 reference instances are NaN"):
        kind(TRAIN).fit(broken)
    with pytest.raises(NonFiniteError, match="features of 1 of 60 generated samples are NaN"):
        kind(TRAIN).fit(TEST)(broken)
    with pytest.raises(MetricError, match="need more than 1 training instances; got 1"):
        kind(TRAIN[:1]).fit(TEST)


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (CTTest(TRAIN, n_cells=0), ValueError, "n_cells must be an integer of at least 1"),
        (CTTest(TRAIN, min_cell_size=1.5), ValueError, "min_cell_size must be an integer of at least 1"),
        (CTTest(TRAIN, n_cells=61), MetricError, "n_cells=61 cells need as many training instances; got 60"),
        (FLD(TRAIN, quantity="fls"), ValueError, r"quantity must be one of \['fld', 'gap'\]"),
    ],
)
def test_what_is_not_as_expected_is_named(metric, error, message):
    with pytest.raises(error, match=message):
        metric.fit(TEST)


def test_too_few_samples_for_the_cells_are_refused():
    with pytest.raises(MetricError, match="None of the 3 cells holds test instances and at least 20 of the 10 samples"):
        CTTest(TRAIN).fit(TEST)(FAKE[:10])
