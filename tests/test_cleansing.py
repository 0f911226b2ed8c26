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
from ganclean.runs.replay import Replay, retrained_states
from ganclean.runs.smoothness import metasmoothness, random_direction
from tests.reference.finite_differences import metric_values
from tests.toy_gans import OPTIMIZERS, toy_cleanser, toy_data, toy_networks


def test_the_fitted_attributes_have_the_promised_shapes_and_types(cleanser):
    assert cleanser.influence_.shape == cleanser.harmfulness_.shape == cleanser.support_.shape == (16,)
    assert cleanser.influence_.dtype == cleanser.harmfulness_.dtype == np.float64
    assert cleanser.support_.dtype == bool
    assert cleanser.sample_indices_.dtype == np.int64 and cleanser.sample_indices_.shape == (12,)
    assert cleanser.sample_weight_.dtype == np.float64
    assert isinstance(cleanser.metric_value_, float) and isinstance(cleanser.threshold_, float)
    assert isinstance(cleanser.generator_, nn.Module) and not cleanser.generator_.training
    assert isinstance(cleanser.discriminator_, nn.Module) and not cleanser.discriminator_.training
    assert isinstance(cleanser.trajectory_, Trajectory) and len(cleanser.trajectory_) == 9
    assert isinstance(cleanser.backend_, ITD) and isinstance(cleanser.metric_, FID)
    assert cleanser.n_features_in_ == 2
    assert cleanser.metric_value_ > 0 and cleanser.influence_.any()


def test_the_metric_value_is_that_of_the_trained_generator(cleanser, X):
    metric = FID(n_samples=60).fit(X)
    latents = cleanser.evaluator(60).latents
    assert cleanser.metric_value_ == pytest.approx(metric(cleanser.generator_(latents)).item(), rel=1e-12)


@pytest.mark.parametrize(("greater_is_better", "sign"), [(True, 1), (False, -1)])
def test_harmfulness_is_the_influence_signed_as_an_improvement(greater_is_better, sign, X):
    metric = SampleMean(greater_is_better=greater_is_better, n_samples=50)
    cleanser = toy_cleanser(metric=metric, n_remove=3).fit(X)
    assert np.array_equal(cleanser.harmfulness_, sign * cleanser.influence_)
    assert set(np.flatnonzero(~cleanser.support_)) == set(np.argsort(-sign * cleanser.influence_)[:3])


def test_support_indices_weights_and_threshold_tell_the_same_rows(cleanser):
    harmful = np.argsort(-cleanser.harmfulness_)[:4]
    assert np.array_equal(np.flatnonzero(~cleanser.support_), np.sort(harmful))
    assert np.array_equal(cleanser.sample_indices_, np.flatnonzero(cleanser.support_))
    assert np.array_equal(cleanser.sample_weight_, cleanser.support_.astype(float))
    assert np.array_equal(cleanser.get_support(), cleanser.support_)
    assert np.array_equal(cleanser.get_support(indices=True), cleanser.sample_indices_)
    assert cleanser.harmfulness_[cleanser.support_].max() == cleanser.threshold_ < cleanser.harmfulness_[harmful].min()


@pytest.mark.parametrize(
    ("n_remove", "n_kept"), [(0, 16), (0.0, 16), (1, 15), (15, 1), (0.25, 12), (0.05, 15), (0.99, 1), (np.int64(3), 13)]
)
def test_a_fraction_or_a_count_is_removed(n_remove, n_kept, X):
    cleanser = toy_cleanser(n_remove=n_remove, n_epochs=1).fit(X)
    assert cleanser.support_.sum() == n_kept
    assert cleanser.transform(X).shape == (n_kept, 2)


@pytest.mark.parametrize("n_remove", [1.0, 1.5, -0.1, -1, 16, 17, True, None, "all", np.nan])
def test_an_impossible_number_of_removals_is_refused(n_remove, X):
    with pytest.raises(ValueError, match=r"n_remove must be a fraction in \[0, 1\) or a count below the 16 instances"):
        toy_cleanser(n_remove=n_remove).fit(X)


def test_the_automatic_number_of_removals_is_what_helps_most_on_validation_data(X):
    X_val = toy_data(40)[20:]
    cleanser = toy_cleanser(n_remove="auto").fit(X, X_val=X_val)
    tried = cleanser.removal_values_
    assert sorted(tried) == [0, 1, 2, 3, 5, 8]
    best = min(tried, key=tried.get)
    assert (~cleanser.support_).sum() == best
    # Each value is that of really retraining without the most harmful, on latents of their own.
    order = np.argsort(-cleanser.harmfulness_, kind="stable")
    states = retrained_states(cleanser.trajectory_, [order[:n] for n in tried], renormalize=True)
    evaluator = cleanser.evaluator(60, cleanser._evaluation_seed + 1)
    values = [evaluator.value(cleanser.metric_, state) for state in states]
    np.testing.assert_allclose(list(tried.values()), values, rtol=1e-9)
    assert tried[0] != pytest.approx(cleanser.metric_value_, rel=1e-6)


