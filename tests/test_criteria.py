"""The four criteria, and what they say of GMValuator on digits."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from ganclean.valuation import (
    GMValuator,
    efficiency,
    identical_attributes,
    identical_class,
    out_of_distribution,
    top_contributors,
)

ATTRIBUTIONS = csr_array(np.array([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.2, 0.7]]))


def test_the_top_contributors_come_with_their_shares():
    rows, shares = top_contributors(2 * ATTRIBUTIONS, 2)
    assert rows.tolist() == [[0, 1], [3, 2]]
    np.testing.assert_allclose(shares, [[0.5, 0.3], [0.7, 0.2]])


def test_equal_credit_is_ordered_by_row_and_no_credit_has_no_shares():
    even = csr_array((np.array([1.0, 1.0, 0.0, 0.0]), np.array([3, 1, 2, 0]), np.array([0, 2, 4])), shape=(2, 4))
    rows, shares = top_contributors(even, 2)
    assert rows.tolist() == [[1, 3], [0, 2]] and shares.tolist() == [[0.5, 0.5], [0, 0]]


@pytest.mark.parametrize("k", [0, 4])
def test_no_more_contributors_than_there_are_can_be_asked_for(k):
    with pytest.raises(ValueError, match=f"each sample has; got {k}"):
        top_contributors(ATTRIBUTIONS, k)


@pytest.mark.parametrize(("k", "expected"), [(1, [1.0, 1.0]), (2, [1.0, 0.5]), (3, [2 / 3, 1 / 3])])
def test_class_agreement_counts_the_contributors_of_the_samples_class(k, expected):
    agreement = identical_class(ATTRIBUTIONS, ["a", "a", "b", "c"], ["a", "c"], k)
    np.testing.assert_allclose(agreement.per_sample, expected)
    assert agreement.share == pytest.approx(np.mean(expected)) and agreement.chance == pytest.approx(0.375)


def test_attribute_agreement_is_over_the_samples_that_have_the_attribute():
    hats = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]])
    agreement = identical_attributes(ATTRIBUTIONS, hats, [[1, 1, 0], [1, 0, 0]], k=2)
    np.testing.assert_allclose(agreement.share, [0.5, 0.5, np.nan])
    np.testing.assert_allclose(agreement.base_rate, [0.5, 0.75, 1.0])
    np.testing.assert_allclose(agreement.lift, [1.0, 2 / 3, np.nan])


def test_outlier_detection_is_the_auc_of_low_values():
    rng = np.random.default_rng(0)
    values, outlier = rng.normal(size=50), rng.random(50) < 0.2
    found = out_of_distribution(values, outlier)
    assert found.roc_auc == pytest.approx(roc_auc_score(outlier, -values))
    lowest = sorted(range(50), key=lambda i: values[i])[: outlier.sum()]
    assert found.precision_at_n == pytest.approx(np.mean([outlier[i] for i in lowest]))
    assert out_of_distribution(-1.0 * outlier, outlier) == (1.0, 1.0)
    assert out_of_distribution(np.zeros(50), outlier).roc_auc == 0.5


def test_efficiency_is_the_median_of_all_runs():
    calls = []
    measured = efficiency(lambda: calls.append(1), n_samples=10, n_repeats=5)
    assert len(calls) == len(measured.runs) == 5
    assert measured.seconds == np.median(measured.runs) == pytest.approx(10 * measured.seconds_per_sample)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: identical_class(ATTRIBUTIONS, ["a"] * 3, ["a"] * 2, 1), r"expected \(2, 3\)"),
        (lambda: identical_class(ATTRIBUTIONS, ["a"] * 4, ["a"] * 5, 1), r"expected \(5, 4\)"),
        (lambda: identical_attributes(ATTRIBUTIONS, np.full((4, 1), 2), [[1], [1]], 1), "attributes must be 0 or 1"),
        (lambda: identical_attributes(ATTRIBUTIONS, np.ones((4, 2)), np.ones((2, 1)), 1), "2 columns"),
        (lambda: out_of_distribution([1.0, 2.0], [False, False]), "0 of 2 instances are outliers"),
        (lambda: efficiency(list, 0), "at least 1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def digits():
    """Digits to train on with their labels, others to disturb, and others still as a clean reference."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    X, y = data.data[order] / 16, data.target[order]
    return (X[:1080], y[:1080]), X[1080:1200], X[1200:]


