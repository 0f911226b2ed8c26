import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from ganclean import GANInfluence, GANTrainer, Trajectory
from ganclean.backends import ITD
from ganclean.cleansing.removal import best_count
from ganclean.exceptions import MetricError, MissingExtraError, NonFiniteError
from ganclean.metrics import FID, AverageLogLikelihood, FunctionMetric, SampleMean
from ganclean.optim import SGD, Adam
from ganclean.training.replay import Replay, retrained_states
from ganclean.training.smoothness import metasmoothness, random_direction
from tests.reference.finite_differences import metric_values
from tests.toy_gans import OPTIMIZERS, toy_cleaner, toy_data, toy_networks


def test_the_fitted_attributes_have_the_promised_shapes_and_types(cleaner):
    assert cleaner.influence_.shape == cleaner.harmfulness_.shape == cleaner.support_.shape == (16,)
    assert cleaner.influence_.dtype == cleaner.harmfulness_.dtype == np.float64
    assert cleaner.support_.dtype == bool
    assert cleaner.sample_indices_.dtype == np.int64 and cleaner.sample_indices_.shape == (12,)
    assert cleaner.sample_weight_.dtype == np.float64
    assert isinstance(cleaner.metric_value_, float) and isinstance(cleaner.threshold_, float)
    assert isinstance(cleaner.generator_, nn.Module) and not cleaner.generator_.training
    assert isinstance(cleaner.discriminator_, nn.Module) and not cleaner.discriminator_.training
    assert isinstance(cleaner.trajectory_, Trajectory) and len(cleaner.trajectory_) == 9
    assert isinstance(cleaner.backend_, ITD) and isinstance(cleaner.metric_, FID)
    assert cleaner.n_features_in_ == 2
    assert cleaner.metric_value_ > 0 and cleaner.influence_.any()


def test_the_metric_value_is_that_of_the_trained_generator(cleaner, X):
    metric = FID(n_samples=60).fit(X)
    latents = cleaner._evaluator(60).latents
    assert cleaner.metric_value_ == pytest.approx(metric(cleaner.generator_(latents)).item(), rel=1e-12)


@pytest.mark.parametrize(("greater_is_better", "sign"), [(True, 1), (False, -1)])
def test_harmfulness_is_the_influence_signed_as_an_improvement(greater_is_better, sign, X):
    metric = SampleMean(greater_is_better=greater_is_better, n_samples=50)
    cleaner = toy_cleaner(metric=metric, n_remove=3).fit(X)
    assert np.array_equal(cleaner.harmfulness_, sign * cleaner.influence_)
    assert set(np.flatnonzero(~cleaner.support_)) == set(np.argsort(-sign * cleaner.influence_)[:3])


def test_support_indices_weights_and_threshold_tell_the_same_rows(cleaner):
    harmful = np.argsort(-cleaner.harmfulness_)[:4]
    assert np.array_equal(np.flatnonzero(~cleaner.support_), np.sort(harmful))
    assert np.array_equal(cleaner.sample_indices_, np.flatnonzero(cleaner.support_))
    assert np.array_equal(cleaner.sample_weight_, cleaner.support_.astype(float))
    assert np.array_equal(cleaner.get_support(), cleaner.support_)
    assert np.array_equal(cleaner.get_support(indices=True), cleaner.sample_indices_)
    assert cleaner.harmfulness_[cleaner.support_].max() == cleaner.threshold_ < cleaner.harmfulness_[harmful].min()


@pytest.mark.parametrize(
    ("n_remove", "n_kept"), [(0, 16), (0.0, 16), (1, 15), (15, 1), (0.25, 12), (0.05, 15), (0.99, 1), (np.int64(3), 13)]
)
def test_a_fraction_or_a_count_is_removed(n_remove, n_kept, X):
    cleaner = toy_cleaner(n_remove=n_remove, n_epochs=1).fit(X)
    assert cleaner.support_.sum() == n_kept
    assert cleaner.transform(X).shape == (n_kept, 2)


@pytest.mark.parametrize("n_remove", [1.0, 1.5, -0.1, -1, 16, 17, True, None, "all", np.nan])
def test_an_impossible_number_of_removals_is_refused(n_remove, X):
    with pytest.raises(ValueError, match=r"n_remove must be a fraction in \[0, 1\) or a count below the 16 instances"):
        toy_cleaner(n_remove=n_remove).fit(X)


