import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.neighbors import KernelDensity
from torch import nn
from torch.autograd import grad, gradcheck
from torch.func import functional_call
from torchmetrics.image import fid, inception, kid

from ganclean.datasets import load_digits_images
from ganclean.exceptions import MetricError, NetworkError, NonFiniteError
from ganclean.metrics import (
    FID,
    KID,
    MMD,
    AverageLogLikelihood,
    DiscriminatorLoss,
    FeatureMetric,
    FunctionMetric,
    InceptionScore,
    InceptionV3,
    Metric,
    SampleMean,
    resolve_metric,
    train_classifier,
)
from ganclean.metrics.evaluation import Evaluator
from tests.toy_gans import toy_networks, toy_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features:UserWarning")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def extractor(n_features=5, width=3):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(width, n_features), nn.Tanh()).double()
    module.num_features = n_features
    return module.requires_grad_(False)


REAL, FAKE = normal(80, 3), 0.8 * normal(60, 3, seed=1) + 0.3


def torchmetric(metric, real=None, fake=None):
    for samples, kind in ((real, True), (fake, False)):
        if samples is not None:
            metric.update(samples, real=kind)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def test_fid_agrees_with_torchmetrics():
    expected = torchmetric(fid.FrechetInceptionDistance(feature=extractor()), REAL, FAKE)
    assert float(FID(extractor()).fit(REAL)(FAKE)) == pytest.approx(expected, rel=1e-4)


def test_fid_of_gaussians_with_diagonal_covariances_has_the_closed_form():
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    variance, shift = 4 / 3, torch.tensor([2.0, 1.0], dtype=torch.float64)
    expected = 5 + 2 * variance * (3 - 1) ** 2
    assert float(FID().fit(square)(3 * square + shift)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("settings", [{}, {"degree": 2, "gamma": 0.3, "coef": 0.5}])
@pytest.mark.parametrize("subsets", [{}, {"n_subsets": 1, "subset_size": 60}])
def test_kid_agrees_with_torchmetrics_on_a_full_subset(settings, subsets):
    theirs = kid.KernelInceptionDistance(feature=extractor(), subsets=1, subset_size=60, **settings)
    expected = torchmetric(theirs, REAL[:60], FAKE)
    ours = KID(extractor(), **settings, **subsets).fit(REAL[:60])
    assert float(ours(FAKE)) == pytest.approx(expected, rel=1e-4)


def test_kid_is_the_mean_over_all_pairs_under_the_polynomial_kernel():
    x, y = normal(4, 2), normal(3, 2, seed=1)

    def mean_kernel(a, b):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if a is not b or i != j]
        return np.mean([(float(a[i] @ b[j]) / 2 + 1) ** 3 for i, j in pairs])

    expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert float(KID().fit(x)(y)) == pytest.approx(expected, rel=1e-10)


def test_kid_over_subsets_is_the_same_at_every_call_and_near_the_estimate_from_all():
    subsets = KID(n_subsets=200, subset_size=30).fit(REAL)
    assert float(subsets(FAKE)) == float(subsets(FAKE))
    assert float(subsets(FAKE)) != float(KID(n_subsets=200, subset_size=30, random_state=1).fit(REAL)(FAKE))
    assert float(subsets(FAKE)) == pytest.approx(float(KID().fit(REAL)(FAKE)), rel=0.2)


