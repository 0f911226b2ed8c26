"""The cleansing curve is what retraining by hand gives, and its verdicts are those of the tests that it claims."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from sklearn.ensemble import IsolationForest

from ganclean.backends import ITD
from ganclean.metrics import FID, PRDC, AverageLogLikelihood, DiscriminatorLoss, SampleMean
from ganclean.runs.replay import retrained_states
from ganclean.validation import CleansingCurve, cleansing_curve, paired_comparison
from ganclean.validation.selectors import SELECTORS, resolve_selector
from ganclean.validation.significance import corrected
from tests.toy_gans import toy_cleanser, toy_data

X_TEST = toy_data(60)[30:]
ALL = tuple(SELECTORS)


def backwards(cleanser, seed):
    return -np.arange(len(cleanser.influence_), dtype=np.float64)


@pytest.fixture(scope="module")
def fitted():
    X = toy_data(30)
    metrics = {"fid": FID(n_samples=60), "ll": AverageLogLikelihood(n_samples=60)}
    return toy_cleanser(metric=metrics, n_epochs=2, backend=ITD(last_epochs=1)).fit(X, X_val=toy_data(90)[60:])


@pytest.fixture(scope="module")
def curve(fitted):
    selectors = {name: name for name in [*ALL, "influence:ll"]} | {"first rows": backwards}
    metrics = {"coverage": PRDC("pixels", n_samples=50), "ll": AverageLogLikelihood(n_samples=60)}
    return cleansing_curve(fitted, X_TEST, [0.1, 0.3], selectors=selectors, metrics=metrics, n_seeds=3, last_epochs=1)


def test_every_metric_selector_seed_and_rate_has_a_value(curve):
    assert curve.selectors == [*ALL, "influence:ll", "first rows"]
    assert list(curve.values) == list(curve.baseline) == ["fid", "coverage", "ll"]
    for name in curve.values:
        assert curve.baseline[name].shape == (3,)
        assert all(values.shape == (3, 2) and np.isfinite(values).all() for values in curve.values[name].values())
    assert curve.greater_is_better == {"fid": False, "coverage": True, "ll": True}
    assert curve.harmfulness.shape == (3, 30) and sorted(curve.validation) == sorted(curve.selectors)
    assert sorted(curve.generators) == sorted(["none", *curve.selectors])


def test_the_first_seed_is_the_cleansers_own_run_retrained_without_the_selected(curve, fitted):
    worst = np.argsort(-fitted.harmfulness_, kind="stable")
    removals = [[], worst[:3], worst[:9], range(3), range(9)]
    states = retrained_states(fitted.trajectory_, removals, 1, renormalize=True)
    seed = int(np.random.RandomState(0).randint(2**31, size=3)[0])
    for name, metric in (("fid", FID(n_samples=60)), ("coverage", PRDC("pixels", n_samples=50))):
        evaluator, metric = fitted.evaluator(60, seed), metric.fit(X_TEST)
        expected = [evaluator.value(metric, state) for state in states]
        np.testing.assert_allclose(curve.baseline[name][0], expected[0], rtol=1e-9)
        np.testing.assert_allclose(curve.values[name]["influence"][0], expected[1:3], rtol=1e-9)
        np.testing.assert_allclose(curve.values[name]["first rows"][0], expected[3:], rtol=1e-9)
    evaluator = fitted.evaluator(60, seed + 1)
    expected = [evaluator.value(fitted.metric_, state) for state in states]
    np.testing.assert_allclose(curve.validation_baseline[0], expected[0], rtol=1e-9)
    np.testing.assert_allclose(curve.validation["influence"][0], expected[1:3], rtol=1e-9)
    shown = curve.generators["influence"]
    assert all(torch.equal(p, states[1].generator[name]) for name, p in shown.named_parameters()) or all(
        torch.equal(p, states[2].generator[name]) for name, p in shown.named_parameters()
    )


def test_the_other_seeds_are_other_runs(curve):
    assert len(set(curve.baseline["fid"].tolist())) == 3
    assert not np.allclose(curve.harmfulness[0], curve.harmfulness[1])


def test_the_same_curve_comes_from_several_processes(fitted):
    alone, together = (
        cleansing_curve(fitted, X_TEST, [0.2], n_seeds=3, last_epochs=1, n_jobs=n_jobs) for n_jobs in (1, 2)
    )
    np.testing.assert_allclose(alone.values["fid"]["influence"], together.values["fid"]["influence"], rtol=1e-9)
    np.testing.assert_allclose(alone.baseline["fid"], together.baseline["fid"], rtol=1e-9)


def test_comparisons_are_paired_over_seeds_and_signed_so_that_positive_is_better(curve):
    for metric, sign in (("fid", -1), ("ll", 1)):
        improvement = sign * (curve.values[metric]["influence"][:, 1] - curve.values[metric]["random"][:, 1])
        comparison = curve.compare("influence", "random", 0.3, metric)
        assert comparison.improvement == pytest.approx(improvement.mean())
        theirs = ttest_rel(
            sign * curve.values[metric]["influence"][:, 1],
            sign * curve.values[metric]["random"][:, 1],
            alternative="greater",
        )
        assert comparison.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    assert curve.compare("influence", "none", 0.3) == curve.compare("influence", "none")


def made_up(improvements, validation=None):
    """A curve of one metric, lower is better, with given improvements (n_seeds, n_rates) of each selector."""
    n_seeds, n_rates = improvements["influence"].shape
    baseline = np.linspace(10, 20, n_seeds)
    values = {name: baseline[:, None] - change for name, change in improvements.items()}
    validation = values if validation is None else {k: baseline[:, None] - v for k, v in validation.items()}
    rates = np.linspace(0.1, 0.5, n_rates)
    return CleansingCurve(
        "fid", {"fid": False}, rates, {"fid": baseline}, {"fid": values}, baseline, validation, np.zeros((n_seeds, 5))
    )


def test_the_automatic_rate_is_chosen_on_validation_data_for_each_seed():
    influence = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    random = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    validation = {"influence": np.array([[1.0, 0.0], [-1.0, -2.0], [1.0, 9.0]]), "random": np.zeros((3, 2))}
    curve = made_up({"influence": influence, "random": random}, validation)
    assert curve.chosen_rates("influence").tolist() == [1, 0, 2]
    assert curve.compare(rate="auto").improvement == pytest.approx((1 + 0 + 6) / 3)
    assert curve.compare(against="random", rate="auto").improvement == pytest.approx((0.9 + 0 + 5.4) / 3)


def test_an_effect_that_random_removal_shows_too_is_no_effect():
    noise = np.random.default_rng(0).normal(scale=0.01, size=(5, 2))
    as_much = made_up({"influence": 1 + noise, "random": 1 - noise})
    assert as_much.compare("influence", "none", 0.1).significant and not as_much.helps().any()
    assert as_much.helps("random").all()
    more = made_up({"influence": 2 + noise, "random": 1 - noise})
    assert more.helps().all()


def test_p_values_are_corrected_for_the_number_of_rates():
    rng = np.random.default_rng(1)
    curve = made_up({"influence": rng.normal(0.7, 1.0, size=(6, 4)), "random": rng.normal(size=(6, 4))})
    plain = [curve.compare("influence", "none", rate).p_value for rate in curve.rates]
    ours = curve.compare_all("influence", "none")
    assert [one.n_compared for one in ours] == [4] * 4
    assert min(one.p_value for one in ours) == pytest.approx(4 * min(plain))
    assert all(one.p_value >= p for one, p in zip(ours, plain))


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
def test_the_correction_is_holms(p_values):
    template = paired_comparison([1.0, 2.0, 3.0])
    ours = [one.p_value for one in corrected([type(template)(**{**vars(template), "p_value": p}) for p in p_values])]
    # Holm by its definition: the smallest level at which the step-down procedure rejects.
    order = np.argsort(p_values, kind="stable")
    for i, p in enumerate(ours):
        steps = [(len(p_values) - k) * p_values[j] for k, j in enumerate(order)]
        rank = order.tolist().index(i)
        assert p == pytest.approx(min(1.0, max(steps[: rank + 1])))


def test_the_baselines_are_what_they_are_named_for(fitted):
    X = toy_data(30)
    features = X  # FID of tabular data takes the values themselves
    forest = IsolationForest(random_state=7).fit(features)
    np.testing.assert_allclose(SELECTORS["isolation_forest"](fitted, 7), -forest.score_samples(features))
    centred = features - features.mean(axis=0)
    order = np.argsort(SELECTORS["density"](fitted, 0))
    assert np.linalg.norm(centred[order[-3:]], axis=1).min() > np.linalg.norm(centred[order[:3]], axis=1).max()
    loss = toy_cleanser(metric=DiscriminatorLoss(), n_epochs=2, backend=ITD(last_epochs=1)).fit(
        X, X_val=toy_data(90)[60:]
    )
    np.testing.assert_allclose(SELECTORS["discriminator_loss"](fitted, 0), loss.harmfulness_, rtol=1e-6, atol=1e-12)
    assert sorted(SELECTORS["random"](fitted, 3).tolist()) == list(range(30))
    assert np.array_equal(resolve_selector("influence:ll", fitted)(fitted, 0), fitted.influences_["ll"])
    assert np.array_equal(resolve_selector("influence:fid", fitted)(fitted, 0), fitted.harmfulness_)


def test_a_metric_without_features_has_its_baselines_in_the_data():
    X = toy_data(12)
    cleanser = toy_cleanser(metric=DiscriminatorLoss(), n_epochs=1).fit(X)
    assert SELECTORS["density"](cleanser, 0).shape == (12,)


@pytest.mark.parametrize("selectors", [["influenc"], ["influence:kid"], []])
def test_unknown_selectors_are_refused_before_anything_is_trained(selectors, fitted):
    with pytest.raises(ValueError, match="selector"):
        cleansing_curve(fitted, X_TEST, [0.1], selectors=selectors)


@pytest.mark.parametrize("rates", [[], [0.0], [1.0], [0.1, -0.1]])
def test_rates_are_fractions(rates, fitted):
    with pytest.raises(ValueError, match="rates must be fractions"):
        cleansing_curve(fitted, X_TEST, rates)


@pytest.mark.slow
def test_shuffled_influence_is_found_to_help_in_at_most_one_of_twenty_trials():
    """The whole machinery on scores that mean nothing: real trainings, real removals, real tests."""
    X = toy_data(60)
    cleanser = toy_cleanser(metric=SampleMean(n_samples=60), n_epochs=1, batch_size=10).fit(X)
    n_trials, n_seeds, rates = 200, 5, [0.1, 0.2, 0.3]

    def shuffled(trial):
        def selector(cleanser, seed):
            return np.random.default_rng([trial, seed]).permutation(cleanser.harmfulness_)

        return selector

    curve = cleansing_curve(
        cleanser,
        toy_data(90)[60:],
        rates,
        selectors={f"shuffled {trial}": shuffled(trial) for trial in range(n_trials)} | {"random": "random"},
        n_seeds=n_seeds,
    )
    found = [curve.helps(f"shuffled {trial}").any() for trial in range(n_trials)]
    assert np.mean(found) <= 0.05
