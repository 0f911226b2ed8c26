import pickle

import numpy as np
import pandas as pd
import pytest
from imblearn.pipeline import make_pipeline as make_resampling_pipeline
from sklearn.base import TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted

from ganclean import CleansedEstimator, GANInfluence, GANTrainer
from ganclean.backends import ITD
from tests.toy_gans import toy_cleanser

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

OTHER_DATA = {
    "check_methods_sample_order_invariance": "data in another order are not those of fit: other rows are dropped",
    "check_methods_subset_invariance": "a part of the data is not that of fit: other rows are dropped",
}
KEEPS_CONTAINERS = {"check_transformer_data_not_an_array": "a list comes back as a list", **OTHER_DATA}
DROPS_ROWS = {
    "check_transformer_general": "the result has fewer rows than the data",
    "check_transformer_data_not_an_array": "the result has fewer rows than the data",
    **OTHER_DATA,
}


class AlwaysTransformer(TransformerMixin, GANInfluence):
    """GANInfluence with a `transform` that exists before `fit`, so that scikit-learn takes it for a transformer."""

    def transform(self, X):
        check_is_fitted(self)
        return self._transform(X)


def quick(kind=GANInfluence, **params):
    return kind(trainer=GANTrainer(n_epochs=2), **params)


@parametrize_with_checks([quick(), quick(AlwaysTransformer)], expected_failed_checks=lambda _: DROPS_ROWS)
def test_the_cleanser_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@parametrize_with_checks([quick(AlwaysTransformer, n_remove=0)], expected_failed_checks=lambda _: KEEPS_CONTAINERS)
def test_a_cleanser_that_drops_nothing_passes_the_checks_of_transformers(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([GANInfluence(), AlwaysTransformer()], expected_failed_checks=lambda _: DROPS_ROWS)
def test_the_cleanser_with_all_its_defaults_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@parametrize_with_checks(
    [CleansedEstimator(quick(n_remove=1, random_state=0), final) for final in (LogisticRegression(), Ridge())]
)
def test_the_cleansed_estimator_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


class OnlyConvertible:
    """What is an array only once it is asked to be one."""

    def __init__(self, data):
        self.data = np.asarray(data)

    def __array__(self, dtype=None, copy=None):
        return self.data

    def __array_function__(self, func, types, args, kwargs):
        raise TypeError(f"{func.__name__} is not for this")


@pytest.mark.parametrize("shape", [(10, 2), (10, 1, 4, 4)])
def test_whatever_converts_to_an_array_can_be_fitted(shape):
    X = np.random.default_rng(0).normal(size=shape)
    influence = quick(random_state=0, metric="log_likelihood").fit(OnlyConvertible(X)).influence_
    assert np.array_equal(influence, quick(random_state=0, metric="log_likelihood").fit(X).influence_)


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    return rng.normal(size=(60, 2)) + 2 * y[:, None], y


def cleansed(final=None, **params):
    cleanser = toy_cleanser(n_epochs=1, batch_size=20).set_params(**params)
    return CleansedEstimator(cleanser, LogisticRegression() if final is None else final)


def test_a_cleansed_estimator_is_fitted_on_the_kept_rows(labelled):
    X, y = labelled
    model = cleansed(n_remove=17).fit(X, y)
    kept = model.cleanser_.support_
    alone = LogisticRegression().fit(X[kept], y[kept])
    assert kept.sum() == 43
    assert np.array_equal(model.estimator_.coef_, alone.coef_)
    for method in ("predict", "predict_proba", "decision_function"):
        assert np.array_equal(getattr(model, method)(X), getattr(alone, method)(X))
    assert model.score(X, y) == alone.score(X, y)
    assert model.classes_.tolist() == [0, 1] and model.n_features_in_ == 2
    assert not hasattr(model.cleanser, "influence_") and not hasattr(model.estimator, "coef_")


def test_a_cleansed_estimator_has_the_methods_of_its_estimator(labelled):
    X, _ = labelled
    transformer = cleansed(PCA(1)).fit(X)
    assert transformer.transform(X).shape == (60, 1)
    assert not hasattr(transformer, "predict") and not hasattr(cleansed(Ridge()), "predict_proba")
    assert hasattr(cleansed(), "predict_proba") and not hasattr(cleansed(), "transform")


def test_a_cleansed_estimator_passes_the_reference_on_to_its_cleanser(labelled):
    X, y = labelled
    assert cleansed().fit(X, y, X_val=X[:9]).cleanser_.metric_.n_reference_ == 9


def test_a_grid_search_tunes_the_cleanser(labelled):
    X, y = labelled
    grid = {"cleanser__n_remove": [0, 0.3], "cleanser__backend__last_epochs": [None, 1]}
    search = GridSearchCV(cleansed(), grid, cv=2, error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 4
    assert set(search.best_params_) == set(grid)
    removed = round(search.best_params_["cleanser__n_remove"] * 60)
    assert (~search.best_estimator_.cleanser_.support_).sum() == removed
    assert search.predict(X).shape == (60,)


def test_cross_validation_cleanses_each_training_part(labelled):
    X, y = labelled
    result = cross_validate(cleansed(n_remove=5), X, y, cv=3, return_estimator=True, error_score="raise")
    assert [(~model.cleanser_.support_).sum() for model in result["estimator"]] == [5, 5, 5]
    assert [len(model.cleanser_.support_) for model in result["estimator"]] == [40, 40, 40]
    assert (result["test_score"] > 0.5).all()


def test_the_cleanser_itself_can_be_cross_validated_by_its_score(labelled):
    X, _ = labelled
    search = GridSearchCV(toy_cleanser(batch_size=20), {"trainer__n_epochs": [1, 2]}, cv=2, error_score="raise").fit(X)
    assert (search.cv_results_["mean_test_score"] < 0).all()


def test_a_cleansed_estimator_works_in_a_plain_pipeline(labelled):
    X, y = labelled
    pipeline = make_pipeline(StandardScaler(), cleansed())
    pipeline.set_params(cleansedestimator__cleanser__n_remove=3)
    assert pipeline.fit(X, y).predict(X).shape == (60,)
    assert (~pipeline[-1].cleanser_.support_).sum() == 3
    assert pipeline.score(X, y) > 0.8


def test_a_cleansed_estimator_survives_pickling_and_cloning(labelled):
    X, y = labelled
    model = cleansed().fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    copied = clone(model)
    assert not hasattr(copied, "estimator_")
    assert np.array_equal(copied.fit(X, y).predict_proba(X), model.predict_proba(X))


def test_frames_go_through_a_cleansed_estimator_with_their_names(labelled):
    X, y = labelled
    model = cleansed().fit(pd.DataFrame(X, columns=["a", "b"]), pd.Series(y))
    assert model.feature_names_in_.tolist() == ["a", "b"]


@pytest.mark.parametrize("n_labels", [59, 61])
def test_as_many_labels_as_instances_are_needed(n_labels, labelled):
    X, _ = labelled
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        toy_cleanser(batch_size=20).fit_resample(X, np.arange(n_labels) % 2)


def test_imbalanced_learns_pipeline_drops_rows_while_fitting_and_keeps_all_in_prediction(labelled):
    X, y = labelled
    pipeline = make_resampling_pipeline(toy_cleanser(batch_size=20, n_remove=11), LogisticRegression()).fit(X, y)
    cleanser, model = pipeline
    assert cleanser.support_.sum() == 49
    assert np.array_equal(model.coef_, LogisticRegression().fit(X[cleanser.support_], y[cleanser.support_]).coef_)
    assert pipeline.predict(X).shape == (60,)
    assert 0.5 < pipeline.score(X, y) <= 1


def test_imbalanced_learns_pipeline_works_without_labels(labelled):
    X, _ = labelled
    pipeline = make_resampling_pipeline(toy_cleanser(batch_size=20, n_remove=11), PCA(1)).fit(X)
    assert np.array_equal(pipeline[-1].mean_, X[pipeline[0].support_].mean(axis=0))


def test_a_fitted_pipeline_of_imbalanced_learn_can_be_cloned_and_fitted_again(labelled):
    X, y = labelled
    pipeline = make_resampling_pipeline(toy_cleanser(batch_size=20), LogisticRegression()).fit(X, y)
    again = clone(pipeline).fit(X, y)
    assert np.array_equal(again.predict_proba(X), pipeline.predict_proba(X))


def test_the_pipeline_of_scikit_learn_refuses_a_step_that_drops_rows(labelled):
    X, y = labelled
    with pytest.raises(TypeError, match="All intermediate steps should be transformers"):
        make_pipeline(toy_cleanser(), LogisticRegression()).fit(X, y)


def test_the_sample_weights_serve_an_estimator_that_takes_weights(labelled):
    X, y = labelled
    cleanser = toy_cleanser(batch_size=20).fit(X)
    assert ((cleanser.sample_weight_ >= 0) & (cleanser.sample_weight_ <= 1)).all()
    weighted = Ridge().fit(X, y, sample_weight=cleanser.sample_weight_)
    np.testing.assert_allclose(weighted.coef_, Ridge().fit(X[cleanser.support_], y[cleanser.support_]).coef_)


def test_the_representation_names_what_differs_from_the_defaults():
    assert repr(GANInfluence(n_remove=3, backend=ITD(last_epochs=2))) == (
        "GANInfluence(backend=ITD(last_epochs=2), n_remove=3)"
    )
