"""GMValuator: the credit of training instances for generated samples."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from imblearn.pipeline import make_pipeline as make_resampling_pipeline
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.utils.data import TensorDataset

from ganclean import CleansedEstimator
from ganclean.exceptions import NonFiniteError
from ganclean.valuation import GMValuator
from tests.reference import gmvaluator as reference
from tests.toy_clouds import IMAGES, SAMPLES, TRAIN, UNSEEN
from tests.toy_gans import toy_cleanser


def points_on_a_grid(n_min=4, n_max=14):
    """Points of which many coincide, and many of their distances tie."""
    return st.integers(n_min, n_max).flatmap(lambda n: arrays(np.float64, (n, 2), elements=st.integers(-3, 3)))


def by_loops(train, samples, k=10, temperature=None, quality=None):
    quality = np.ones(len(samples)) if quality is None else quality
    temperature = reference.median_temperature(train, samples, k) if temperature is None else temperature
    return np.array(reference.credit_matrix(train, samples, k, temperature, quality))


def worth(x):
    """Some quality of samples."""
    return x.abs().sum(dim=1)


# Credit


@pytest.mark.parametrize("k", [1, 2, 10, 60])
@pytest.mark.parametrize("temperature", ["median", 0.3])
@pytest.mark.parametrize("quality", [None, worth])
def test_credit_is_that_of_loops_over_samples_and_instances(k, temperature, quality):
    valuator = GMValuator(k=k, temperature=temperature, quality=quality).fit(TRAIN, X_gen=SAMPLES)
    q = None if quality is None else np.abs(SAMPLES).sum(axis=1)
    fixed = 1.0 if k == 1 else None if temperature == "median" else temperature
    expected = by_loops(TRAIN, SAMPLES, k, fixed, q)
    np.testing.assert_allclose(valuator.attributions_.toarray(), expected, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(valuator.values_, expected.sum(axis=0), rtol=1e-10)


@given(train=points_on_a_grid(), samples=points_on_a_grid(1), k=st.integers(1, 6), temperature=st.floats(0.01, 100))
def test_credit_is_that_of_loops_where_points_coincide_and_distances_tie(train, samples, k, temperature):
    valuator = GMValuator(k=k, temperature=temperature).fit(train, X_gen=samples)
    expected = by_loops(train, samples, k, temperature)
    np.testing.assert_allclose(valuator.attributions_.toarray(), expected, rtol=1e-10, atol=1e-14)


@given(seed=st.integers(0, 1000), k=st.integers(1, 20))
def test_all_credit_is_given_and_each_sample_gives_its_quality_to_k_instances(seed, k):
    rng = np.random.default_rng(seed)
    train, samples = rng.normal(size=(30, 2)), 2 * rng.normal(size=(500, 2))
    valuator = GMValuator(k=k, quality=worth).fit(train, X_gen=samples)
    assert abs(valuator.values_.sum() - valuator.quality_.sum()) < 1e-9
    np.testing.assert_allclose(valuator.attributions_.sum(axis=1), valuator.quality_, rtol=1e-12)
    assert (np.diff(valuator.attributions_.indptr) == k).all() and (valuator.attributions_.data >= 0).all()


@given(seed=st.integers(0, 1000))
def test_the_values_go_along_when_instances_change_places(seed):
    order = np.random.default_rng(seed).permutation(60)
    values = GMValuator().fit(TRAIN, X_gen=SAMPLES).values_
    np.testing.assert_allclose(GMValuator().fit(TRAIN[order], X_gen=SAMPLES).values_, values[order], rtol=1e-12)
    np.testing.assert_allclose(GMValuator().fit(TRAIN, X_gen=SAMPLES[::-1]).values_, values, rtol=1e-12)


def test_a_duplicate_takes_half():
    k = len(TRAIN)  # so that it takes no one's place
    once = GMValuator(k=1, temperature=1.0).fit(TRAIN, X_gen=SAMPLES)
    twice = GMValuator(k=2, temperature=1e-9).fit(np.repeat(TRAIN, 2, axis=0), X_gen=SAMPLES)
    np.testing.assert_allclose(twice.values_, np.repeat(once.values_ / 2, 2), atol=1e-12)
    doubled = GMValuator(k=k + 1, temperature=1.0).fit(np.concatenate([TRAIN, TRAIN[:1]]), X_gen=SAMPLES)
    assert doubled.values_[0] == pytest.approx(doubled.values_[-1], rel=1e-12)
    assert doubled.values_.sum() == pytest.approx(len(SAMPLES), abs=1e-9)


def test_samples_that_are_the_training_data_credit_each_instance_once():
    assert (GMValuator(k=1).fit(TRAIN, X_gen=TRAIN).values_ == 1).all()


def test_low_temperature_credits_the_nearest_and_high_temperature_all_alike():
    one = GMValuator(k=1).fit(TRAIN, X_gen=SAMPLES).values_
    cold = GMValuator(k=10, temperature=1e-300).fit(TRAIN, X_gen=SAMPLES)
    np.testing.assert_array_equal(cold.values_, one)
    for temperature in (1e12, np.inf):
        hot = GMValuator(k=10, temperature=temperature).fit(TRAIN, X_gen=SAMPLES)
        np.testing.assert_allclose(hot.attributions_.data, 0.1, rtol=1e-10)


def test_at_the_median_temperature_a_typical_last_contributor_gets_a_part_in_e():
    valuator = GMValuator().fit(TRAIN, X_gen=SAMPLES[:39])
    shares = np.sort(valuator.attributions_.data.reshape(39, 10), axis=1)
    assert np.median(shares[:, 0] / shares[:, -1]) == pytest.approx(np.exp(-1), rel=1e-12)


@given(scale=st.sampled_from([2.0**-20, 0.125, 1024.0]), shift=st.sampled_from([0.0, 8.0]))
def test_units_do_not_matter_at_the_median_temperature(scale, shift):
    moved = GMValuator().fit(scale * (TRAIN + shift), X_gen=scale * (SAMPLES + shift))
    fixed = GMValuator().fit(TRAIN, X_gen=SAMPLES)
    np.testing.assert_allclose(moved.values_, fixed.values_, rtol=1e-8)
    assert moved.temperature_ == pytest.approx(scale * fixed.temperature_)


def test_distances_that_are_all_equal_leave_a_temperature_that_shares_equally():
    valuator = GMValuator(k=2).fit(np.eye(3), X_gen=np.zeros((2, 3)))
    assert valuator.temperature_ == 1 and valuator.values_.tolist() == [1, 1, 0]


def test_new_samples_are_attributed_as_those_of_fit():
    valuator = GMValuator(quality=worth).fit(TRAIN, X_gen=SAMPLES)
    again = valuator.attribute(torch.from_numpy(SAMPLES))
    np.testing.assert_allclose(again.toarray(), valuator.attributions_.toarray(), rtol=1e-12)
    alone = by_loops(TRAIN, UNSEEN, 10, valuator.temperature_, np.abs(UNSEEN).sum(axis=1))
    np.testing.assert_allclose(valuator.attribute(UNSEEN).toarray(), alone, rtol=1e-10, atol=1e-14)


def test_neighbours_are_the_contributors_nearest_first():
    distances, rows = GMValuator(k=4).fit(TRAIN, X_gen=SAMPLES).kneighbors(UNSEEN)
    assert rows.tolist() == [reference.contributors(TRAIN, x, 4) for x in UNSEEN]
    np.testing.assert_allclose(distances, np.linalg.norm(UNSEEN[:, None] - TRAIN[rows], axis=2), rtol=1e-12)


# What is dropped


def test_what_is_dropped_has_the_least_credit_and_without_any_lies_farthest_from_all_samples():
    valuator = GMValuator(k=1, n_remove=30).fit(TRAIN, X_gen=SAMPLES)
    without = valuator.values_ == 0
    assert 10 < without.sum() < 40
    nearest = np.linalg.norm(TRAIN[:, None] - SAMPLES, axis=2).min(axis=1)
    np.testing.assert_allclose(valuator.harmfulness_, np.where(without, nearest, -valuator.values_), rtol=1e-12)
    assert (
        np.lexsort((-nearest, valuator.values_))[:30] == np.argsort(-valuator.harmfulness_, kind="stable")[:30]
    ).all()
    dropped = valuator.harmfulness_[~valuator.support_]
    assert dropped.min() >= valuator.threshold_ == valuator.harmfulness_[valuator.support_].max()


@pytest.mark.parametrize("k", [1, 3, 59, 60, 80])
def test_unseen_instances_get_what_they_would_get_beside_the_training_rows(k):
    valuator = GMValuator(k=k, temperature=0.5, quality=worth).fit(TRAIN, X_gen=SAMPLES)
    expected = [
        GMValuator(k=k, temperature=0.5, quality=worth).fit(np.concatenate([TRAIN, x[None]]), X_gen=SAMPLES)
        for x in UNSEEN
    ]
    np.testing.assert_allclose(valuator.score_samples(UNSEEN), [one.harmfulness_[-1] for one in expected], rtol=1e-10)


def test_a_row_that_is_left_out_scores_as_it_does_in_the_training_data():
    whole = GMValuator(k=4, temperature=0.5).fit(TRAIN, X_gen=SAMPLES)
    for row in range(0, 60, 7):
        rest = GMValuator(k=4, temperature=0.5).fit(np.delete(TRAIN, row, axis=0), X_gen=SAMPLES)
        assert rest.score_samples(TRAIN[[row]])[0] == pytest.approx(whole.harmfulness_[row], rel=1e-10)


def test_transform_keeps_the_support_of_the_training_data_and_drops_far_rows_of_others():
    valuator = GMValuator(n_remove=6).fit(TRAIN, X_gen=SAMPLES)
    assert np.array_equal(valuator.transform(TRAIN), TRAIN[valuator.support_])
    others = np.concatenate([SAMPLES[:3], np.full((2, 3), 50.0)])
    assert np.array_equal(valuator.transform(others), SAMPLES[:3])
    kept, labels = clone(valuator).fit_resample(TRAIN, np.arange(60), X_gen=SAMPLES)
    assert len(kept) == 54 and np.array_equal(labels, valuator.sample_indices_)


# What is accepted


@pytest.mark.parametrize(
    "wrap",
    [np.asarray, torch.from_numpy, lambda x: TensorDataset(torch.from_numpy(x)), pd.DataFrame, np.ndarray.tolist],
)
def test_arrays_tensors_datasets_and_frames_give_the_same_values(wrap):
    expected = GMValuator().fit(TRAIN, X_gen=SAMPLES)
    valuator = GMValuator().fit(wrap(TRAIN), X_gen=wrap(SAMPLES))
    np.testing.assert_array_equal(valuator.values_, expected.values_)
    np.testing.assert_array_equal(valuator.score_samples(wrap(UNSEEN)), expected.score_samples(UNSEEN))
    assert valuator.objective_ == "credit" and valuator.n_features_in_ == 3


def test_nearness_is_that_of_the_features():
    weights = torch.tensor([[1.0, 0, 0], [0, 100.0, 0]], dtype=torch.float64)
    valuator = GMValuator(feature_extractor=lambda x: x @ weights.T).fit(TRAIN, X_gen=SAMPLES)
    plain = GMValuator().fit(TRAIN @ weights.numpy().T, X_gen=SAMPLES @ weights.numpy().T)
    np.testing.assert_allclose(valuator.values_, plain.values_, rtol=1e-12)


class Noisy(nn.Module):
    """A generator with dropout, running statistics and noise of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, z):
        samples = self.net(z)
        return samples + 0.1 * torch.randn_like(samples)