def test_the_automatic_number_of_removals_is_what_helps_most_on_validation_data(X):
    X_val = toy_data(40)[20:]
    cleaner = toy_cleaner(n_remove="auto").fit(X, X_val=X_val)
    tried = cleaner.removal_values_
    assert sorted(tried) == [0, 1, 2, 3, 5, 8]
    best = min(tried, key=tried.get)
    assert (~cleaner.support_).sum() == best
    # Each value is that of really retraining without the most harmful, on latents of their own.
    order = np.argsort(-cleaner.harmfulness_, kind="stable")
    states = retrained_states(cleaner.trajectory_, [order[:n] for n in tried], renormalize=True)
    evaluator = cleaner._evaluator(60, cleaner._evaluation_seed + 1)
    values = [evaluator.value(cleaner.metric_, state) for state in states]
    np.testing.assert_allclose(list(tried.values()), values, rtol=1e-9)
    assert tried[0] != pytest.approx(cleaner.metric_value_, rel=1e-6)


def test_the_automatic_number_is_of_the_greatest_value_where_greater_is_better():
    assert best_count({0: 1.0, 3: 5.0, 4: 5.0, 9: np.nan}, AverageLogLikelihood()) == 3
    assert best_count({0: 1.0, 3: 5.0, 4: 0.5, 9: np.nan}, FID()) == 4


def test_the_automatic_number_needs_validation_data(X):
    with pytest.raises(ValueError, match=r"n_remove='auto' chooses on validation data: call fit\(X, X_val=...\)"):
        toy_cleaner(n_remove="auto").fit(X)


def test_influence_is_averaged_over_independent_runs(X):
    cleaner = toy_cleaner().set_params(n_runs=3).fit(X)
    runs = [cleaner.backend_.influences_["FID"]]
    for seed in cleaner._seeds()["runs"]:
        runs.append(toy_cleaner().set_params(random_state=seed).fit(X).influence_)
    assert len({run.tobytes() for run in runs}) == 3
    np.testing.assert_allclose(cleaner.influence_, np.mean(runs, axis=0), rtol=1e-12)
    np.testing.assert_allclose(cleaner.influence_std_error_, np.std(runs, axis=0, ddof=1) / np.sqrt(3), rtol=1e-12)
    in_two_processes = toy_cleaner().set_params(n_runs=3, n_jobs=2).fit(X)
    np.testing.assert_allclose(in_two_processes.influence_, cleaner.influence_, rtol=1e-9)


def test_a_single_run_knows_no_standard_error(cleaner):
    assert cleaner.influence_std_error_.shape == (16,) and np.isnan(cleaner.influence_std_error_).all()


@pytest.mark.parametrize("n_runs", [0, -1, 1.5, True, None])
def test_an_impossible_number_of_runs_is_refused(n_runs, X):
    with pytest.raises(ValueError, match="n_runs must be a positive integer"):
        toy_cleaner().set_params(n_runs=n_runs).fit(X)
    with pytest.raises(ValueError, match="n_runs must be a positive integer"):
        toy_cleaner().set_params(n_runs=n_runs).estimate_cost(X)


def test_several_metrics_give_influences_by_name_and_one_decides(X):
    metrics = {"fid": FID(n_samples=60), "ll": AverageLogLikelihood(n_samples=60)}
    cleaner = toy_cleaner(metric=metrics, select="ll").fit(X)
    assert list(cleaner.influences_) == list(cleaner.metric_values_) == list(cleaner.metrics_) == ["fid", "ll"]
    assert cleaner.influence_ is cleaner.influences_["ll"]
    assert cleaner.metric_value_ == cleaner.metric_values_["ll"]
    assert isinstance(cleaner.metric_, AverageLogLikelihood) and cleaner.metric_name_ == "ll"
    assert np.array_equal(cleaner.harmfulness_, cleaner.influence_)
    assert toy_cleaner(metric=metrics).fit(X).metric_name_ == "fid"
    with pytest.raises(ValueError, match=r"select must name one of the metrics \['fid', 'll'\]; got 'kid'"):
        toy_cleaner(metric=metrics, select="kid").fit(X)


