import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, pearsonr
from sklearn.exceptions import NotFittedError
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import FID, SampleMean
from ganclean.optim import SGD
from ganclean.validation import counterfactual_retrain, estimation_accuracy
from ganclean.validation.accuracy import extremes_jaccard
from tests.reference.finite_differences import metric_values
from tests.toy_gans import OPTIMIZERS, toy_cleaner, toy_data, toy_networks

REMOVALS = [[], [3], [5, 9], [0, 1, 2, 15]]
SMOOTH = {"batch_size": 10, "n_epochs": 4, "optimizer": SGD(lr=0.03)}


def truth(cleaner, X, removals=REMOVALS, start=0):
    """The metric after eager retraining with the terms of each removal multiplied by zero."""
    values = []
    for rows in removals:
        weights = torch.ones(len(X), dtype=torch.float64)
        weights[rows] = 0
        values.append(metric_values(cleaner, torch.from_numpy(X.copy()), weights=weights, start=start)[0])
    return np.array(values)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
@pytest.mark.parametrize("settings", [{}, {"optimizer": OPTIMIZERS["adam"], "ema_decay": 0.8}])
def test_retraining_gives_what_an_eager_run_without_the_instances_gives(settings, update, X):
    cleaner = toy_cleaner(update=update, **settings).fit(X)
    values = counterfactual_retrain(cleaner, REMOVALS)
    assert values.shape == (4,) and values.dtype == np.float64
    np.testing.assert_allclose(values, truth(cleaner, X), rtol=1e-8)


@pytest.mark.parametrize("vectorize", [True, False, "auto"])
@pytest.mark.parametrize("last_epochs", [None, 2])
def test_an_empty_removal_reproduces_the_metric(vectorize, last_epochs, cleaner):
    (value,) = counterfactual_retrain(cleaner, [[]], last_epochs, vectorize=vectorize)
    assert value == pytest.approx(cleaner.metric_value_, rel=1e-10)


def test_an_empty_removal_reproduces_every_one_of_several_metrics(X):
    metrics = {"few": FID(n_samples=50), "many": FID(n_samples=77)}
    for select in metrics:
        cleaner = toy_cleaner(metric=metrics, select=select).fit(X)
        assert counterfactual_retrain(cleaner, [[]])[0] == pytest.approx(cleaner.metric_value_, rel=1e-10)


@pytest.mark.parametrize(("last_epochs", "start"), [(1, 6), (2, 3), (3, 0)])
def test_only_the_last_epochs_are_retrained(last_epochs, start, cleaner, X):
    values = counterfactual_retrain(cleaner, REMOVALS, last_epochs)
    np.testing.assert_allclose(values, truth(cleaner, X, start=start), rtol=1e-8)


@pytest.mark.parametrize("renormalize", [False, True])
def test_all_runs_at_once_equal_one_after_another(renormalize, cleaner):
    together, alone, in_chunks = (
        counterfactual_retrain(cleaner, REMOVALS, renormalize=renormalize, **settings)
        for settings in ({"vectorize": True}, {"vectorize": False}, {"vectorize": True, "chunk_size": 3})
    )
    np.testing.assert_allclose(together, alone, rtol=1e-10)
    np.testing.assert_allclose(in_chunks, alone, rtol=1e-10)


def with_dropout():
    generator, discriminator = toy_networks()
    return generator, discriminator.insert(1, nn.Dropout(0.3))


def test_all_runs_at_once_drop_the_same_units_as_one_after_another(X):
    cleaner = toy_cleaner(with_dropout()).fit(X)
    together, alone = (counterfactual_retrain(cleaner, REMOVALS, vectorize=v) for v in (True, False))
    assert alone[0] == pytest.approx(cleaner.metric_value_, rel=1e-10)
    np.testing.assert_allclose(together, alone, rtol=1e-10)


def test_renormalised_retraining_takes_the_mean_over_the_remaining_instances(X):
    settings = {"batch_size": 16, "n_epochs": 1, "optimizer": SGD(lr=0.1)}
    cleaner = toy_cleaner(**settings).fit(X)
    record, kept = cleaner.trajectory_[0], torch.ones(16, dtype=torch.bool)
    kept[[4, 7, 8]] = False

    generator, discriminator = toy_networks()
    data = torch.from_numpy(X.copy())
    real = nn.functional.softplus(-discriminator(data[kept])).mean()
    (real + nn.functional.softplus(discriminator(generator(record.latents_d).detach())).mean()).backward()
    with torch.no_grad():
        for p in discriminator.parameters():
            p -= 0.1 * p.grad
    deceive = nn.functional.softplus(-discriminator(generator(record.latents_g))).mean()
    with torch.no_grad():
        for p, gradient in zip(generator.parameters(), torch.autograd.grad(deceive, list(generator.parameters()))):
            p -= 0.1 * gradient
        expected = cleaner.metric_(generator(cleaner._evaluator(60).latents)).item()
    for vectorize in (True, False):
        (value,) = counterfactual_retrain(cleaner, [[4, 7, 8]], renormalize=True, vectorize=vectorize)
        assert value == pytest.approx(expected, rel=1e-10)
    assert counterfactual_retrain(cleaner, [[4, 7, 8]])[0] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_batch_may_lose_all_its_instances(vectorize, cleaner):
    values = counterfactual_retrain(cleaner, [range(16)], renormalize=True, vectorize=vectorize)
    assert np.isfinite(values).all()


