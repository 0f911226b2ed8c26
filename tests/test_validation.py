import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.exceptions import NotFittedError
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import FID, SampleMean
from ganclean.optim import SGD
from ganclean.validation import (
    EstimationAccuracy,
    counterfactual_retrain,
    estimation_accuracy,
    linear_datamodeling_score,
    trust_report,
)
from ganclean.validation.accuracy import extremes_jaccard
from tests.reference.finite_differences import metric_values
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks

REMOVALS = [[], [3], [5, 9], [0, 1, 2, 15]]
SMOOTH = {"batch_size": 10, "n_epochs": 4, "optimizer": SGD(lr=0.03)}


def truth(cleanser, X, removals=REMOVALS, start=0):
    """The metric after eager retraining with the terms of each removal multiplied by zero."""
    values = []
    for rows in removals:
        weights = torch.ones(len(X), dtype=torch.float64)
        weights[rows] = 0
        values.append(metric_values(cleanser, torch.from_numpy(X.copy()), weights=weights, start=start)[0])
    return np.array(values)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
@pytest.mark.parametrize("settings", [{}, {"optimizer": OPTIMIZERS["adam"], "ema_decay": 0.8}])
def test_retraining_gives_what_an_eager_run_without_the_instances_gives(settings, update, X):
    cleanser = toy_cleanser(update=update, **settings).fit(X)
    values = counterfactual_retrain(cleanser, REMOVALS)
    assert values.shape == (4,) and values.dtype == np.float64
    np.testing.assert_allclose(values, truth(cleanser, X), rtol=1e-8)


@pytest.mark.parametrize("vectorize", [True, False, "auto"])
@pytest.mark.parametrize("last_epochs", [None, 2])
def test_an_empty_removal_reproduces_the_metric(vectorize, last_epochs, cleanser):
    (value,) = counterfactual_retrain(cleanser, [[]], last_epochs, vectorize=vectorize)
    assert value == pytest.approx(cleanser.metric_value_, rel=1e-10)


def test_an_empty_removal_reproduces_every_one_of_several_metrics(X):
    metrics = {"few": FID(n_samples=50), "many": FID(n_samples=77)}
    for select in metrics:
        cleanser = toy_cleanser(metric=metrics, select=select).fit(X)
        assert counterfactual_retrain(cleanser, [[]])[0] == pytest.approx(cleanser.metric_value_, rel=1e-10)


@pytest.mark.parametrize(("last_epochs", "start"), [(1, 6), (2, 3), (3, 0)])
def test_only_the_last_epochs_are_retrained(last_epochs, start, cleanser, X):
    values = counterfactual_retrain(cleanser, REMOVALS, last_epochs)
    np.testing.assert_allclose(values, truth(cleanser, X, start=start), rtol=1e-8)


@pytest.mark.parametrize("renormalize", [False, True])
def test_all_runs_at_once_equal_one_after_another(renormalize, cleanser):
    together, alone, in_chunks = (
        counterfactual_retrain(cleanser, REMOVALS, renormalize=renormalize, **settings)
        for settings in ({"vectorize": True}, {"vectorize": False}, {"vectorize": True, "chunk_size": 3})
    )
    np.testing.assert_allclose(together, alone, rtol=1e-10)
    np.testing.assert_allclose(in_chunks, alone, rtol=1e-10)


def with_dropout():
    generator, discriminator = toy_networks()
    return generator, discriminator.insert(1, nn.Dropout(0.3))


def test_all_runs_at_once_drop_the_same_units_as_one_after_another(X):
    cleanser = toy_cleanser(with_dropout()).fit(X)
    together, alone = (counterfactual_retrain(cleanser, REMOVALS, vectorize=v) for v in (True, False))
    assert alone[0] == pytest.approx(cleanser.metric_value_, rel=1e-10)
    np.testing.assert_allclose(together, alone, rtol=1e-10)