@pytest.mark.parametrize("n_splits", [1, 4, 7])
def test_inception_score_agrees_with_torchmetrics(n_splits, monkeypatch):
    theirs = inception.InceptionScore(feature=extractor(), splits=n_splits)
    theirs.update(FAKE)
    monkeypatch.setattr(torch, "randperm", torch.arange)
    expected = float(theirs.compute()[0])
    assert float(InceptionScore(extractor(), n_splits).fit(REAL)(FAKE)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bandwidth", [0.3, 1.0, 2.5])
def test_log_likelihood_is_that_of_a_gaussian_kernel_density_estimate(bandwidth):
    metric = AverageLogLikelihood(bandwidth).fit(REAL)
    density = KernelDensity(bandwidth=bandwidth).fit(FAKE.numpy())
    by_scipy = [
        logsumexp(multivariate_normal.logpdf(FAKE.numpy(), x, bandwidth**2 * np.eye(3))) - math.log(60)
        for x in REAL.numpy()
    ]
    assert float(metric(FAKE)) == pytest.approx(density.score_samples(REAL.numpy()).mean(), rel=1e-10)
    assert float(metric(FAKE)) == pytest.approx(np.mean(by_scipy), rel=1e-10)


def test_log_likelihood_stays_finite_far_from_the_samples():
    samples = (FAKE + 100).requires_grad_()
    value = AverageLogLikelihood(bandwidth=0.1).fit(REAL)(samples)
    assert value.isfinite()
    assert grad(value, samples)[0].isfinite().all()


METRICS = {
    "fid": FID(extractor()),
    "fid of pixels": FID(),
    "kid": KID(extractor()),
    "kid over subsets": KID(n_subsets=3, subset_size=5),
    "mmd": MMD(extractor()),
    "inception_score": InceptionScore(extractor()),
    "inception_score in parts": InceptionScore(extractor(), n_splits=2),
    "log_likelihood": AverageLogLikelihood(bandwidth=0.7),
    "mean": SampleMean(),
    "function": FunctionMetric(torch.var),
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_gradient_in_the_samples_equals_finite_differences(metric):
    assert gradcheck(metric.fit(REAL), (0.5 * normal(9, 3, seed=2) + 0.2).requires_grad_())


@pytest.mark.parametrize("loss", ["non_saturating", "least_squares"])
def test_the_gradient_of_the_discriminator_loss_equals_finite_differences(loss):
    metric = DiscriminatorLoss(loss).fit(REAL)
    assert gradcheck(lambda x: metric(x, lambda y: y.square().sum(dim=1)), normal(4, 3).requires_grad_())


def test_the_discriminator_loss_looks_at_no_more_reference_instances_than_samples():
    metric = DiscriminatorLoss("wasserstein", n_samples=10).fit(REAL)
    expected = FAKE.mean() - REAL[:10].mean()
    torch.testing.assert_close(metric(FAKE, lambda x: x.mean(dim=1)), expected)


def test_fid_with_fewer_samples_than_features_has_the_gradient_of_finite_differences():
    metric = FID().fit(normal(30, 8))
    assert gradcheck(metric, normal(5, 8, seed=1).requires_grad_())


def test_fid_to_fewer_reference_instances_than_features_has_a_finite_gradient():
    samples = normal(20, 8).requires_grad_()
    (gradient,) = grad(FID().fit(normal(4, 8, seed=1))(samples), samples)
    assert gradient.isfinite().all() and gradient.any()


def test_fid_of_collapsed_samples_has_a_finite_gradient():
    samples = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = grad(FID().fit(REAL)(samples), samples)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("metric", [FID(), KID(), AverageLogLikelihood()], ids=["fid", "kid", "log_likelihood"])
def test_a_metric_judges_far_samples_worse_than_near_ones(metric):
    metric.fit(REAL)
    near, far = float(metric(FAKE)), float(metric(FAKE + 5))
    assert far < near if metric.greater_is_better else far > near


def test_the_reference_may_come_in_any_container_and_precision():
    values = [float(FID().fit(reference)(FAKE)) for reference in (REAL, REAL.numpy(), REAL.tolist())]
    assert values[0] == values[1] == values[2]
    assert float(FID().fit(REAL.float())(FAKE.float())) == pytest.approx(values[0], rel=1e-4)


@pytest.mark.parametrize(("n_reference", "n_samples", "expected"), [(20, None, 20), (6000, None, 5000), (20, 70, 70)])
def test_a_metric_takes_as_many_samples_as_references_up_to_a_limit(n_reference, n_samples, expected):
    assert FID(n_samples=n_samples).fit(torch.rand(n_reference, 2)).sample_size == expected


def evaluator_and_state(chunk_size=500, n=23, **settings):
    step = toy_trainer(**settings).make_step(*toy_networks())
    state = step.initial_state()
    if settings.get("ema_decay"):
        state = state._replace(averages={"G": {name: 1.1 * p for name, p in state.average.items()}})
    return Evaluator(step, normal(n, 3, seed=5), chunk_size), state


EVALUATED = {
    "fid": FID(extractor(width=2), n_samples=23),
    "kid over subsets": KID(n_subsets=2, subset_size=9, n_samples=23),
    "mmd": MMD(bandwidth=0.8, n_samples=23),
    "inception_score": InceptionScore(extractor(width=2), n_splits=3, n_samples=23),
    "log_likelihood": AverageLogLikelihood(n_samples=23),
    "discriminator_loss": DiscriminatorLoss(n_samples=23),
    "fewer samples": SampleMean(n_samples=11),
}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("name", EVALUATED)
@given(chunk_size=st.integers(1, 30))
def test_the_two_pass_gradient_equals_a_single_pass_for_any_chunk_size(name, ema_decay, chunk_size):
    metric = EVALUATED[name].fit(normal(40, 2))
    evaluator, state = evaluator_and_state(chunk_size, ema_decay=ema_decay)
    value, gradient = evaluator.gradient(name, metric, state)

    params = {n: p.clone().requires_grad_() for n, p in state.evaluated["G"].items()}
    rival = {n: p.clone().requires_grad_() for n, p in state.discriminator.items()}
    samples = functional_call(evaluator.step.generator, params, (evaluator.latents[: metric.sample_size],))
    judge = [lambda x: functional_call(evaluator.step.discriminator, rival, (x,)).flatten()]
    expected = metric(samples, *judge[: metric.uses_discriminator])
    of_generator = dict(zip(params, grad(expected, list(params.values()), retain_graph=True)))
    of_discriminator = dict(zip(rival, grad(expected, list(rival.values()), materialize_grads=True, allow_unused=True)))

    assert value == pytest.approx(expected.item(), rel=1e-10)
    assert evaluator.value(metric, state) == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(
        gradient.average if ema_decay else gradient.generator, of_generator, rtol=1e-8, atol=1e-12
    )
    torch.testing.assert_close(gradient.discriminator, of_discriminator, rtol=1e-8, atol=1e-12)
    assert not ema_decay or not any(g.any() for g in gradient.generator.values())


BROKEN = {
    "a float": (lambda x: 1.0, r"'broken' returned float; expected a scalar tensor"),
    "a vector": (lambda x: x.mean(dim=0), r"'broken' returned a tensor of shape \(2,\)"),
    "a constant": (lambda x: torch.tensor(1.0), "'broken' does not depend on the generator"),
    "detached": (lambda x: x.detach().mean(), "'broken' does not depend on the generator"),
    "flat": (lambda x: (0 * x).sum(), "'broken' does not depend on the generator"),
    "rounded": (lambda x: x.round().mean(), "'broken' does not depend on the generator"),
}


@pytest.mark.parametrize(("function", "message"), BROKEN.values(), ids=BROKEN)
def test_a_metric_without_a_gradient_in_the_generator_is_refused(function, message):
    evaluator, state = evaluator_and_state()
    with pytest.raises(MetricError, match=message):
        evaluator.gradient("broken", FunctionMetric(function, n_samples=23).fit(REAL), state)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.mean() * float("nan"), lambda x: (x - x).abs().sqrt().sum() + x.mean()],
    ids=["value", "gradient"],
)
def test_a_metric_that_is_not_finite_is_named(function):
    evaluator, state = evaluator_and_state()
    with pytest.raises(NonFiniteError, match=r"The metric 'odd' is .* or its gradient in the generator is NaN"):
        evaluator.gradient("odd", FunctionMetric(function, n_samples=23).fit(REAL), state)