def test_the_automatic_number_is_of_the_greatest_value_where_greater_is_better():
    assert best_count({0: 1.0, 3: 5.0, 4: 5.0, 9: np.nan}, AverageLogLikelihood()) == 3
    assert best_count({0: 1.0, 3: 5.0, 4: 0.5, 9: np.nan}, FID()) == 4


def test_the_automatic_number_needs_validation_data(X):
    with pytest.raises(ValueError, match=r"n_remove='auto' chooses on validation data: call fit\(X, X_val=...\)"):
        toy_cleanser(n_remove="auto").fit(X)


def test_influence_is_averaged_over_independent_runs(X):
    cleanser = toy_cleanser().set_params(n_runs=3).fit(X)
    runs = [cleanser.backend_.influences_["FID"]]
    for seed in cleanser._seeds()["runs"]:
        runs.append(toy_cleanser().set_params(random_state=seed).fit(X).influence_)
    assert len({run.tobytes() for run in runs}) == 3
    np.testing.assert_allclose(cleanser.influence_, np.mean(runs, axis=0), rtol=1e-12)
    np.testing.assert_allclose(cleanser.influence_std_error_, np.std(runs, axis=0, ddof=1) / np.sqrt(3), rtol=1e-12)
    in_two_processes = toy_cleanser().set_params(n_runs=3, n_jobs=2).fit(X)
    np.testing.assert_allclose(in_two_processes.influence_, cleanser.influence_, rtol=1e-9)


def test_a_single_run_knows_no_standard_error(cleanser):
    assert cleanser.influence_std_error_.shape == (16,) and np.isnan(cleanser.influence_std_error_).all()


@pytest.mark.parametrize("n_runs", [0, -1, 1.5, True, None])
def test_an_impossible_number_of_runs_is_refused(n_runs, X):
    with pytest.raises(ValueError, match="n_runs must be a positive integer"):
        toy_cleanser().set_params(n_runs=n_runs).fit(X)
    with pytest.raises(ValueError, match="n_runs must be a positive integer"):
        toy_cleanser().set_params(n_runs=n_runs).estimate_cost(X)


def test_several_metrics_give_influences_by_name_and_one_decides(X):
    metrics = {"fid": FID(n_samples=60), "ll": AverageLogLikelihood(n_samples=60)}
    cleanser = toy_cleanser(metric=metrics, select="ll").fit(X)
    assert list(cleanser.influences_) == list(cleanser.metric_values_) == list(cleanser.metrics_) == ["fid", "ll"]
    assert cleanser.influence_ is cleanser.influences_["ll"]
    assert cleanser.metric_value_ == cleanser.metric_values_["ll"]
    assert isinstance(cleanser.metric_, AverageLogLikelihood) and cleanser.metric_name_ == "ll"
    assert np.array_equal(cleanser.harmfulness_, cleanser.influence_)
    assert toy_cleanser(metric=metrics).fit(X).metric_name_ == "fid"
    with pytest.raises(ValueError, match=r"select must name one of the metrics \['fid', 'll'\]; got 'kid'"):
        toy_cleanser(metric=metrics, select="kid").fit(X)


def test_metrics_of_different_sizes_evaluate_the_generator_as_each_does_alone(X):
    metrics = {"few": FID(n_samples=50), "many": FID(n_samples=77)}
    together = toy_cleanser(metric=metrics).fit(X)
    for name, metric in metrics.items():
        alone = toy_cleanser(metric=metric).fit(X)
        assert together.metric_values_[name] == pytest.approx(alone.metric_value_, rel=1e-9)
        np.testing.assert_allclose(together.influences_[name], alone.influence_, rtol=1e-6)


@pytest.mark.parametrize("name", ["fid", "kid", "log_likelihood"])
def test_a_metric_may_be_named(name, X):
    cleanser = toy_cleanser(metric=name).fit(X)
    assert cleanser.metric_name_ == name and np.isfinite(cleanser.influence_).all()


def test_an_unknown_metric_is_refused(X):
    for metric in ("accuracy", None, {}, FID):
        with pytest.raises(ValueError, match=r"metric must be one of .* a Metric object, or a dict of them; got"):
            toy_cleanser().set_params(metric=metric).fit(X)


def test_a_metric_that_does_not_depend_on_the_generator_is_refused(X):
    with pytest.raises(MetricError, match="does not depend on the generator"):
        toy_cleanser(metric=FunctionMetric(lambda samples: samples.new_ones(()))).fit(X)