def test_renormalised_retraining_takes_the_mean_over_the_remaining_instances(X):
    settings = {"batch_size": 16, "n_epochs": 1, "optimizer": SGD(lr=0.1)}
    cleanser = toy_cleanser(**settings).fit(X)
    record, kept = cleanser.trajectory_[0], torch.ones(16, dtype=torch.bool)
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
        expected = cleanser.metric_(generator(cleanser.evaluator(60).latents)).item()
    for vectorize in (True, False):
        (value,) = counterfactual_retrain(cleanser, [[4, 7, 8]], renormalize=True, vectorize=vectorize)
        assert value == pytest.approx(expected, rel=1e-10)
    assert counterfactual_retrain(cleanser, [[4, 7, 8]])[0] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_batch_may_lose_all_its_instances(vectorize, cleanser):
    values = counterfactual_retrain(cleanser, [range(16)], renormalize=True, vectorize=vectorize)
    assert np.isfinite(values).all()


def test_another_metric_may_judge_the_retrained_generator(cleanser, X):
    metric = SampleMean(n_samples=30).fit(X)
    values = counterfactual_retrain(cleanser, [[], [3]], metric=metric)
    samples = cleanser.generator_(cleanser.evaluator(30).latents)
    assert values[0] == pytest.approx(samples.mean().item(), rel=1e-9)
    assert values[1] != values[0]


def test_no_removals_give_no_values(cleanser):
    assert counterfactual_retrain(cleanser, []).shape == (0,)


@pytest.mark.parametrize("rows", [[16], [-17], [0.5], np.arange(16) == 3], ids=["16", "-17", "0.5", "mask"])
def test_rows_that_are_not_there_cannot_be_removed(rows, cleanser):
    with pytest.raises((IndexError, ValueError)):
        counterfactual_retrain(cleanser, [rows])


def test_convolutional_runs_are_retrained_one_after_another_and_agree_with_all_at_once():
    images = np.tanh(np.random.default_rng(0).normal(size=(12, 1, 4, 4)))
    trainer = GANTrainer(n_epochs=1, batch_size=6, latent_dim=3)
    cleanser = GANInfluence(trainer=trainer, metric=FID("pixels", n_samples=30), random_state=0).fit(images)
    auto, together = (counterfactual_retrain(cleanser, [[], [2]], vectorize=v) for v in ("auto", True))
    assert auto[0] == pytest.approx(cleanser.metric_value_, rel=1e-9)
    np.testing.assert_allclose(together, auto, rtol=1e-6)


def test_nothing_is_validated_before_fit():
    for call in (lambda c: counterfactual_retrain(c, [[]]), estimation_accuracy):
        with pytest.raises(NotFittedError):
            call(toy_cleanser())


@pytest.fixture(scope="module")
def smooth():
    return toy_cleanser(**SMOOTH).fit(toy_data(60))


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


def test_a_window_that_the_cleanser_did_not_trace_is_traced_anew(smooth):
    accuracy = estimation_accuracy(smooth, n_instances=8, last_epochs=1)
    last = toy_cleanser(backend=ITD(last_epochs=1), **SMOOTH).fit(toy_data(60))
    np.testing.assert_allclose(accuracy.predicted, last.influence_[np.concatenate(accuracy.removals)], rtol=1e-9)


def test_the_jaccard_index_compares_the_tenths_at_both_ends():
    a = np.arange(20.0)
    swapped_at_one_end = np.r_[[0, 5, 2, 3, 4, 1], a[6:]]
    assert extremes_jaccard(a, a) == 1
    assert extremes_jaccard(a, -a) == 0
    assert extremes_jaccard(a, swapped_at_one_end) == pytest.approx((1 / 3 + 1) / 2)


def test_several_metrics_judge_the_same_retrained_generators(cleanser, X):
    metrics = {"fid": cleanser.metric_, "mean": SampleMean(n_samples=30).fit(X)}
    both = counterfactual_retrain(cleanser, REMOVALS, metric=metrics)
    assert list(both) == ["fid", "mean"]
    np.testing.assert_allclose(both["fid"], counterfactual_retrain(cleanser, REMOVALS), rtol=1e-12)
    np.testing.assert_allclose(
        both["mean"], counterfactual_retrain(cleanser, REMOVALS, metric=metrics["mean"]), rtol=1e-12
    )
    with pytest.raises(ValueError, match="empty dict"):
        counterfactual_retrain(cleanser, REMOVALS, metric={})