def test_metrics_of_different_sizes_evaluate_the_generator_as_each_does_alone(X):
    metrics = {"few": FID(n_samples=50), "many": FID(n_samples=77)}
    together = toy_cleaner(metric=metrics).fit(X)
    for name, metric in metrics.items():
        alone = toy_cleaner(metric=metric).fit(X)
        assert together.metric_values_[name] == pytest.approx(alone.metric_value_, rel=1e-9)
        np.testing.assert_allclose(together.influences_[name], alone.influence_, rtol=1e-6)


@pytest.mark.parametrize("name", ["fid", "kid", "log_likelihood"])
def test_a_metric_may_be_named(name, X):
    cleaner = toy_cleaner(metric=name).fit(X)
    assert cleaner.metric_name_ == name and np.isfinite(cleaner.influence_).all()


def test_an_unknown_metric_is_refused(X):
    for metric in ("accuracy", None, {}, FID):
        with pytest.raises(ValueError, match=r"metric must be one of .* a Metric object, or a dict of them; got"):
            toy_cleaner().set_params(metric=metric).fit(X)


def test_a_metric_that_does_not_depend_on_the_generator_is_refused(X):
    with pytest.raises(MetricError, match="does not depend on the generator"):
        toy_cleaner(metric=FunctionMetric(lambda samples: samples.new_ones(()))).fit(X)


def test_scores_agree_with_the_harmfulness_of_the_training_data_in_scale_and_order(X):
    cleaner = toy_cleaner(n_epochs=20).fit(X)
    scores = cleaner.score_samples(X)
    assert np.corrcoef(scores, cleaner.harmfulness_)[0, 1] > 0.9
    assert np.std(scores) == pytest.approx(np.std(cleaner.harmfulness_), rel=0.5)


def test_fit_resample_drops_the_rows_of_X_and_y(X):
    y = np.arange(16)
    cleaner = toy_cleaner()
    X_kept, y_kept = cleaner.fit_resample(X, y)
    assert np.array_equal(y_kept, cleaner.sample_indices_)
    assert np.array_equal(X_kept, X[y_kept])
    _, series = toy_cleaner().fit_resample(X, pd.Series(y, index=y + 50))
    assert series.index.tolist() == (y_kept + 50).tolist()
    _, labels = toy_cleaner().fit_resample(X, y.tolist())
    assert list(labels) == y_kept.tolist()
    _, nothing = toy_cleaner().fit_resample(X)
    assert nothing is None


def test_fit_resample_passes_the_reference_on(X):
    cleaner = toy_cleaner()
    cleaner.fit_resample(X, None, X_val=X[:5])
    assert cleaner.metric_.n_reference_ == 5


@pytest.mark.parametrize(
    "call",
    [
        lambda c, X: c.transform(X),
        lambda c, X: c.score_samples(X),
        lambda c, X: c.score(X),
        lambda c, X: c.sample(2),
        lambda c, X: c.get_support(),
    ],
    ids=["transform", "score_samples", "score", "sample", "get_support"],
)
def test_nothing_works_before_fit(call, X):
    with pytest.raises(NotFittedError, match="This GANInfluence instance is not fitted yet"):
        call(toy_cleaner(), X)


def test_transform_exists_once_fitted(cleaner):
    assert not hasattr(toy_cleaner(), "transform")
    assert hasattr(cleaner, "transform")


def test_a_cleaner_whose_fit_failed_is_not_fitted(X):
    cleaner = toy_cleaner(loss="least_squares", optimizer=SGD(lr=1e200))
    with pytest.raises(NonFiniteError):
        cleaner.fit(X)
    assert not hasattr(cleaner, "transform")
    with pytest.raises(NotFittedError):
        cleaner.get_support()


@pytest.mark.parametrize(("metric", "sign"), [(FID(n_samples=60), -1), (AverageLogLikelihood(n_samples=60), 1)])
def test_the_score_is_the_metric_against_other_data_signed_so_that_greater_is_better(metric, sign, X):
    cleaner = toy_cleaner(metric=metric).fit(X)
    test = toy_data(40)[16:]
    samples = cleaner.generator_(cleaner._evaluator(60).latents)
    expected = clone(metric).fit(test)(samples).item()
    assert cleaner.score(test) == pytest.approx(sign * expected, rel=1e-9)
    assert cleaner.score(X) == pytest.approx(sign * cleaner.metric_value_, rel=1e-9)
    assert cleaner.metric_.n_reference_ == 16