def classwise_gaussian(X, y, n, n_components=20, seed=0):
    """Samples of one Gaussian for each class, in its principal components, with their classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, size=n)
    samples = np.empty((n, X.shape[1]))
    for label in range(10):
        of_class = X[y == label]
        mean, made = of_class.mean(axis=0), labels == label
        _, scales, directions = np.linalg.svd(of_class - mean, full_matrices=False)
        scores = rng.normal(size=(made.sum(), n_components)) * scales[:n_components] / np.sqrt(len(of_class) - 1)
        samples[made] = mean + scores @ directions[:n_components]
    return samples.clip(0, 1), labels


def disturbed(kind, X):
    rng = np.random.default_rng(1)
    return {
        "noise": lambda: rng.uniform(size=X.shape),
        "permuted": lambda: rng.permuted(X, axis=1),
        "inverted": lambda: 1 - X,
    }[kind]()


def test_contributors_are_of_the_class_that_a_conditional_generator_made(digits):
    (X, y), _, _ = digits
    samples, labels = classwise_gaussian(X, y, 300)
    attributions = GMValuator(k=50).fit(X, X_gen=samples).attributions_
    at_10, at_50 = (identical_class(attributions, y, labels, k) for k in (10, 50))
    assert at_10.share >= 0.9 and at_50.share >= 0.8
    assert at_10.chance == pytest.approx(0.1, abs=0.01)
    attributes = np.column_stack([y == 3, y % 2 == 0])
    lift = identical_attributes(attributions, attributes, np.column_stack([labels == 3, labels % 2 == 0])).lift
    assert lift[0] > 8 and 1.8 < lift[1] < 2.1


@pytest.mark.parametrize("kind", ["noise", "permuted", "inverted"])
def test_outliers_that_the_generator_never_makes_have_little_credit(kind, digits):
    (X, y), others, _ = digits
    pool, outlier = np.concatenate([X, disturbed(kind, others)]), np.arange(1200) >= 1080
    valuator = GMValuator().fit(pool, X_gen=classwise_gaussian(X, y, 1000)[0])
    by_value = out_of_distribution(valuator.values_, outlier).roc_auc
    assert by_value >= 0.93
    assert out_of_distribution(-valuator.harmfulness_, outlier).roc_auc >= by_value


@pytest.mark.parametrize("kind", ["noise", "permuted", "inverted"])
def test_credit_is_blind_to_learned_outliers_unless_quality_takes_it_from_the_samples(kind, digits):
    (X, _), others, reference = digits
    pool, outlier = np.concatenate([X, disturbed(kind, others)]), np.arange(1200) >= 1080
    rng = np.random.default_rng(2)
    copies = pool[rng.integers(1200, size=1000)]
    samples = copies + 0.1 * rng.normal(size=copies.shape)

    def nearness(x):
        """By the fifth nearest instance of the clean reference."""
        return torch.exp(-torch.cdist(x, torch.from_numpy(reference)).kthvalue(5, dim=1).values)

    def auc(quality):
        valuator = GMValuator(quality=quality).fit(pool, X_gen=samples, X_ref=reference)
        return out_of_distribution(-valuator.harmfulness_, outlier).roc_auc

    blind, realism, near = auc(None), auc("realism"), auc(nearness)
    assert 0.4 < blind < 0.65
    assert realism > blind + 0.2
    assert near >= 0.92


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_credit_does_not_tell_what_leaving_instances_out_does(seed):
    """The generator is a kernel density of its training data, whose Fréchet distance has a closed form."""
    rng = np.random.default_rng(seed)
    X = PCA(16, svd_solver="full").fit_transform(rng.permutation(load_digits().data / 16))
    train, reference, bandwidth = X[:800], X[800:], 0.2
    mean, covariance = reference.mean(axis=0), np.cov(reference.T)

    def utility(rows):
        """Minus the squared Fréchet distance of the density of some rows to the reference."""
        of_rows = np.cov(train[rows].T) + bandwidth**2 * np.eye(16)
        overlap = np.sqrt(np.linalg.eigvals(of_rows @ covariance).real.clip(0)).sum()
        shift = train[rows].mean(axis=0) - mean
        return -(shift @ shift + np.trace(of_rows + covariance) - 2 * overlap)

    everyone = np.arange(800)
    contribution = utility(everyone) - np.array([utility(np.delete(everyone, i)) for i in everyone])
    samples = train[rng.integers(800, size=1000)] + bandwidth * rng.normal(size=(1000, 16))
    credit = GMValuator().fit(train, X_gen=samples).values_
    halves = [rng.permutation(800)[:400] for _ in range(64)]
    truth = [utility(half) for half in halves]
    by_contribution, by_credit = (
        spearmanr([values[half].sum() for half in halves], truth).statistic for values in (contribution, credit)
    )
    assert by_contribution > 0.7 and by_contribution - by_credit > 0.4