@pytest.mark.parametrize("first_step", [0, 4, 8, 9])
def test_retraining_starts_from_any_recorded_step(first_step, cleanser, X):
    values = counterfactual_retrain(cleanser, REMOVALS, first_step=first_step)
    np.testing.assert_allclose(values, truth(cleanser, X, start=first_step), rtol=1e-8)


@pytest.mark.parametrize("settings", [{"first_step": 10}, {"first_step": -1}, {"first_step": 3, "last_epochs": 1}])
def test_an_impossible_start_is_refused(settings, cleanser):
    with pytest.raises(ValueError, match="first"):
        counterfactual_retrain(cleanser, REMOVALS, **settings)


@pytest.mark.parametrize("vectorize", [True, False])
def test_processes_share_the_runs(vectorize, cleanser):
    alone, shared = (
        counterfactual_retrain(cleanser, REMOVALS * 2, vectorize=vectorize, n_jobs=n_jobs) for n_jobs in (1, 2)
    )
    np.testing.assert_allclose(shared, alone, rtol=1e-9)


def networks_by_shape():
    def generator(shape):
        return toy_networks(int(torch.randint(10**6, ())))[0]

    def discriminator(shape):
        return toy_networks(int(torch.randint(10**6, ())))[1]

    return generator, discriminator


def test_fresh_seeds_train_anew_on_data_without_the_instances(X):
    cleanser = toy_cleanser(networks_by_shape()).fit(X)
    values = counterfactual_retrain(cleanser, [[], [3], [0, 1, 2, 15]], seeds=[5, 6])
    assert values.shape == (2, 3) and len(set(values.ravel().tolist())) == 6
    # The same by the estimator itself, on the remaining rows.
    for seed, row in ((5, values[0]), (6, values[1])):
        rng = np.random.RandomState(seed)
        initial, training = rng.randint(2**31), rng.randint(2**31)
        kept = np.setdiff1d(np.arange(16), [0, 1, 2, 15])
        trainer, step, source = cleanser.prepare(X[kept], None, initial)
        # 3 epochs of 3 steps on all rows are as many steps as 4.5 epochs of 2 steps on 12 of them.
        trainer.set_params(n_epochs=4)
        trajectory = trainer.train(step, source, trainer.describe(step, 12, ""), random_state=training)
        latents = cleanser.evaluator(60).latents
        with torch.no_grad():
            samples = step.sample(trajectory.state(8).params, {"G": {}, "D": {}}, latents)
            assert row[2] == pytest.approx(cleanser.metric_(samples).item(), rel=1e-9)


def test_fresh_seeds_are_shared_by_processes_and_repeat(X):
    cleanser = toy_cleanser(networks_by_shape(), n_epochs=1).fit(X)
    alone, again, shared = (
        counterfactual_retrain(cleanser, [[], [3, 4]], seeds=[1, 2], n_jobs=n_jobs) for n_jobs in (1, 1, 2)
    )
    assert np.array_equal(alone, again)
    np.testing.assert_allclose(shared, alone, rtol=1e-9)


def test_fresh_seeds_start_from_the_beginning_and_need_data(cleanser):
    with pytest.raises(ValueError, match="seeds train anew"):
        counterfactual_retrain(cleanser, [[]], 1, seeds=[0])
    with pytest.raises(ValueError, match="leaves 1 instances"):
        counterfactual_retrain(cleanser, [range(15)], seeds=[0])


def noisy_agreement(n, rho=0.8, seed=0):
    a, b = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=n).T
    return EstimationAccuracy(a, b, [], kendalltau(a, b).statistic, pearsonr(a, b).statistic, extremes_jaccard(a, b))