def test_the_reference_of_the_metric_is_X_val_or_X(X):
    cleaner = toy_cleaner().fit(X, X_val=X[:7] + 1)
    np.testing.assert_allclose(cleaner.metric_.mean_.numpy(), (X[:7] + 1).mean(axis=0))
    np.testing.assert_allclose(toy_cleaner().fit(X).metric_.mean_.numpy(), X.mean(axis=0))


def test_samples_come_as_from_a_gaussian_mixture(cleaner, X):
    samples, labels = cleaner.sample(5)
    assert isinstance(samples, np.ndarray) and samples.shape == (5, 2) and labels is None
    assert np.array_equal(cleaner.sample(5)[0], samples)
    assert cleaner.sample()[0].shape == (1, 2)
    of_tensor = toy_cleaner().fit(torch.from_numpy(X.copy()))
    assert torch.equal(of_tensor.sample(5)[0], torch.from_numpy(samples))


def test_samples_have_the_spread_of_latents_and_none_twice(cleaner):
    samples, _ = cleaner.sample(200)
    assert len(np.unique(samples, axis=0)) == 200


def test_the_generator_is_the_averaged_one_where_an_average_is_kept(X):
    cleaner = toy_cleaner(ema_decay=0.9).fit(X)
    final = cleaner.trajectory_.state(9)
    assert all(torch.equal(p, final.average[name]) for name, p in cleaner.generator_.named_parameters())
    assert not torch.equal(cleaner.generator_[0].weight, final.generator["0.weight"])
    samples = cleaner.generator_(cleaner._evaluator(60).latents)
    assert cleaner.metric_value_ == pytest.approx(cleaner.metric_(samples).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "n_steps", "n_traced"),
    [
        ({"n_epochs": 5}, 15, 15),
        ({"n_epochs": 5, "backend": ITD(last_epochs=2)}, 15, 6),
        ({"n_epochs": 4, "batch_size": 16}, 4, 4),
    ],
)
def test_the_cost_estimate_counts_the_steps_and_states_of_the_run(settings, n_steps, n_traced, X, tmp_path):
    estimate = toy_cleaner(**settings).estimate_cost(X)
    assert (estimate.n_steps, estimate.n_traced) == (n_steps, n_traced)
    assert estimate.seconds_training > 0 and estimate.seconds_tracing >= 0
    assert estimate.seconds == estimate.seconds_training + estimate.seconds_tracing
    assert estimate.memory_bytes > 0 and estimate.disk_bytes == 0
    assert f"{n_steps} training steps" in str(estimate)

    cleaner = toy_cleaner(store=tmp_path / "run", **settings)
    on_disk = cleaner.estimate_cost(X)
    assert on_disk.memory_bytes < estimate.memory_bytes
    assert not (tmp_path / "run").exists()
    cleaner.fit(X)
    assert len(cleaner.trajectory_) == n_steps
    written = 0
    for path in (tmp_path / "run").glob("*.safetensors"):
        content = path.read_bytes()
        written += len(content) - 8 - int.from_bytes(content[:8], "little")
    assert written <= on_disk.disk_bytes <= 1.2 * written


def test_fewer_checkpoints_cost_less_memory(X):
    every, some = (toy_cleaner(n_epochs=20, checkpoint_every=n).estimate_cost(X) for n in (1, 10))
    assert some.memory_bytes < every.memory_bytes / 2


def test_the_cost_estimate_does_not_fit(X):
    cleaner = toy_cleaner()
    cleaner.estimate_cost(X)
    assert not hasattr(cleaner, "influence_")


def test_progress_is_shown_on_request(capsys, X):
    toy_cleaner().set_params(verbose=True).fit(X)
    shown = capsys.readouterr().out
    assert "training" in shown and "tracing" in shown and "9/9" in shown
    toy_cleaner().fit(X)
    assert capsys.readouterr().out == ""


def test_progress_without_rich_names_the_extra_to_install(monkeypatch, X):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'rich'.*pip install 'ganclean\[cli\]'"):
        toy_cleaner().set_params(verbose=True).fit(X)


def test_a_trained_model_alone_is_not_enough_for_a_back_end_that_traces_a_run(X):
    with pytest.raises(ValueError, match="needs a back-end that works from the final model alone, such as 'aid'"):
        toy_cleaner().fit(X, trained=True)