def test_scores_agree_with_the_harmfulness_of_the_training_data_in_scale_and_order(X):
    cleanser = toy_cleanser(n_epochs=20).fit(X)
    scores = cleanser.score_samples(X)
    assert np.corrcoef(scores, cleanser.harmfulness_)[0, 1] > 0.9
    assert np.std(scores) == pytest.approx(np.std(cleanser.harmfulness_), rel=0.5)


def test_fit_resample_drops_the_rows_of_X_and_y(X):
    y = np.arange(16)
    cleanser = toy_cleanser()
    X_kept, y_kept = cleanser.fit_resample(X, y)
    assert np.array_equal(y_kept, cleanser.sample_indices_)
    assert np.array_equal(X_kept, X[y_kept])
    _, series = toy_cleanser().fit_resample(X, pd.Series(y, index=y + 50))
    assert series.index.tolist() == (y_kept + 50).tolist()
    _, labels = toy_cleanser().fit_resample(X, y.tolist())
    assert list(labels) == y_kept.tolist()
    _, nothing = toy_cleanser().fit_resample(X)
    assert nothing is None


def test_fit_resample_passes_the_reference_on(X):
    cleanser = toy_cleanser()
    cleanser.fit_resample(X, None, X_val=X[:5])
    assert cleanser.metric_.n_reference_ == 5


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
        call(toy_cleanser(), X)


def test_transform_exists_once_fitted(cleanser):
    assert not hasattr(toy_cleanser(), "transform")
    assert hasattr(cleanser, "transform")


def test_a_cleanser_whose_fit_failed_is_not_fitted(X):
    cleanser = toy_cleanser(loss="least_squares", optimizer=SGD(lr=1e200))
    with pytest.raises(NonFiniteError):
        cleanser.fit(X)
    assert not hasattr(cleanser, "transform")
    with pytest.raises(NotFittedError):
        cleanser.get_support()


@pytest.mark.parametrize(("metric", "sign"), [(FID(n_samples=60), -1), (AverageLogLikelihood(n_samples=60), 1)])
def test_the_score_is_the_metric_against_other_data_signed_so_that_greater_is_better(metric, sign, X):
    cleanser = toy_cleanser(metric=metric).fit(X)
    test = toy_data(40)[16:]
    samples = cleanser.generator_(cleanser.evaluator(60).latents)
    expected = clone(metric).fit(test)(samples).item()
    assert cleanser.score(test) == pytest.approx(sign * expected, rel=1e-9)
    assert cleanser.score(X) == pytest.approx(sign * cleanser.metric_value_, rel=1e-9)
    assert cleanser.metric_.n_reference_ == 16


def test_the_reference_of_the_metric_is_X_val_or_X(X):
    cleanser = toy_cleanser().fit(X, X_val=X[:7] + 1)
    np.testing.assert_allclose(cleanser.metric_.mean_.numpy(), (X[:7] + 1).mean(axis=0))
    np.testing.assert_allclose(toy_cleanser().fit(X).metric_.mean_.numpy(), X.mean(axis=0))


def test_samples_come_as_from_a_gaussian_mixture(cleanser, X):
    samples, labels = cleanser.sample(5)
    assert isinstance(samples, np.ndarray) and samples.shape == (5, 2) and labels is None
    assert np.array_equal(cleanser.sample(5)[0], samples)
    assert cleanser.sample()[0].shape == (1, 2)
    of_tensor = toy_cleanser().fit(torch.from_numpy(X.copy()))
    assert torch.equal(of_tensor.sample(5)[0], torch.from_numpy(samples))


def test_samples_have_the_spread_of_latents_and_none_twice(cleanser):
    samples, _ = cleanser.sample(200)
    assert len(np.unique(samples, axis=0)) == 200


def test_the_generator_is_the_averaged_one_where_an_average_is_kept(X):
    cleanser = toy_cleanser(ema_decay=0.9).fit(X)
    final = cleanser.trajectory_.state(9)
    assert all(torch.equal(p, final.average[name]) for name, p in cleanser.generator_.named_parameters())
    assert not torch.equal(cleanser.generator_[0].weight, final.generator["0.weight"])
    samples = cleanser.generator_(cleanser.evaluator(60).latents)
    assert cleanser.metric_value_ == pytest.approx(cleanser.metric_(samples).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "n_steps", "n_traced"),
    [
        ({"n_epochs": 5}, 15, 15),
        ({"n_epochs": 5, "backend": ITD(last_epochs=2)}, 15, 6),
        ({"n_epochs": 4, "batch_size": 16}, 4, 4),
    ],
)
def test_the_cost_estimate_counts_the_steps_and_states_of_the_run(settings, n_steps, n_traced, X, tmp_path):
    estimate = toy_cleanser(**settings).estimate_cost(X)
    assert (estimate.n_steps, estimate.n_traced) == (n_steps, n_traced)
    assert estimate.seconds_training > 0 and estimate.seconds_tracing >= 0
    assert estimate.seconds == estimate.seconds_training + estimate.seconds_tracing
    assert estimate.memory_bytes > 0 and estimate.disk_bytes == 0
    assert f"{n_steps} training steps" in str(estimate)

    cleanser = toy_cleanser(store=tmp_path / "run", **settings)
    on_disk = cleanser.estimate_cost(X)
    assert on_disk.memory_bytes < estimate.memory_bytes
    assert not (tmp_path / "run").exists()
    cleanser.fit(X)
    assert len(cleanser.trajectory_) == n_steps
    written = 0
    for path in (tmp_path / "run").glob("*.safetensors"):
        content = path.read_bytes()
        written += len(content) - 8 - int.from_bytes(content[:8], "little")
    assert written <= on_disk.disk_bytes <= 1.2 * written