def test_a_generator_makes_the_samples_in_evaluation_mode_and_stays_as_it_was():
    generator = Noisy()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    valuator = GMValuator(generator, latent_dim=4, n_generated=700, random_state=3).fit(TRAIN)
    assert torch.equal(torch.get_rng_state(), state) and generator.training
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    assert valuator.samples_.shape == (700, 3) and not valuator.generator_.training
    latents = torch.from_numpy(np.random.RandomState(0).standard_normal((9, 4))).float()
    made, again = generator.eval().net(latents), valuator.generator_.net(latents)
    assert torch.equal(made, again) and valuator.values_.sum() == pytest.approx(700)
    np.testing.assert_array_equal(clone(valuator).fit(TRAIN).values_, valuator.values_)
    assert len(GMValuator(generator, latent_dim=4).fit(TRAIN).samples_) == len(TRAIN)


class Conditional(nn.Module):
    """A generator that puts samples where their label says."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, z, y):
        return 0.1 * self.scale * z + y[:, None]


@pytest.mark.parametrize("as_dataset", [False, True])
def test_a_conditional_generator_is_given_labels_of_the_training_data(as_dataset):
    y = np.repeat([0, 5, 7], 20)
    X, labels = (TensorDataset(torch.from_numpy(TRAIN), torch.from_numpy(y)), None) if as_dataset else (TRAIN, y)
    valuator = GMValuator(Conditional(), conditional=True, latent_dim=3, n_generated=200, random_state=0)
    valuator.fit(X, labels)
    found, counts = np.unique(valuator.sample_labels_, return_counts=True)
    assert found.tolist() == [0, 5, 7] and counts.min() > 40
    assert (valuator.samples_.mean(dim=1) - valuator.sample_labels_).abs().max() < 0.5


def test_a_fitted_cleanser_is_valued_by_its_samples(X, cleanser):
    valuator = GMValuator(cleanser, k=3, n_generated=50).fit(X)
    direct = GMValuator(k=3).fit(X, X_gen=cleanser.sample(50)[0])
    np.testing.assert_array_equal(valuator.values_, direct.values_)
    assert valuator.generator_ is cleanser
    kept = clone(GMValuator(FrozenEstimator(cleanser), k=3, n_generated=50)).fit(X)
    np.testing.assert_array_equal(kept.values_, direct.values_)


def test_an_estimator_that_is_not_fitted_is_fitted_on_the_training_data(X):
    mixture = GaussianMixture(2, random_state=0)
    valuator = GMValuator(mixture).fit(TRAIN)
    samples, components = GaussianMixture(2, random_state=0).fit(TRAIN).sample(60)
    np.testing.assert_array_equal(valuator.samples_, samples)
    np.testing.assert_array_equal(valuator.sample_labels_, components)
    assert not hasattr(mixture, "means_")
    assert GMValuator(KernelDensity(), n_generated=7).fit(TRAIN).samples_.shape == (7, 3)
    assert len(GMValuator(toy_cleanser(n_epochs=1)).fit(X).generator_.influence_) == len(X)


def test_reference_data_can_give_the_credit():
    valuator = GMValuator(query="reference").fit(TRAIN, X_ref=SAMPLES)
    np.testing.assert_array_equal(valuator.values_, GMValuator().fit(TRAIN, X_gen=SAMPLES).values_)
    assert valuator.objective_ == "credit:reference" and valuator.generator_ is None


def test_a_fitted_valuator_survives_pickling():
    for settings in ({}, {"recall": "pq", "rerank": "l2"}, {"quality": "realism"}):
        valuator = GMValuator(**settings, random_state=0).fit(TRAIN, X_gen=SAMPLES)
        again = pickle.loads(pickle.dumps(valuator))
        np.testing.assert_array_equal(again.score_samples(UNSEEN), valuator.score_samples(UNSEEN))
        np.testing.assert_array_equal(again.attribute(UNSEEN).toarray(), valuator.attribute(UNSEEN).toarray())


# Recall


@pytest.mark.parametrize("recall", ["pq", "hnsw"])
def test_an_approximate_recall_gives_the_same_credit_where_it_finds_all(recall):
    X, samples = np.split(load_digits().data[:1500] / 16, [1200])
    valuator = GMValuator(k=10, n_candidates=50, recall=recall, random_state=0).fit(X, X_gen=samples)
    np.testing.assert_allclose(valuator.values_, GMValuator(k=10).fit(X, X_gen=samples).values_, rtol=1e-12)


# What does not fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be a positive integer; got 0"),
        ({"k": 2.0}, "k must be a positive integer; got 2.0"),
        ({"n_candidates": 5}, "n_candidates must be at least k=10; got 5"),
        ({"n_generated": 0}, "n_generated must be a positive integer or None"),
        ({"recall": "ivf"}, "recall must be one of"),
        ({"rerank": "ssim"}, "rerank must be None, 'l2', 'lpips' or a function"),
        ({"rerank": lambda query, candidates: [1.0]}, r"returned shape \(1,\) for 50 candidates"),
        ({"temperature": 0.0}, "temperature must be 'median' or a number above zero; got 0.0"),
        ({"temperature": "mean"}, "temperature must be 'median'"),
        ({"quality": "maniqa"}, "quality must be 'realism', a function of samples or None; got 'maniqa'"),
        ({"quality": 3}, "quality must be 'realism'"),
        ({"query": "real"}, "query must be 'generated' or 'reference'"),
        ({"n_remove": 60}, "below the 60 instances"),
        ({"feature_extractor": 3}, "feature_extractor must be"),
    ],
)
def test_parameters_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GMValuator(**settings).fit(TRAIN, X_gen=SAMPLES)


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        ({}, {}, r"call fit\(X, X_gen=...\), or give a generator"),
        ({}, {"X_gen": SAMPLES[:, :2]}, r"X_gen has instances of shape \(2,\); expected \(3,\)"),
        ({}, {"X_gen": np.full((2, 3), np.nan)}, "contains NaN"),
        ({}, {"X_gen": SAMPLES[:0]}, "0 sample"),
        ({"query": "reference"}, {}, r"call fit\(X, X_ref=...\)"),
        ({"query": "reference"}, {"X_gen": SAMPLES, "X_ref": SAMPLES}, r"call fit\(X, X_ref=...\)"),
        ({"quality": "realism"}, {"X_gen": SAMPLES, "X_ref": IMAGES}, "X_ref has instances of shape"),
        ({"generator": "stylegan"}, {}, r"an object with a method sample\(n_samples\)"),
        ({"generator": nn.Linear(32, 2)}, {}, r"shape \(2,\); expected \(3,\)"),
        ({"generator": nn.LSTM(32, 3)}, {}, "The generator returned tuple; expected one tensor"),
        ({"generator": Conditional(), "conditional": True}, {}, r"call fit\(X, y\)"),
    ],
)
def test_samples_that_do_not_fit_are_named(settings, data, message):
    with pytest.raises(ValueError, match=message):
        GMValuator(**settings).fit(TRAIN, **data)


def test_features_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="60 of 60 training instances are NaN or infinite"):
        GMValuator(feature_extractor=lambda x: x / 0).fit(TRAIN, X_gen=SAMPLES)


@pytest.mark.parametrize("method", ["attribute", "kneighbors", "score_samples"])
def test_nothing_is_valued_before_fit(method):
    with pytest.raises(NotFittedError):
        getattr(GMValuator(), method)(TRAIN)


def test_both_kinds_of_pipeline_clean_before_they_fit():
    labels = np.arange(60) % 2
    valuator = GMValuator(GaussianMixture(random_state=0), n_remove=9)
    kept = clone(valuator).fit(TRAIN).support_
    alone = LogisticRegression().fit(TRAIN[kept], labels[kept])
    resampling = make_resampling_pipeline(valuator, LogisticRegression()).fit(TRAIN, labels)
    np.testing.assert_array_equal(resampling[-1].coef_, alone.coef_)
    cleansed = make_pipeline(StandardScaler(), CleansedEstimator(valuator, LogisticRegression())).fit(TRAIN, labels)
    assert cleansed[-1].cleanser_.support_.sum() == 51 and cleansed.predict(TRAIN).shape == (60,)


ROWS_ARE_DROPPED = {
    "check_methods_sample_order_invariance": "data in another order are not those of fit: other rows are dropped",
    "check_methods_subset_invariance": "a part of the data is not that of fit: other rows are dropped",
}


# The checks call fit(X, y): a density that is fitted on X makes the samples.
@parametrize_with_checks(
    [GMValuator(GaussianMixture(random_state=0), k=3)], expected_failed_checks=lambda _: ROWS_ARE_DROPPED
)
def test_the_valuator_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)