def test_metasmoothness_tells_whether_training_is_linear_in_the_weights(X):
    smooth = toy_cleaner(optimizer=SGD(lr=0.01)).fit(X)
    assert 0.95 < smooth.smoothness_ <= 1
    # The same by hand: three eager trainings with the weights 1, 1 + hv and 1 + 2hv.
    direction = random_direction(16).numpy()
    ends = []
    for k in range(3):
        state = smooth.trajectory_.state(0)
        for t in range(len(smooth.trajectory_)):
            record = smooth.trajectory_[t]
            weights = torch.from_numpy(1 + 0.1 * k * direction)[record.indices]
            state = smooth.trajectory_.step(state, record, torch.from_numpy(X[record.indices]), weights)
        ends.append(np.concatenate([p.numpy().ravel() for p in state.generator.values()]))
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    expected = np.sum(np.abs(first) * np.sign(first * second)) / np.abs(first).sum()
    assert smooth.smoothness_ == pytest.approx(expected, abs=1e-9)


def test_metasmoothness_is_low_where_training_is_rough(X):
    rough = toy_cleaner(optimizer=SGD(lr=3.0), n_epochs=40, backend=ITD(last_epochs=1)).fit(X)
    assert metasmoothness(Replay.of(rough.trajectory_)) < 0.5


def test_metasmoothness_belongs_to_the_last_fit(X):
    cleaner = toy_cleaner().fit(X)
    before = cleaner.smoothness_
    assert cleaner.set_params(random_state=1).fit(X).smoothness_ != before
    with pytest.raises(NotFittedError):
        _ = toy_cleaner().smoothness_


def test_a_trainer_of_another_kind_is_refused(X):
    with pytest.raises(ValueError, match="trainer must be a GANTrainer or None; got 'fast'"):
        toy_cleaner().set_params(trainer="fast").fit(X)


def test_the_page_of_the_public_face_runs(X):
    generator, discriminator = (network.float() for network in toy_networks())
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
    cleaner = GANInfluence(
        generator,
        discriminator,
        trainer=GANTrainer(
            loss="non_saturating",
            optimizer=Adam(lr=2e-4, betas=(0.0, 0.99)),
            n_epochs=5,
            batch_size=8,
            update="alternating",
            latent_dim=3,
            ema_decay=0.999,
        ),
        metric=FID(feature_extractor=features),
        backend=ITD(last_epochs=1),
        n_remove=0.05,
        random_state=0,
    )
    assert cleaner.fit(X, X_val=X[:9]) is cleaner
    X_clean, y_clean = cleaner.fit_resample(X, np.arange(16))
    assert len(X_clean) == len(y_clean) == 15
    record = cleaner.trajectory_[3]
    assert record.indices.shape == (8,) and record.latents_d.shape == record.latents_g.shape == (8, 3)
    assert isinstance(record.seed, int)
    assert cleaner.trajectory_.steps_per_epoch == 2 and len(cleaner.trajectory_) == 10
    assert cleaner.trajectory_.state(10).discriminator["0.weight"].shape == (6, 2)
    assert not cleaner.trajectory_[0].latents_d.requires_grad


def test_the_defaults_are_those_of_the_public_face():
    assert ITD().get_params() == {
        "last_epochs": None,
        "derivative": "secant",
        "delta": 1e-2,
        "n_perturbations": 0,
        "perturbation": 0.05,
        "augmentation": None,
        "n_augmentations": 8,
        "max_growth": 1e6,
    }
    assert AverageLogLikelihood().bandwidth == 1.0 and AverageLogLikelihood().n_samples == 1000
    cleaner = GANInfluence()
    assert (cleaner.metric, cleaner.backend, cleaner.n_remove) == ("fid", "itd", 0.05)
    assert SGD().get_params() == {"lr": 1e-3, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_removing_the_most_harmful_improves_the_metric_as_predicted(optimizer, X):
    cleaner = toy_cleaner(optimizer=optimizer, n_remove=1).fit(X)
    after = metric_values(cleaner, torch.from_numpy(X.copy()), weights=torch.from_numpy(cleaner.sample_weight_))[0]
    predicted = cleaner.harmfulness_[~cleaner.support_].sum()
    assert predicted > 0
    assert cleaner.metric_value_ - after == pytest.approx(predicted, rel=0.3)