def test_fewer_checkpoints_cost_less_memory(X):
    every, some = (toy_cleanser(n_epochs=20, checkpoint_every=n).estimate_cost(X) for n in (1, 10))
    assert some.memory_bytes < every.memory_bytes / 2


def test_the_cost_estimate_does_not_fit(X):
    cleanser = toy_cleanser()
    cleanser.estimate_cost(X)
    assert not hasattr(cleanser, "influence_")


def test_progress_is_shown_on_request(capsys, X):
    toy_cleanser().set_params(verbose=True).fit(X)
    shown = capsys.readouterr().out
    assert "training" in shown and "tracing" in shown and "9/9" in shown
    toy_cleanser().fit(X)
    assert capsys.readouterr().out == ""


def test_progress_without_rich_names_the_extra_to_install(monkeypatch, X):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'rich'.*pip install 'ganclean\[cli\]'"):
        toy_cleanser().set_params(verbose=True).fit(X)


def test_a_trained_model_alone_is_not_enough_for_a_back_end_that_traces_a_run(X):
    with pytest.raises(ValueError, match="needs a back-end that works from the final model alone, such as 'aid'"):
        toy_cleanser().fit(X, trained=True)


def test_metasmoothness_tells_whether_training_is_linear_in_the_weights(X):
    smooth = toy_cleanser(optimizer=SGD(lr=0.01)).fit(X)
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
    settings = {"optimizer": Adam(lr=0.1, betas=(0.5, 0.9)), "n_epochs": 40}
    rough = toy_cleanser(backend=ITD(last_epochs=1), **settings).fit(X)
    assert metasmoothness(Replay.of(rough.trajectory_)) < 0.5


def test_metasmoothness_belongs_to_the_last_fit(X):
    cleanser = toy_cleanser(optimizer=SGD(lr=1.0)).fit(X)
    before = cleanser.smoothness_
    assert cleanser.set_params(random_state=1).fit(X).smoothness_ != before
    with pytest.raises(NotFittedError):
        _ = toy_cleanser().smoothness_


def test_a_trainer_of_another_kind_is_refused(X):
    with pytest.raises(ValueError, match="trainer must be a GANTrainer or None; got 'fast'"):
        toy_cleanser().set_params(trainer="fast").fit(X)


def test_the_page_of_the_public_face_runs(X):
    generator, discriminator = (network.float() for network in toy_networks())
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
    cleanser = GANInfluence(
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
    assert cleanser.fit(X, X_val=X[:9]) is cleanser
    X_clean, y_clean = cleanser.fit_resample(X, np.arange(16))
    assert len(X_clean) == len(y_clean) == 15
    record = cleanser.trajectory_[3]
    assert record.indices.shape == (8,) and record.latents_d.shape == record.latents_g.shape == (8, 3)
    assert isinstance(record.seed, int)
    assert cleanser.trajectory_.steps_per_epoch == 2 and len(cleanser.trajectory_) == 10
    assert cleanser.trajectory_.state(10).discriminator["0.weight"].shape == (6, 2)
    assert not cleanser.trajectory_[0].latents_d.requires_grad


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
    cleanser = GANInfluence()
    assert (cleanser.metric, cleanser.backend, cleanser.n_remove) == ("fid", "itd", 0.05)
    assert SGD().get_params() == {"lr": 1e-3, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_removing_the_most_harmful_improves_the_metric_as_predicted(optimizer, X):
    removed, predicted = 0.0, 0.0
    for seed in range(4):
        cleanser = toy_cleanser(optimizer=optimizer, n_remove=1).set_params(random_state=seed).fit(X)
        kept = torch.from_numpy(cleanser.sample_weight_)
        removed += cleanser.metric_value_ - metric_values(cleanser, torch.from_numpy(X.copy()), weights=kept)[0]
        one = cleanser.harmfulness_[~cleanser.support_].sum()
        assert one > 0
        predicted += one
    assert removed == pytest.approx(predicted, rel=0.3)
