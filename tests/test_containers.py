import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from ganclean import GANInfluence, GANTrainer
from ganclean.metrics import FID, InceptionScore
from ganclean.networks import ConvGenerator, ImageClassifier
from tests.toy_gans import toy_cleanser, toy_data

IMAGES = np.tanh(np.random.default_rng(1).normal(size=(20, 1, 8, 8))).astype(np.float32)


class Items(Dataset):
    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"instance": torch.from_numpy(self.values[index]), "label": index}


CONTAINERS = {
    "array": np.asarray,
    "array in Fortran order": np.asfortranarray,
    "list": np.ndarray.tolist,
    "tensor": lambda X: torch.from_numpy(X.copy()),
    "TensorDataset": lambda X: TensorDataset(torch.from_numpy(X.copy())),
    "Dataset of dicts": lambda X: Items(X.copy()),
    "DataFrame": lambda X: pd.DataFrame(X, columns=["a", "b"], index=range(100, 100 + len(X))),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_any_container_gives_the_same_influences_and_comes_back_as_it_was(container, X, cleanser):
    data = container(X)
    other = toy_cleanser().fit(data)
    assert np.array_equal(other.influence_, cleanser.influence_)
    cleaned = other.transform(data)
    if isinstance(data, Dataset):
        assert isinstance(cleaned, Subset) and cleaned.dataset is data
        assert list(cleaned.indices) == cleanser.sample_indices_.tolist()
    else:
        assert type(cleaned) is type(data)
        assert np.array_equal(np.asarray(cleaned), X[cleanser.support_])
    if isinstance(data, pd.DataFrame):
        assert list(other.feature_names_in_) == ["a", "b"]
        assert cleaned.index.tolist() == (100 + cleanser.sample_indices_).tolist()


def test_the_training_data_are_recognised_by_content_in_another_container(cleanser, X):
    kept = X[cleanser.support_]
    assert np.array_equal(cleanser.transform(X.copy()), kept)
    assert np.array_equal(cleanser.transform(torch.from_numpy(X.copy())).numpy(), kept)
    assert np.array_equal(cleanser.transform(pd.DataFrame(X)).to_numpy(), kept)


def test_other_data_lose_what_scores_above_the_threshold(cleanser, X):
    new = np.random.default_rng(5).normal(size=(300, 2))
    scores = cleanser.score_samples(new)
    expected = new[scores <= cleanser.threshold_]
    assert scores.shape == (300,) and scores.dtype == np.float64
    assert 0 < len(expected) < 300
    assert np.array_equal(cleanser.transform(new), expected)
    assert torch.equal(cleanser.transform(torch.from_numpy(new)), torch.from_numpy(expected))
    shuffled = X[::-1].copy()
    assert np.array_equal(
        cleanser.transform(shuffled), shuffled[cleanser.score_samples(shuffled) <= cleanser.threshold_]
    )


def test_scores_of_new_data_do_not_depend_on_their_company_or_container(cleanser):
    new = np.random.default_rng(5).normal(size=(9, 2))
    scores = cleanser.score_samples(new)
    for container in CONTAINERS.values():
        np.testing.assert_allclose(cleanser.score_samples(container(new[4:5])), scores[4:5], rtol=1e-9)
    np.testing.assert_allclose(cleanser.score_samples(Items(new)), scores, rtol=1e-12)
    np.testing.assert_allclose(cleanser.score_samples(torch.from_numpy(new)), scores, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_data_that_are_not_finite_are_refused(container, value):
    X = toy_data()
    X[5, 1] = value
    with pytest.raises(ValueError, match=r"(?i)input X contains (NaN|infinity)"):
        toy_cleanser().fit(container(X))


def test_a_reference_that_is_not_finite_is_refused(X):
    bad = np.full((4, 2), np.nan)
    for reference in (bad, torch.from_numpy(bad), TensorDataset(torch.from_numpy(bad))):
        with pytest.raises(ValueError, match=r"(?i)contains (NaN|infinity)"):
            toy_cleanser().fit(X, X_val=reference)


def test_new_data_that_are_not_finite_are_refused(cleanser):
    bad = np.full((4, 2), np.nan)
    for new in (bad, torch.from_numpy(bad), TensorDataset(torch.from_numpy(bad))):
        with pytest.raises(ValueError, match=r"(?i)contains (NaN|infinity)"):
            cleanser.score_samples(new)
        with pytest.raises(ValueError, match=r"(?i)contains (NaN|infinity)"):
            cleanser.transform(new)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(9, 2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((1, 2)), "minimum of 2 is required"),
        (np.zeros(5), "Expected 2D array, got 1D array"),
        (torch.zeros(1, 2), r"shape \(n_samples, ...\) with at least 2 instances; got \(1, 2\)"),
        (torch.zeros(5), r"shape \(n_samples, ...\) with at least 2 instances; got \(5,\)"),
        (TensorDataset(torch.zeros(1, 2)), "A Dataset must be map-style and hold at least 2 instances"),
        (Stream(), "A Dataset must be map-style and hold at least 2 instances"),
        (np.array([["a", "b"]] * 4), "could not convert string to float|dtype='numeric' is not compatible"),
    ],
    ids=["one row", "vector", "one row of a tensor", "vector of a tensor", "one item", "stream", "strings"],
)
def test_data_that_cannot_be_trained_on_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        toy_cleanser().fit(data)