@pytest.mark.parametrize("metric", [FID(), KID(), MMD()], ids=["FID", "KID", "MMD"])
def test_one_reference_instance_is_too_few(metric):
    with pytest.raises(MetricError, match="needs at least 2 reference instances"):
        metric.fit(REAL[:1])


def test_a_subset_larger_than_the_samples_is_refused():
    with pytest.raises(MetricError, match="subset_size=70 is larger than the 80 reference or the 60 generated"):
        KID(n_subsets=2, subset_size=70).fit(REAL)(FAKE)


def test_a_classifier_of_one_class_is_refused():
    with pytest.raises(MetricError, match="logits of at least 2 classes"):
        InceptionScore(lambda x: x[:, :1]).fit(REAL)(FAKE)


@pytest.mark.parametrize("function", [lambda x: x.mean(), lambda x: x[:-1], lambda x: (x, x)])
def test_an_extractor_that_does_not_return_one_vector_per_sample_is_refused(function):
    with pytest.raises(NetworkError, match=r"feature extractor returned .* for 80 samples; expected one tensor"):
        FID(function).fit(REAL)


def test_an_unknown_extractor_is_refused():
    with pytest.raises(NetworkError, match="feature_extractor must be a module or function"):
        FID("resnet").fit(REAL)


def test_a_metric_is_found_by_name_or_passed_through():
    metric = FID(n_samples=7)
    assert resolve_metric(metric) is metric
    assert isinstance(resolve_metric("kid"), KID)
    with pytest.raises(
        ValueError, match=r"metric must be one of \['fid', 'inception_score', 'kid', 'log_likelihood', 'mmd'\]"
    ):
        resolve_metric("accuracy")


