"""Conditional GANs from labels to scores."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from ganclean import CleansedEstimator, GANTrainer
from ganclean.backends import ITD
from ganclean.exceptions import MetricError, NetworkError, TrajectoryError
from ganclean.losses import R1, GradientPenalty
from ganclean.metrics import FID, DiscriminatorLoss, SampleMean
from ganclean.validation import counterfactual_retrain, estimation_accuracy
from tests.reference.eager_training import train_eagerly
from tests.reference.finite_differences import (
    finite_difference_influences,
    finite_difference_outsiders,
    largest_error,
    metric_values,
)
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data

X = toy_data()
CLASSES = np.random.default_rng(2).permutation(np.repeat([0, 1, 2], [9, 4, 3]))
VECTORS = np.random.default_rng(3).normal(size=(16, 2))
SOME = [0, 4, 7, 13]
SCHEMES = [("exact", 1e-5), ("secant", 1e-3)]


class Conditional(nn.Module):
    """A perceptron that adds to its hidden units what it makes of the label."""

    def __init__(self, n_in, n_out, activation, of_label):
        super().__init__()
        self.first, self.of_label, self.last = nn.Linear(n_in, 6), of_label, nn.Linear(6, n_out)
        self.activation = activation

    def forward(self, x, label):
        return self.last(self.activation(self.first(x) + self.of_label(label)))


def networks(of_label=lambda: nn.Embedding(3, 6), seed=0):
    torch.manual_seed(seed)
    generator = Conditional(3, 2, nn.Tanh(), of_label())
    return generator.double(), Conditional(2, 1, nn.Softplus(), of_label()).double()


def of_vectors():
    return networks(lambda: nn.Linear(2, 6))


def cleanser_of(pair=None, **settings):
    return toy_cleanser(networks() if pair is None else pair, conditional=True, **settings)


class Items(Dataset):
    """Items of one's own kind."""

    def __init__(self, X, y, make):
        self.X, self.y, self.make = torch.from_numpy(X), y, make

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.make(self.X[row], self.y[row])


def tuples(X, y):
    return Items(X, y, lambda x, label: (x, int(label)))


def mappings(X, y):
    return Items(X, y, lambda x, label: {"image": x, "label": label})


@pytest.fixture(scope="module")
def fitted():
    return cleanser_of().fit(X, CLASSES)


KINDS = {"classes": (networks, CLASSES), "vectors": (of_vectors, VECTORS)}