@pytest.mark.parametrize("container", [np.asarray, torch.from_numpy, lambda x: TensorDataset(torch.from_numpy(x))])
def test_instances_of_another_shape_are_refused_after_fit(container, cleanser):
    other = container(np.zeros((4, 3)))
    for call in (cleanser.score_samples, cleanser.transform, cleanser.score):
        with pytest.raises(ValueError, match=r"3 features, but GANInfluence is expecting 2|shape \(3,\), but fit was"):
            call(other)


def test_a_reference_of_another_shape_is_refused(X):
    with pytest.raises(ValueError, match=r"3 features, but GANInfluence is expecting 2|shape \(3,\), but fit was"):
        toy_cleanser().fit(X, X_val=np.zeros((4, 3)))


@pytest.fixture(scope="module")
def image_cleanser():
    torch.manual_seed(0)
    classifier = ImageClassifier((1, 8, 8), n_classes=4)
    trainer = GANTrainer(n_epochs=2, batch_size=10, ema_decay=0.9)
    metric = {"fid": FID(classifier.features), "is": InceptionScore(classifier)}
    return GANInfluence(trainer=trainer, metric=metric, n_remove=0.2, random_state=0).fit(IMAGES)


def test_images_are_cleansed_in_their_shape(image_cleanser):
    assert isinstance(image_cleanser.generator_, ConvGenerator)
    assert image_cleanser.transform(IMAGES).shape == (16, 1, 8, 8)
    assert image_cleanser.transform(IMAGES).dtype == np.float32
    assert image_cleanser.transform(torch.from_numpy(IMAGES)).shape == (16, 1, 8, 8)
    assert image_cleanser.score_samples(IMAGES[:3]).shape == (3,)
    assert image_cleanser.sample(2)[0].shape == (2, 1, 8, 8)
    assert image_cleanser.n_features_in_ == 64
    assert all(np.isfinite(influence).all() for influence in image_cleanser.influences_.values())


def test_images_of_another_size_are_refused_after_fit(image_cleanser):
    for other in (np.zeros((4, 1, 8, 4)), np.zeros((4, 3, 8, 8)), torch.zeros(4, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"X has instances of shape .*, but fit was called with shape \(1, 8, 8\)"):
            image_cleanser.score_samples(other)


def test_flattened_images_are_not_taken_for_the_images(image_cleanser):
    with pytest.raises(ValueError, match=r"shape \(64,\), but fit was called with shape \(1, 8, 8\)"):
        image_cleanser.transform(IMAGES.reshape(20, 64))


@pytest.mark.parametrize("second", [torch.from_numpy, lambda X: TensorDataset(torch.from_numpy(X)), np.asarray])
def test_fitting_again_forgets_the_names_of_the_features(second, X):
    cleanser = toy_cleanser(n_epochs=1).fit(pd.DataFrame(X, columns=["a", "b"])).fit(second(X.copy()))
    assert not hasattr(cleanser, "feature_names_in_")


def test_fitting_images_after_vectors_forgets_the_vectors(X):
    trainer = GANTrainer(n_epochs=1, batch_size=10)
    cleanser = GANInfluence(trainer=trainer, metric=FID("pixels", n_samples=20), random_state=0)
    cleanser.fit(pd.DataFrame(X, columns=["a", "b"])).fit(IMAGES)
    assert cleanser.transform(IMAGES).shape == (19, 1, 8, 8)
    assert cleanser.n_features_in_ == 64
    assert not hasattr(cleanser, "feature_names_in_")