def test_another_metric_may_judge_the_retrained_generator(cleaner, X):
    metric = SampleMean(n_samples=30).fit(X)
    values = counterfactual_retrain(cleaner, [[], [3]], metric=metric)
    samples = cleaner.generator_(cleaner._evaluator(30).latents)
    assert values[0] == pytest.approx(samples.mean().item(), rel=1e-9)
    assert values[1] != values[0]


def test_no_removals_give_no_values(cleaner):
    assert counterfactual_retrain(cleaner, []).shape == (0,)


@pytest.mark.parametrize("rows", [[16], [-17], [0.5], np.arange(16) == 3], ids=["16", "-17", "0.5", "mask"])
def test_rows_that_are_not_there_cannot_be_removed(rows, cleaner):
    with pytest.raises((IndexError, ValueError)):
        counterfactual_retrain(cleaner, [rows])


def test_convolutional_runs_are_retrained_one_after_another_and_agree_with_all_at_once():
    images = np.tanh(np.random.default_rng(0).normal(size=(12, 1, 4, 4)))
    trainer = GANTrainer(n_epochs=1, batch_size=6, latent_dim=3)
    cleaner = GANInfluence(trainer=trainer, metric=FID("pixels", n_samples=30), random_state=0).fit(images)
    auto, together = (counterfactual_retrain(cleaner, [[], [2]], vectorize=v) for v in ("auto", True))
    assert auto[0] == pytest.approx(cleaner.metric_value_, rel=1e-9)
    np.testing.assert_allclose(together, auto, rtol=1e-6)


def test_nothing_is_validated_before_fit():
    for call in (lambda c: counterfactual_retrain(c, [[]]), estimation_accuracy):
        with pytest.raises(NotFittedError):
            call(toy_cleaner())


@pytest.fixture(scope="module")
def smooth():
    return toy_cleaner(**SMOOTH).fit(toy_data(60))


@pytest.mark.parametrize("last_epochs", [None, 1, 2])
def test_influence_on_smooth_networks_ranks_removals_as_retraining_does(last_epochs, smooth):
    accuracy = estimation_accuracy(smooth, n_instances=60, last_epochs=last_epochs)
    assert accuracy.kendall_tau >= 0.99
    assert accuracy.pearson >= 0.999
    assert accuracy.jaccard == 1


def test_the_accuracy_is_that_of_single_removals_against_retraining(smooth):
    accuracy = estimation_accuracy(smooth, n_instances=10, random_state=3)
    rows = np.concatenate(accuracy.removals)
    assert len(set(rows.tolist())) == 10
    assert np.array_equal(accuracy.predicted, smooth.influence_[rows])
    values = truth(smooth, toy_data(60), [[], *([row] for row in rows)])
    np.testing.assert_allclose(accuracy.true, values[1:] - values[0], rtol=1e-5, atol=1e-10)
    assert accuracy.kendall_tau == pytest.approx(kendalltau(accuracy.predicted, accuracy.true).statistic)
    assert accuracy.pearson == pytest.approx(pearsonr(accuracy.predicted, accuracy.true).statistic)


def test_the_random_state_draws_the_removals(smooth):
    draws = [estimation_accuracy(smooth, 5, random_state=seed).removals for seed in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1]) and not np.array_equal(draws[0], draws[2])


def test_the_influence_of_a_group_is_the_sum_of_its_members(smooth):
    accuracy = estimation_accuracy(smooth, n_instances=12, group_size=4)
    assert all(len(set(rows.tolist())) == 4 for rows in accuracy.removals)
    expected = [smooth.influence_[rows].sum() for rows in accuracy.removals]
    np.testing.assert_allclose(accuracy.predicted, expected, rtol=1e-12)
    assert accuracy.kendall_tau > 0.8


def test_a_window_that_the_cleaner_did_not_trace_is_traced_anew(smooth):
    accuracy = estimation_accuracy(smooth, n_instances=8, last_epochs=1)
    last = toy_cleaner(backend=ITD(last_epochs=1), **SMOOTH).fit(toy_data(60))
    np.testing.assert_allclose(accuracy.predicted, last.influence_[np.concatenate(accuracy.removals)], rtol=1e-9)


def test_the_jaccard_index_compares_the_tenths_at_both_ends():
    a = np.arange(20.0)
    swapped_at_one_end = np.r_[[0, 5, 2, 3, 4, 1], a[6:]]
    assert extremes_jaccard(a, a) == 1
    assert extremes_jaccard(a, -a) == 0
    assert extremes_jaccard(a, swapped_at_one_end) == pytest.approx((1 / 3 + 1) / 2)