def test_the_bootstrap_interval_holds_the_statistic_and_narrows_with_more_removals():
    few, many = noisy_agreement(30), noisy_agreement(300)
    for statistic in ("kendall_tau", "pearson", "jaccard"):
        intervals = [agreement.interval(statistic) for agreement in (few, many)]
        assert all(low <= getattr(one, statistic) <= high for one, (low, high) in zip((few, many), intervals))
        assert np.ptp(intervals[1]) < np.ptp(intervals[0])
    assert few.interval() == few.interval("kendall_tau") == few.interval()
    assert few.interval(random_state=1) != few.interval(random_state=2)
    assert np.ptp(few.interval(level=0.5)) < np.ptp(few.interval())
    with pytest.raises(ValueError, match="statistic must be one of"):
        few.interval("r2")


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    # Of correlated normal pairs, Kendall's τ is known: 2 / π · arcsin(ρ).
    rho, covered = 0.6, 0
    for trial in range(100):
        low, high = noisy_agreement(60, rho, trial).interval(n_resamples=200, random_state=trial)
        covered += low <= 2 / np.pi * np.arcsin(rho) <= high
    assert covered >= 88


def test_the_linear_datamodelling_score_ranks_random_halves(smooth):
    score = linear_datamodeling_score(smooth, n_subsets=20, random_state=2)
    assert all(len(rows) == 30 and len(set(rows.tolist())) == 30 for rows in score.removals)
    predicted = [smooth.influence_[rows].sum() for rows in score.removals]
    values = counterfactual_retrain(smooth, [[], *score.removals])
    np.testing.assert_allclose(score.predicted, predicted)
    np.testing.assert_allclose(score.true, values[1:] - values[0], rtol=1e-9)
    assert score.spearman == pytest.approx(spearmanr(predicted, score.true).statistic)
    assert score.spearman > 0.9
    low, high = score.interval()
    assert score.interval("spearman") == (low, high) and low <= score.spearman <= high
    shuffled = np.random.default_rng(0).permutation(smooth.influence_)
    assert linear_datamodeling_score(smooth, 20, influence=shuffled, random_state=2).spearman < 0.6


def test_the_score_under_fresh_seeds_is_of_the_mean_over_them(X):
    cleanser = toy_cleanser(networks_by_shape(), n_epochs=1).fit(X)
    score = linear_datamodeling_score(cleanser, n_subsets=6, fraction=0.75, seeds=[1, 2])
    values = counterfactual_retrain(cleanser, [[], *score.removals], seeds=[1, 2])
    assert score.true_by_seed.shape == (2, 6) and all(len(rows) == 4 for rows in score.removals)
    np.testing.assert_allclose(score.true_by_seed, values[:, 1:] - values[:, :1], rtol=1e-9)
    np.testing.assert_allclose(score.true, score.true_by_seed.mean(axis=0))


@pytest.mark.parametrize("settings", [{"fraction": 0}, {"fraction": 1.0}, {"influence": np.zeros(3)}])
def test_impossible_subsets_and_scores_are_refused(settings, smooth):
    with pytest.raises(ValueError, match=r"fraction must lie|influence must have one value"):
        linear_datamodeling_score(smooth, **settings)


def test_the_trust_report_compares_random_reweightings_with_real_ones(smooth):
    report = trust_report(smooth, n_probes=6, step=0.02, random_state=4)
    assert report.smoothness == smooth.smoothness_ > 0.9
    rng = np.random.RandomState(4)
    X = torch.from_numpy(toy_data(60).copy())
    base = metric_values(smooth, X, weights=torch.ones(60, dtype=torch.float64))[0]
    for predicted, true in zip(report.predicted, report.true):
        direction = 2.0 * rng.randint(2, size=60) - 1
        weights = torch.from_numpy(1 + 0.02 * direction)
        assert predicted == pytest.approx(-0.02 * direction @ smooth.influence_)
        assert true == pytest.approx(metric_values(smooth, X, weights=weights)[0] - base, rel=1e-6)
    assert report.pearson > 0.99 and report.relative_error < 0.1
    assert report.pearson == pytest.approx(pearsonr(report.predicted, report.true).statistic)
    assert "almost linearly" in report.words()[0] and "predicts this run well" in report.words()[1]
    with pytest.raises(ValueError, match="At least 2 probes"):
        trust_report(smooth, n_probes=1)