@pytest.mark.parametrize(("make", "y"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_influence_is_the_derivative_in_the_weights(make, y, update):
    metric, expected = {"fid": FID(n_samples=60), "mean": SampleMean(n_samples=60)}, None
    for derivative, tolerance in SCHEMES:
        backend = ITD(derivative=derivative, delta=1e-4)
        cleanser = cleanser_of(make(), metric=metric, backend=backend, update=update, optimizer=OPTIMIZERS["adam"])
        cleanser.fit(X, y)
        expected = expected or finite_difference_influences(cleanser, torch.from_numpy(X), rows=SOME)
        found = {name: influence[SOME] for name, influence in cleanser.influences_.items()}
        assert largest_error(found, expected) < tolerance, derivative


@pytest.mark.parametrize(("make", "y"), KINDS.values(), ids=KINDS)
def test_training_equals_a_plain_loop_over_instances_with_their_labels(make, y):
    cleanser = cleanser_of(make(), n_epochs=4).fit(X, y)
    trajectory = cleanser.trajectory_
    assert all(np.array_equal(trajectory[t].labels, y[trajectory[t].indices]) for t in range(12))
    generator, discriminator, _ = train_eagerly(*make(), cleanser.trainer, torch.from_numpy(X), trajectory)
    final = trajectory.state(12)
    torch.testing.assert_close(final.generator, {n: p.detach() for n, p in generator.named_parameters()})
    torch.testing.assert_close(final.discriminator, {n: p.detach() for n, p in discriminator.named_parameters()})


def test_samples_are_generated_for_labels_of_the_data_and_not_always_for_those_of_the_batch():
    trajectory = cleanser_of(n_epochs=4).fit(X, CLASSES).trajectory_
    records = [trajectory[t] for t in range(12)]
    of_d, of_g = ([record.of(update).draws["labels"] for record in records] for update in ("D", "G"))
    assert not all(torch.equal(record.labels, labels) for record, labels in zip(records, of_d))
    assert not all(map(torch.equal, of_d, of_g))
    drawn = torch.cat([*of_d, *of_g])
    assert set(drawn.tolist()) == set(CLASSES)


def test_a_class_equals_its_indicator_vector():
    indicators = networks(lambda: nn.Linear(3, 6, bias=False))
    for one, other in zip(indicators, networks()):
        state = other.state_dict()
        state["of_label.weight"] = state["of_label.weight"].T
        one.load_state_dict(state)
    vectors, classes = cleanser_of(indicators).fit(X, np.eye(3)[CLASSES]), cleanser_of().fit(X, CLASSES)
    np.testing.assert_allclose(vectors.influence_, classes.influence_, rtol=1e-9)
    np.testing.assert_allclose(
        vectors.score_samples(X[:4], np.eye(3)[CLASSES[:4]]), classes.score_samples(X[:4], CLASSES[:4]), rtol=1e-9
    )


CONTAINERS = {
    "list": lambda y: (X, y.tolist()),
    "tensor": lambda y: (torch.from_numpy(X), torch.from_numpy(y)),
    "series": lambda y: (pd.DataFrame(X), pd.Series(y, index=range(50, 66))),
    "dataset and y": lambda y: (TensorDataset(torch.from_numpy(X)), y),
    "TensorDataset": lambda y: (TensorDataset(torch.from_numpy(X), torch.from_numpy(y)), None),
    "dataset of tuples": lambda y: (tuples(X, y), None),
    "dataset of mappings": lambda y: (mappings(X, y), None),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_labels_from_any_container_give_the_same_influences_and_scores(container, fitted):
    data, y = container(CLASSES)
    cleanser = cleanser_of().fit(data, y)
    assert np.array_equal(cleanser.influence_, fitted.influence_)
    assert np.array_equal(cleanser.score_samples(data, y), fitted.score_samples(X, CLASSES))


def test_y_takes_precedence_over_the_labels_in_a_dataset(fitted):
    cleanser = cleanser_of().fit(tuples(X, np.zeros(16, dtype=int)), CLASSES)
    assert np.array_equal(cleanser.influence_, fitted.influence_)


@pytest.mark.parametrize(
    "data", [X, torch.from_numpy(X), TensorDataset(torch.from_numpy(X))], ids=["array", "tensor", "dataset"]
)
def test_missing_labels_are_asked_for(data, fitted):
    with pytest.raises(NetworkError, match="networks are conditional, but there are no labels"):
        cleanser_of().fit(data)
    with pytest.raises(ValueError, match=r"labels of new instances are needed. Call score_samples\(X, y\), or"):
        fitted.score_samples(data)


def test_new_instances_of_a_class_that_was_never_trained_on_are_refused(fitted):
    with pytest.raises(ValueError, match=r"trained without the classes \[7\], which y holds"):
        fitted.score_samples(X[:3], [0, 7, 1])


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(GANTrainer, "train", lambda *_, **__: pytest.fail("training has begun"))


def test_labels_that_are_no_numbers_are_refused(fitted):
    words = np.array(["cat", "dog", "owl"])[CLASSES]
    for call in (cleanser_of().fit, cleanser_of().estimate_cost, fitted.score_samples):
        with pytest.raises(ValueError, match=r"labels y .* must be numbers.* got an array of type <U3"):
            call(X, words)


def test_labels_that_are_not_finite_are_refused():
    y = VECTORS.copy()
    y[5, 1] = np.nan
    for data, labels in ((X, y), (mappings(X, y), None)):
        with pytest.raises(ValueError, match="labels y contain NaN or infinity: the first in row 5"):
            cleanser_of(of_vectors()).fit(data, labels)


@pytest.mark.parametrize("wrong", [3, -1])
@pytest.mark.parametrize("row", [0, 9, 15])
def test_a_class_that_an_embedding_does_not_hold_is_refused_before_training(wrong, row, no_training):
    y = CLASSES.copy()
    y[row] = wrong
    seen = rf"labels of type torch.int64 from {min(wrong, 0)} to {max(wrong, 2)}: index out of range"
    with pytest.raises(NetworkError, match=rf"(?s)The generator fails on .* with {seen}.*integers from 0 to n - 1"):
        cleanser_of().fit(X, y)
    of_few = networks()[0], networks(lambda: nn.Embedding(2, 6))[1]
    with pytest.raises(
        NetworkError, match=r"The discriminator fails on .* with labels of type torch.int64 from 0 to 2"
    ):
        cleanser_of(of_few).fit(X, CLASSES)


class TwoClasses(Conditional):
    """Of two kinds of classes, each with an embedding of its own."""

    def __init__(self, n_in, n_out, activation):
        super().__init__(n_in, n_out, activation, nn.Embedding(3, 6))
        self.of_second = nn.Embedding(5, 6)

    def forward(self, x, label):
        return super().forward(x, label[:, 0]) + self.of_second(label[:, 1]).mean()


@pytest.mark.parametrize(("column", "wrong"), [(0, 3), (1, 5), (1, -1)])
def test_each_of_several_classes_is_checked(column, wrong, no_training):
    y = np.stack([CLASSES, np.arange(16) % 5], axis=1)
    y[11, column] = wrong
    pair = TwoClasses(3, 2, nn.Tanh()).double(), TwoClasses(2, 1, nn.Softplus()).double()
    with pytest.raises(NetworkError, match="index out of range"):
        cleanser_of(pair).fit(X, y)


def test_the_type_of_classes_does_not_make_them_other_labels(fitted):
    for y in (CLASSES.astype(np.int32), CLASSES.tolist(), torch.from_numpy(CLASSES).to(torch.uint8)):
        again = cleanser_of().fit(X, y, trajectory=fitted.trajectory_)
        assert np.array_equal(again.influence_, fitted.influence_)


def test_as_many_labels_as_instances_are_needed(fitted):
    for call in (cleanser_of().fit, fitted.score_samples, cleanser_of().estimate_cost):
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            call(X, CLASSES[:5])


def test_without_conditional_training_labels_are_ignored():
    plain = toy_cleanser().fit(X)
    for data, y in ((X, CLASSES), (tuples(X, CLASSES), None)):
        cleanser = toy_cleanser().fit(data, y)
        assert np.array_equal(cleanser.influence_, plain.influence_)
        assert cleanser.sample(3)[1] is None


class Marked(Conditional):
    """Writes the label into the second coordinate of its samples."""

    def forward(self, x, label):
        return super().forward(x, label) * torch.tensor([1.0, 1e-3]) + 10 * nn.functional.pad(label[:, None], (1, 0))


@pytest.mark.parametrize("container", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_samples_come_with_the_labels_that_they_were_made_for(container):
    torch.manual_seed(0)
    generator = Marked(3, 2, nn.Tanh(), nn.Embedding(3, 6)).double()
    cleanser = cleanser_of((generator, networks()[1]), n_epochs=1).fit(container(X), CLASSES)
    samples, labels = cleanser.sample(3000)
    assert type(samples) is type(labels) is type(container(X))
    assert labels.shape == (3000,) and np.array_equal(np.round(np.asarray(samples)[:, 1] / 10), labels)
    shares = np.bincount(np.asarray(labels), minlength=3) / 3000
    np.testing.assert_allclose(shares, np.bincount(CLASSES, minlength=3) / 16, atol=0.03)


def test_sampled_label_vectors_are_rows_of_the_data():
    labels = cleanser_of(of_vectors(), n_epochs=1).fit(X, VECTORS).sample(200)[1]
    assert {tuple(label) for label in labels} == {tuple(label) for label in VECTORS}


OUTSIDERS = np.array([[0.0, 0.0], [3.0, -2.0], [3.0, -2.0], [-1.0, 4.0]])
OF_OUTSIDERS = {"classes": np.array([2, 1, 0, 0]), "vectors": np.array([[0.0, 1.0], [1.0, 1.0], [-2.0, 0.5], [0, 0]])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"penalty": R1(), "n_critic": 2}, {"penalty": GradientPenalty()}])
def test_the_score_of_an_outsider_is_the_derivative_in_its_weight(kind, settings):
    (make, y), labels = KINDS[kind], OF_OUTSIDERS[kind]
    expected = None
    for derivative, tolerance in SCHEMES:
        cleanser = cleanser_of(make(), backend=ITD(derivative=derivative, delta=1e-4), **settings).fit(X, y)
        if expected is None:
            of_each = torch.from_numpy(OUTSIDERS), torch.from_numpy(labels)
            expected = -finite_difference_outsiders(cleanser, torch.from_numpy(X), *of_each)["FID"] / 9 * 3
        scores = cleanser.score_samples(OUTSIDERS, labels)
        np.testing.assert_allclose(scores, expected, rtol=tolerance)
        assert abs(scores[1] / scores[2] - 1) > 0.01, "the label makes no difference"


def test_where_every_step_draws_every_instance_scores_equal_harmfulness():
    cleanser = cleanser_of(batch_size=16).fit(X, CLASSES)
    np.testing.assert_allclose(cleanser.score_samples(X, CLASSES), cleanser.harmfulness_, rtol=1e-6)
    others = cleanser.score_samples(X, (CLASSES + 1) % 3)
    assert not np.isclose(others, cleanser.harmfulness_, rtol=1e-3).any()


@pytest.mark.parametrize("make", [tuples, mappings])
def test_a_dataset_loses_what_is_harmful_with_its_labels(make, fitted):
    data = make(X, CLASSES)
    kept = cleanser_of().fit(data).transform(data)
    assert isinstance(kept, Subset) and kept.dataset is data
    assert list(kept.indices) == fitted.sample_indices_.tolist()
    rng = np.random.default_rng(5)
    new, labels = rng.normal(size=(50, 2)), rng.integers(0, 3, size=50)
    expected = np.flatnonzero(fitted.score_samples(new, labels) <= fitted.threshold_)
    assert 0 < len(expected) < 50
    assert list(fitted.transform(make(new, labels)).indices) == expected.tolist()


def test_the_training_data_are_cleansed_without_their_labels_and_others_are_not(fitted):
    assert np.array_equal(fitted.transform(X), X[fitted.support_])
    with pytest.raises(ValueError, match="labels of new instances are needed"):
        fitted.transform(X + 1)


@pytest.mark.parametrize("make", [tuples, mappings])
def test_training_data_with_other_labels_are_other_data(make, fitted):
    others = (CLASSES + 1) % 3
    expected = np.flatnonzero(fitted.score_samples(X, others) <= fitted.threshold_)
    assert expected.tolist() != fitted.sample_indices_.tolist()
    for cleanser in (fitted, cleanser_of().fit(make(X, CLASSES))):
        assert list(cleanser.transform(make(X, CLASSES)).indices) == fitted.sample_indices_.tolist()
        assert list(cleanser.transform(make(X, others)).indices) == expected.tolist()


def test_without_conditional_training_other_labels_do_not_make_other_data():
    cleanser = toy_cleanser().fit(tuples(X, CLASSES))
    assert list(cleanser.transform(tuples(X, (CLASSES + 1) % 3)).indices) == cleanser.sample_indices_.tolist()


def test_resampling_drops_instances_and_labels_together(fitted):
    X_kept, y_kept = cleanser_of().fit_resample(X, CLASSES)
    assert np.array_equal(X_kept, X[fitted.support_]) and np.array_equal(y_kept, CLASSES[fitted.support_])


def test_a_classifier_is_fitted_to_what_a_conditional_cleanser_keeps(fitted):
    both = CleansedEstimator(cleanser_of(), LogisticRegression()).fit(X, CLASSES)
    expected = LogisticRegression().fit(X[fitted.support_], CLASSES[fitted.support_])
    assert np.array_equal(both.predict(X), expected.predict(X))


@pytest.mark.parametrize(("make", "y"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("vectorize", [True, False])
def test_retraining_gives_what_an_eager_run_without_the_instances_gives(make, y, vectorize):
    cleanser = cleanser_of(make()).fit(X, y)
    removals, expected = [[], [3], [0, 1, 15]], []
    for rows in removals:
        weights = torch.ones(16, dtype=torch.float64)
        weights[rows] = 0
        expected.append(metric_values(cleanser, torch.from_numpy(X), weights=weights)[0])
    assert expected[0] == pytest.approx(cleanser.metric_value_, rel=1e-10)
    np.testing.assert_allclose(counterfactual_retrain(cleanser, removals, vectorize=vectorize), expected, rtol=1e-8)


def test_influence_predicts_retraining_on_smooth_networks():
    cleanser = cleanser_of(optimizer=OPTIMIZERS["sgd"], n_epochs=4).fit(X, CLASSES)
    accuracy = estimation_accuracy(cleanser, n_instances=16)
    assert accuracy.kendall_tau > 0.9 and accuracy.pearson > 0.99


def test_a_trajectory_of_other_labels_is_refused(fitted):
    with pytest.raises(TrajectoryError, match="data"):
        cleanser_of().fit(X, (CLASSES + 1) % 3, trajectory=fitted.trajectory_)


def test_a_trajectory_on_disk_is_traced_again_with_the_labels(tmp_path, fitted):
    recorded = cleanser_of(store=tmp_path / "run").fit(X, CLASSES)
    again = cleanser_of().fit(tuples(X, CLASSES), trajectory=tmp_path / "run")
    assert np.array_equal(recorded.influence_, fitted.influence_)
    assert np.array_equal(again.influence_, fitted.influence_)
    labels = [one.trajectory_[4].of("G").draws["labels"] for one in (again, fitted)]
    assert torch.equal(*labels)


def test_the_cost_of_conditional_training_is_estimated():
    estimate = cleanser_of().estimate_cost(X, CLASSES)
    of_dataset = cleanser_of().estimate_cost(tuples(X, CLASSES))
    assert (estimate.n_steps, estimate.n_traced) == (of_dataset.n_steps, of_dataset.n_traced) == (9, 9)
    assert estimate.memory_bytes == of_dataset.memory_bytes > 0


def test_labels_may_be_a_view():
    y = CLASSES[::-1]
    assert np.array_equal(cleanser_of().fit(X, y).influence_, cleanser_of().fit(X, y.tolist()).influence_)


def test_the_discriminators_loss_judges_the_reference_with_labels_of_its_own():
    with pytest.raises(MetricError, match="label"):
        cleanser_of(metric=DiscriminatorLoss(n_samples=16)).fit(X, CLASSES)