def test_a_metric_of_ones_own_needs_only_the_value():
    class Spread(Metric):
        greater_is_better = True

        def __call__(self, samples):
            return samples.std()

    evaluator, state = evaluator_and_state()
    metric = Spread().fit(REAL[:23])
    value, gradient = evaluator.gradient("spread", metric, state)
    assert value == pytest.approx(float(evaluator.samples(state, 23).std()))
    assert any(g.any() for g in gradient.generator.values())


def test_a_feature_metric_of_ones_own_needs_only_extract_and_reduce():
    class SecondMoment(FeatureMetric):
        n_samples = 23

        def extract(self, samples):
            return samples.square()

        def reduce(self, features):
            return features.mean()

    evaluator, state = evaluator_and_state(chunk_size=4)
    value, _ = evaluator.gradient("moment", SecondMoment().fit(REAL[:, :2]), state)
    assert value == pytest.approx(float(evaluator.samples(state, 23).square().mean()))


def test_inception_without_weights_and_network_says_what_to_do(monkeypatch):
    def offline(**_):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models.inception_v3", offline)
    with pytest.raises(NetworkError, match=r"could not be fetched .*no route.*Connect to a network once, or pass a"):
        FID().fit(torch.zeros(4, 1, 8, 8))


@pytest.fixture
def untrained_inception(monkeypatch):
    from torchvision.models import inception_v3

    def without_weights(weights, transform_input):
        return inception_v3(weights=None, transform_input=transform_input, init_weights=False)

    monkeypatch.setattr("torchvision.models.inception_v3", without_weights)


def test_inception_maps_grey_images_to_features_and_stays_in_evaluation_mode(untrained_inception):
    network = InceptionV3().train()
    grey = torch.rand(2, 1, 8, 8, requires_grad=True)
    features = network(grey)
    assert features.shape == (2, 2048)
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert grad(features.sum(), grey)[0].any()
    torch.testing.assert_close(network(grey[:1].expand(-1, 3, -1, -1)), features[:1], rtol=1e-3, atol=1e-4)


def test_inception_gives_a_thousand_logits(untrained_inception):
    assert InceptionV3("logits", resize=False)(torch.rand(1, 3, 75, 75)).shape == (1, 1000)


def test_inception_has_only_two_outputs():
    with pytest.raises(ValueError, match="output must be 'features' or 'logits'"):
        InceptionV3("pool3")


def test_a_classifier_learns_digits_reproducibly_and_is_frozen():
    X, y = load_digits_images()
    state = torch.get_rng_state()
    first, second = (train_classifier(X[:600], y[:600], n_epochs=10, random_state=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    test = torch.from_numpy(X[600:1000])
    assert (first(test).argmax(dim=1).numpy() == y[600:1000]).mean() > 0.7
    assert torch.equal(first(test), second(test))
    assert not first.training and not any(p.requires_grad for p in first.parameters())
