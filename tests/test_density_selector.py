"""Instance selection keeps the densest instances, exactly as many as asked, in every container and pipeline."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from imblearn.pipeline import make_pipeline as make_resampling_pipeline
from scipy.stats import spearmanr
from sklearn.base import TransformerMixin, clone
from sklearn.covariance import LedoitWolf, ShrunkCovariance
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.utils.data import Subset, TensorDataset

from ganclean import CleansedEstimator
from ganclean.metrics import PRDC
from ganclean.valuation import DensitySelector
from tests.reference.density import distance_to_neighbour, gaussian_log_density
from tests.test_sklearn_contract import DROPS_ROWS, KEEPS_CONTAINERS
from tests.toy_gans import toy_cleanser, toy_data

DENSITIES = ["gaussian", "ppca", "knn"]


class AlwaysTransformer(TransformerMixin, DensitySelector):
    """DensitySelector with a `transform` that exists before `fit`, so that scikit-learn takes it for a transformer."""

    def transform(self, X):
        check_is_fitted(self)
        return self._transform(X)


@parametrize_with_checks(
    [kind(density=d) for kind in (DensitySelector, AlwaysTransformer) for d in DENSITIES],
    expected_failed_checks=lambda _: DROPS_ROWS,
)
def test_it_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@parametrize_with_checks(
    [AlwaysTransformer(retention=1.0)],
    expected_failed_checks=lambda _: {name: KEEPS_CONTAINERS[name] for name in ["check_transformer_data_not_an_array"]},
)
def test_a_selector_that_keeps_all_passes_the_checks_of_transformers(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:600] / 16, y[:600]


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], [31, 20, 9])[rng.permutation(60)]
    return rng.normal(size=(60, 2)) * (1 + y[:, None]) + 5 * y[:, None], y


def test_without_shrinkage_values_are_those_of_a_gaussian_mixture_of_one_component(digits):
    X, _ = digits
    selector = DensitySelector(shrinkage=None).fit(X)
    expected = GaussianMixture(1, reg_covar=1e-5).fit(X).score_samples(X)
    np.testing.assert_allclose(selector.values_, expected, atol=1e-6)
    np.testing.assert_allclose(selector.values_, gaussian_log_density(X, 1e-5), atol=1e-6)


@pytest.mark.parametrize(
    ("shrinkage", "estimate"), [("ledoit_wolf", LedoitWolf()), (0.3, ShrunkCovariance(shrinkage=0.3))]
)
def test_shrunk_covariances_are_those_of_scikit_learn(shrinkage, estimate, digits):
    X, _ = digits
    selector, estimate = DensitySelector(shrinkage=shrinkage).fit(X), estimate.fit(X)
    # scikit-learn's score is the mean log-density.
    assert selector.values_.mean() == pytest.approx(estimate.score(X), abs=1e-6)
    centred = selector.values_ - selector.values_.mean()
    squares = estimate.mahalanobis(X)
    np.testing.assert_allclose(centred, (squares.mean() - squares) / 2, atol=1e-6)


def test_probabilistic_pca_is_that_of_scikit_learn(digits):
    X, _ = digits
    selector = DensitySelector(density="ppca", explained_variance=0.8).fit(X)
    np.testing.assert_allclose(selector.values_, PCA(0.8, svd_solver="full").fit(X).score_samples(X), rtol=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_the_nearest_neighbours_of_the_data_do_not_count_themselves(k):
    X = np.r_[toy_data(40), toy_data(3)]
    selector = DensitySelector(density="knn", k=k).fit(X)
    np.testing.assert_allclose(selector.values_, -distance_to_neighbour(X, k), atol=1e-12)
    far = selector.score_samples(X[:1] + 100)
    assert far == pytest.approx(np.sort(np.linalg.norm(X - X[0] - 100, axis=1))[k - 1])


@pytest.mark.parametrize("density", DENSITIES)
def test_each_class_has_a_density_of_its_own(density, labelled):
    X, y = labelled
    selector = DensitySelector(density=density, per_class=True).fit(X, y)
    assert list(selector.densities_) == [0, 1, 2]
    for label in range(3):
        alone = DensitySelector(density=density).fit(X[y == label])
        np.testing.assert_allclose(selector.values_[y == label], alone.values_, rtol=1e-9)
        assert np.array_equal(selector.support_[y == label], alone.support_)
        assert selector.thresholds_[label] == pytest.approx(alone.threshold_)


@given(
    seed=st.integers(0, 1000),
    retention=st.floats(0.01, 1),
    sizes=st.lists(st.integers(7, 30), min_size=1, max_size=3),
    density=st.sampled_from(DENSITIES),
    decimals=st.integers(0, 3),
)
def test_exactly_so_many_of_each_class_are_kept_and_they_are_the_densest(seed, retention, sizes, density, decimals):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    # Rounded, values coincide.
    X = np.round(rng.normal(size=(len(y), 2)), decimals) + np.eye(len(y))[:, :2]
    selector = DensitySelector(retention, density=density, per_class=True).fit(X, y)
    for label, size in enumerate(sizes):
        of_class, kept = y == label, selector.support_ & (y == label)
        assert kept.sum() == max(1, round(retention * size)) <= np.ceil(retention * size)
        dropped = of_class & ~kept
        if dropped.any():
            assert selector.values_[kept].min() >= selector.values_[dropped].max()
    assert np.array_equal(selector.get_support(indices=True), np.flatnonzero(selector.support_))


@given(seed=st.integers(0, 1000))
def test_the_order_of_the_instances_does_not_matter(seed):
    X, order = toy_data(50), np.random.default_rng(seed).permutation(50)
    selector, shuffled = DensitySelector(0.3).fit(X), DensitySelector(0.3).fit(X[order])
    np.testing.assert_allclose(shuffled.values_, selector.values_[order], rtol=1e-9)
    assert np.array_equal(shuffled.support_, selector.support_[order])


def test_the_fitted_attributes_tell_the_same_rows(labelled):
    X, _ = labelled
    selector = DensitySelector(0.7).fit(X)
    assert selector.objective_ == "fidelity" and list(selector.densities_) == [None]
    assert np.array_equal(selector.harmfulness_, -selector.values_)
    assert np.array_equal(selector.sample_weight_, selector.support_) and selector.support_.sum() == 42
    assert selector.threshold_ == selector.thresholds_[None] == selector.harmfulness_[selector.support_].max()
    assert np.array_equal(selector.transform(X), X[selector.support_])


@pytest.mark.parametrize("density", ["gaussian", "ppca"])
def test_scores_of_the_data_of_fit_are_their_harmfulness(density, labelled):
    X, y = labelled
    selector = DensitySelector(density=density).fit(X)
    np.testing.assert_allclose(selector.score_samples(X), selector.harmfulness_)
    np.testing.assert_allclose(selector.score_samples(X[:1]), selector.harmfulness_[:1])
    selector = DensitySelector(density=density, per_class=True).fit(X, y)
    np.testing.assert_allclose(selector.score_samples(X, y), selector.harmfulness_)


def test_new_data_are_kept_where_they_are_as_dense_as_the_kept(labelled):
    X, y = labelled
    new, new_y = X[::-1][:30] + 0.1, y[::-1][:30]
    selector = DensitySelector().fit(X)
    kept = selector.score_samples(new) <= selector.threshold_
    assert 0 < kept.sum() < 30 and np.array_equal(selector.transform(new), new[kept])
    selector = DensitySelector(per_class=True).fit(X, y)
    kept = selector.score_samples(new, new_y) <= [selector.thresholds_[label] for label in new_y]
    assert 0 < kept.sum() < 30 and np.array_equal(selector.transform(new, new_y), new[kept])


def test_the_data_of_fit_with_other_labels_are_new_data(labelled):
    X, y = labelled
    selector = DensitySelector(per_class=True).fit(X, y)
    for same in (selector.transform(X), selector.transform(X, y)):
        assert np.array_equal(same, X[selector.support_])
    assert len(selector.transform(X, (y + 1) % 3)) != selector.support_.sum()


def test_what_comes_in_goes_out(labelled):
    X, y = labelled
    selector = DensitySelector(0.4, per_class=True)
    values = selector.fit(X, y).values_
    frame = pd.DataFrame(X, columns=["a", "b"])
    kept, kept_y = selector.fit_resample(frame, pd.Series(y))
    assert list(kept.columns) == ["a", "b"] and len(kept) == len(kept_y) == selector.support_.sum() == 24
    names = np.array(["cat", "dog", "eel"])[y]
    assert list(selector.fit(X, names).densities_) == ["cat", "dog", "eel"]
    tensor = torch.from_numpy(X)
    assert torch.equal(selector.fit(tensor, y).transform(tensor), tensor[selector.support_])
    data = TensorDataset(tensor, torch.from_numpy(y))
    subset = selector.fit(data).transform(data)
    assert isinstance(subset, Subset) and np.array_equal(selector.values_, values)
    assert np.array_equal(selector.score_samples(data), selector.score_samples(tensor, y))


def test_densities_are_fitted_to_features_of_images():
    images = torch.randn(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    brightness = nn.Sequential(nn.Flatten(), nn.AvgPool1d(8))
    selector = DensitySelector(feature_extractor=brightness).fit(images)
    features = images.reshape(30, 2, 8).mean(dim=2).double().numpy()
    np.testing.assert_allclose(selector.values_, DensitySelector().fit(features).values_, rtol=1e-6)
    assert selector.transform(images).shape == (15, 1, 4, 4) and selector.n_features_in_ == 16


@pytest.mark.parametrize("density", DENSITIES)
def test_it_survives_pickling_and_cloning(density, labelled):
    X, y = labelled
    selector = DensitySelector(0.2, density=density, per_class=True).fit(X, y)
    again = pickle.loads(pickle.dumps(selector))
    assert np.array_equal(again.score_samples(X + 1, y), selector.score_samples(X + 1, y))
    assert clone(selector).get_params() == selector.get_params() and not hasattr(clone(selector), "transform")


@pytest.mark.parametrize("density", DENSITIES)
def test_every_density_finds_digits_whose_pixels_are_shuffled(density, digits):
    X, _ = digits
    rng = np.random.default_rng(0)
    is_foreign = np.zeros(len(X), dtype=bool)
    is_foreign[rng.permutation(len(X))[:60]] = True
    X = np.where(is_foreign[:, None], rng.permuted(X, axis=1), X)
    selector = DensitySelector(0.9, density=density).fit(X)
    assert roc_auc_score(is_foreign, selector.harmfulness_) > 0.95


def test_the_three_densities_order_a_gaussian_alike():
    X = np.random.default_rng(0).normal(size=(400, 2)) @ [[2.0, 0.5], [0.0, 0.5]]
    values = [DensitySelector(density=density, k=20).fit(X).values_ for density in DENSITIES]
    assert spearmanr(np.array(values).T).statistic.min() > 0.85


def test_selection_trades_recall_for_precision():
    X, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(X))
    (train, test), y = (X[part] / 16 for part in np.split(rows, [900])), y[rows[:900]]
    dense, _ = DensitySelector(0.5, per_class=True).fit_resample(train, y)
    metric = PRDC().fit(test)
    selected, random = (metric.compute(torch.from_numpy(part)) for part in (dense, train[: len(dense)]))
    assert selected["precision"] > random["precision"] + 0.01
    assert selected["density"] > random["density"] + 0.2
    assert selected["recall"] < random["recall"] - 0.1


def test_a_cleansed_estimator_is_fitted_on_the_dense_half_of_each_class(labelled):
    X, y = labelled
    model = CleansedEstimator(DensitySelector(per_class=True), LogisticRegression()).fit(X, y)
    kept = DensitySelector(per_class=True).fit(X, y).support_
    assert np.array_equal(model.estimator_.coef_, LogisticRegression().fit(X[kept], y[kept]).coef_)
    search = GridSearchCV(model, {"cleanser__retention": [0.5, 1.0], "cleanser__density": DENSITIES[:2]}, cv=2)
    assert len(search.fit(X, y).cv_results_["params"]) == 4


def test_it_selects_what_a_gan_is_trained_on_and_influence_goes_on_from_there():
    X = toy_data(40)
    pipeline = make_resampling_pipeline(DensitySelector(0.5), toy_cleanser(n_remove=4)).fit(X)
    selector, cleanser = pipeline
    alone = toy_cleanser(n_remove=4).fit(DensitySelector(0.5).fit(X).transform(X))
    assert len(cleanser.influence_) == 20 and cleanser.support_.sum() == 16
    assert np.array_equal(cleanser.influence_, alone.influence_)
    assert cleanser.transform(selector.transform(X)).shape == (16, 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"retention": 0}, "retention must be a fraction in"),
        ({"retention": 1.5}, "retention must be a fraction in"),
        ({"retention": True}, "retention must be a fraction in"),
        ({"density": "kde"}, "density must be one of"),
        ({"shrinkage": "oas"}, "shrinkage must be 'ledoit_wolf', None or in"),
        ({"shrinkage": 1.1}, "shrinkage must be 'ledoit_wolf', None or in"),
        ({"k": 0}, "k must be an integer of at least 1"),
        ({"explained_variance": 1.0}, "explained_variance must be in"),
        ({"density": "knn", "k": 60}, "The data must hold at least 61 instances for density='knn'; got 60"),
        ({"per_class": True}, r"per_class=True needs the class of every instance: give y"),
    ],
)
def test_what_is_not_as_expected_is_named(params, message, labelled):
    X, _ = labelled
    with pytest.raises(ValueError, match=message):
        DensitySelector(**params).fit(X)


def test_classes_are_checked(labelled):
    X, y = labelled
    selector = DensitySelector(per_class=True)
    with pytest.raises(ValueError, match="The class 3 must hold at least 2 instances"):
        selector.fit(X, np.r_[y[:-1], 3])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        selector.fit(X, y[:-1])
    with pytest.raises(ValueError, match="Unknown label type"):
        selector.fit(X, X[:, 0])
    with pytest.raises(ValueError, match="per_class=True needs the class"):
        selector.fit(X, y).transform(X + 1)
    with pytest.raises(ValueError, match=r"y holds the class 7, which fit has not seen: \[0, 1, 2\]"):
        selector.score_samples(X, np.r_[y[:-1], 7])


@pytest.mark.parametrize("params", [{"shrinkage": 0.0}, {"density": "ppca"}])
def test_features_on_a_line_have_no_density_without_shrinkage(params):
    line = np.arange(20.0)[:, None] * [1.0, 2.0]
    with pytest.raises(ValueError, match="in fewer dimensions than there are"):
        DensitySelector(**params).fit(line)
    assert np.isfinite(DensitySelector().fit(line).values_).all()


@pytest.mark.parametrize("density", ["gaussian", "ppca"])
def test_equal_instances_have_no_density(density):
    with pytest.raises(ValueError, match="the features of all 8 are equal"):
        DensitySelector(density=density).fit(np.ones((8, 2)))
