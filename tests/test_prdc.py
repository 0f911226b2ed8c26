import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.base import clone
from torch import nn

from ganclean.exceptions import MetricError, NonFiniteError
from ganclean.metrics import FID, PRDC, SampleMean
from ganclean.validation import counterfactual_retrain
from tests.reference.prdc import brute_force_prdc
from tests.toy_gans import toy_cleanser

QUANTITIES = ["precision", "recall", "density", "coverage"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REAL, FAKE = normal(70, 3), 0.8 * normal(50, 3, seed=1) + 0.3


def few_points(n_max=14):
    """Points on a coarse grid, so that many coincide and many distances tie."""
    return st.integers(5, n_max).flatmap(lambda n: arrays(np.float64, (n, 2), elements=st.integers(-3, 3)))


@pytest.mark.parametrize("k", [1, 3, 5, 20])
@pytest.mark.parametrize(("width", "shift"), [(1, 0.0), (3, 0.3), (40, 0.0)])
def test_all_four_are_those_of_loops_over_balls_and_points(k, width, shift):
    real, fake = normal(45, width), 0.9 * normal(35, width, seed=1) + shift
    expected = brute_force_prdc(real.numpy(), fake.numpy(), k)
    assert PRDC(k=k).fit(real).compute(fake) == pytest.approx(expected, abs=1e-14)
    assert expected["precision"] > 0 and expected["coverage"] > 0


@given(real=few_points(), fake=few_points(), k=st.integers(1, 4))
def test_all_four_are_those_of_loops_where_points_coincide_and_distances_tie(real, fake, k):
    assert PRDC(k=k).fit(real).compute(fake) == pytest.approx(brute_force_prdc(real, fake, k), abs=1e-14)


@pytest.mark.parametrize("k", [1, 5])
def test_precision_and_recall_agree_with_torch_fidelity(k):
    pytest.importorskip("torch_fidelity", minversion="0.4")  # which takes the generated samples first
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = normal(300, 8), 0.9 * normal(200, 8, seed=1) + 0.2
    ours = PRDC(k=k).fit(real).compute(fake)
    expected = theirs.calculate_precision_recall_part(fake, real, neighborhood=k)
    assert (ours["precision"], ours["recall"]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_all_four_agree_with_the_code_of_their_authors(k):
    theirs = pytest.importorskip("prdc")
    real, fake = normal(300, 8), 0.9 * normal(200, 8, seed=1) + 0.2
    expected = theirs.compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    assert PRDC(k=k).fit(real).compute(fake) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_call_returns_the_chosen_one_of_the_four(quantity):
    metric = PRDC(k=3, quantity=quantity).fit(REAL)
    value = metric(FAKE.clone().requires_grad_())
    assert value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    assert float(value) == float(metric.reduce(FAKE)) == metric.compute(FAKE)[quantity]
    assert metric.greater_is_better and not metric.is_differentiable


def test_the_four_come_in_the_order_of_their_name():
    assert list(PRDC().fit(REAL).compute(FAKE)) == QUANTITIES


@given(points=few_points(), k=st.integers(1, 4))
def test_samples_that_are_the_reference_are_precise_and_cover_it(points, k):
    values = PRDC(k=k).fit(points).compute(points)
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    assert values["density"] >= (k + 1) / k


def test_the_density_of_the_reference_itself_counts_the_centre_and_k_neighbours_of_every_ball():
    assert PRDC(k=4).fit(REAL).compute(REAL)["density"] == pytest.approx(5 / 4)


def test_far_samples_have_none_of_the_four():
    assert PRDC().fit(REAL).compute(FAKE + 100) == dict.fromkeys(QUANTITIES, 0.0)


def test_samples_of_one_mode_are_precise_and_cover_only_it():
    modes = torch.cat([normal(40, 2), normal(40, 2, seed=1) + 50])
    values = PRDC().fit(modes).compute(modes[:40])
    assert values["precision"] == 1
    assert values["recall"] == values["coverage"] == 0.5


def test_an_outlying_sample_raises_recall_but_not_coverage():
    samples = torch.cat([normal(20, 2) + 30, normal(2, 2, seed=1) - 1000])
    values = PRDC().fit(REAL[:, :2]).compute(samples)
    assert values["recall"] == 1 and values["coverage"] == 0


@given(seed=st.integers(0, 1000))
def test_the_order_of_the_instances_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    shuffled = PRDC().fit(REAL[rng.permutation(70)]).compute(FAKE[rng.permutation(50)])
    assert shuffled == PRDC().fit(REAL).compute(FAKE)


@given(scale=st.sampled_from([2.0**-10, 2.0, 2.0**10]), shift=st.sampled_from([0.0, 1.0, 64.0]))
def test_units_do_not_matter(scale, shift):
    real, fake = (np.round(x.numpy(), 2) * 128 for x in (REAL, FAKE))
    moved = PRDC().fit(np.round(real) * scale + shift).compute(np.round(fake) * scale + shift)
    assert moved == PRDC().fit(np.round(real)).compute(np.round(fake))


@pytest.mark.parametrize("entries", [1, 70, 1000])
def test_the_values_do_not_depend_on_how_many_distances_are_in_memory(entries, monkeypatch):
    expected = PRDC().fit(REAL).compute(FAKE)
    monkeypatch.setattr("ganclean.distances.ENTRIES_AT_ONCE", entries)
    assert PRDC().fit(REAL).compute(FAKE) == expected


def test_no_more_distances_than_allowed_are_computed_at_once(monkeypatch):
    sizes = []

    def counting(x, y, **settings):
        sizes.append(len(x) * len(y))
        return cdist(x, y, **settings)

    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", counting)
    monkeypatch.setattr("ganclean.distances.ENTRIES_AT_ONCE", 700)
    PRDC().fit(REAL).compute(FAKE)
    assert max(sizes) <= 700 and sum(sizes) == 70 * 70 + 50 * 50 + 70 * 50


def test_balls_around_samples_are_drawn_for_recall_only():
    few = FAKE[:4]
    for quantity in ("precision", "density", "coverage"):
        assert PRDC(quantity=quantity).fit(REAL)(few).isfinite()
    with pytest.raises(MetricError, match="k=5 nearest neighbours need more than 5 generated samples; got 4"):
        PRDC(quantity="recall").fit(REAL)(few)


def test_neighbours_are_those_in_feature_space():
    torch.manual_seed(0)
    extractor = nn.Sequential(nn.Linear(3, 6), nn.Tanh())
    by_features = PRDC().fit(extractor(REAL.float()).detach()).compute(extractor(FAKE.float()).detach())
    metric = PRDC(extractor).fit(REAL)
    assert metric.compute(FAKE) == metric.compute(FAKE.float().numpy()) == by_features
    assert metric.features_.shape == (70, 6) and metric.radii_.shape == (70,)


def test_no_graph_of_the_extractor_is_kept():
    graphs = []

    def extractor(samples):
        graphs.append(torch.is_grad_enabled())
        return samples

    metric = PRDC(extractor).fit(REAL)
    metric(FAKE)
    metric.compute(FAKE)
    assert not any(graphs) and len(graphs) == 3


def test_single_and_double_precision_agree():
    assert PRDC().fit(REAL.float()).compute(FAKE.float()) == PRDC().fit(REAL).compute(FAKE)


def test_collapsed_samples_on_a_collapsed_reference_are_perfect_and_elsewhere_worthless():
    ones = torch.ones(8, 2)
    assert PRDC(k=2).fit(ones).compute(ones) == {"precision": 1, "recall": 1, "density": 4, "coverage": 1}
    assert PRDC(k=2).fit(ones).compute(2 * ones) == dict.fromkeys(QUANTITIES, 0.0)


def test_equal_instances_far_from_the_origin_are_at_distance_zero():
    copies = (1e6 * normal(1, 200)).repeat(9, 1)
    assert not PRDC().fit(copies).radii_.any()


def test_samples_of_the_same_distribution_have_the_expected_coverage_and_density():
    real, fake, k = normal(1500, 2), normal(1500, 2, seed=1), 5
    values = PRDC(k=k).fit(real).compute(fake)
    # Naeem et al., 2020, lemmas 1 and 2.
    expected = 1 - math.prod((1500 - i) / (3000 - 1 - i) for i in range(k))
    assert values["coverage"] == pytest.approx(expected, abs=0.02)
    assert values["density"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("n", [1, 4, 5])
def test_a_reference_of_k_instances_has_no_balls(n):
    with pytest.raises(MetricError, match=f"k=5 nearest neighbours need more than 5 reference instances; got {n}"):
        PRDC().fit(REAL[:n])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_on_either_side(value):
    broken = REAL.clone()
    broken[[7, 9], 1] = value
    message = "features of 2 of 70 {} are NaN or infinite, the first in row 7"
    with pytest.raises(NonFiniteError, match=message.format("reference instances")):
        PRDC().fit(broken)
    for quantity in QUANTITIES:
        with pytest.raises(NonFiniteError, match=message.format("generated samples")):
            PRDC(quantity=quantity).fit(REAL)(broken)


@pytest.mark.parametrize("k", [0, -1, 2.5, "five"])
def test_k_is_a_positive_integer(k):
    with pytest.raises(ValueError, match="k must be an integer of at least 1"):
        PRDC(k=k).fit(REAL)


def test_there_are_four_quantities():
    with pytest.raises(ValueError, match=r"quantity must be one of \['precision', 'recall', 'density', 'coverage'\]"):
        PRDC(quantity="f1").fit(REAL)


def test_it_is_cloned_with_its_parameters():
    metric = clone(PRDC(k=3, quantity="recall", n_samples=40).fit(REAL))
    assert metric.get_params() == {"feature_extractor": None, "k": 3, "quantity": "recall", "n_samples": 40}
    assert not hasattr(metric, "radii_") and metric.sample_size == 40


@pytest.mark.parametrize("metric", [PRDC(k=2), {"fid": FID(), "PRDC": PRDC(k=2)}], ids=["alone", "beside another"])
def test_influence_on_it_is_refused_before_training_and_the_way_out_is_named(metric, X):
    cleanser = toy_cleanser(metric=metric)
    with pytest.raises(MetricError, match=r"'PRDC' is for evaluation only.*FID, KID or MMD.*counterfactual_retrain"):
        cleanser.fit(X)
    assert not hasattr(cleanser, "trajectory_")


def test_a_metric_that_says_so_is_refused_even_where_it_has_a_gradient(X):
    class Judge(SampleMean):
        is_differentiable = False

    with pytest.raises(MetricError, match="for evaluation only: Judge has no gradient"):
        toy_cleanser(metric=Judge()).fit(X)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_it_judges_what_removal_does(quantity, cleanser, X):
    metric = PRDC(k=2, quantity=quantity, n_samples=30).fit(X)
    values = counterfactual_retrain(cleanser, [[], list(range(8))], metric=metric)
    samples = cleanser.generator_(cleanser.evaluator(30).latents)
    assert values[0] == metric.compute(samples.detach())[quantity]
    assert values.shape == (2,) and np.isfinite(values).all() and (values >= 0).all()
