"""The panel's values are those of its metrics, beside real data's, and it tells copies from samples."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity
from torch import nn

from ganclean.exceptions import MetricError, NonFiniteError
from ganclean.metrics import FID, FLD, KID, PRDC, Authenticity, CTTest, InceptionScore
from ganclean.validation import MetricPanel, metric_panel
from tests.toy_gans import toy_cleanser, toy_data

X = toy_data(600)
TRAIN, TEST, FAKE = X[:300], X[300:500], 0.9 * X[500:]
ALL = ["fid", "kid", "precision", "recall", "density", "coverage", "ct", "authenticity", "fld", "fld_gap"]


class Counting(nn.Module):
    """Class logits, and how often each sample was looked at."""

    def __init__(self):
        super().__init__()
        self.n_seen = 0

    def forward(self, samples):
        self.n_seen += len(samples)
        return torch.stack([samples.sum(dim=1), samples[:, 0]], dim=1).float()


@pytest.fixture(scope="module")
def panel():
    return metric_panel(FAKE, TEST, TRAIN, n_splits=3)


def test_the_values_of_a_split_are_those_of_the_metrics_alone(panel):
    rng = np.random.RandomState(0)
    rows, drawn = rng.permutation(200), rng.permutation(100)
    reference = TEST[rows[100:]]
    fld = FLD(TRAIN).fit(reference)
    for side, samples in ((panel.values, FAKE[drawn]), (panel.null, TEST[rows[:100]])):
        samples = torch.from_numpy(samples)
        alone = {"fid": FID(), "kid": KID(), "ct": CTTest(TRAIN), "authenticity": Authenticity(TRAIN)}
        expected = {name: float(metric.fit(reference)(samples)) for name, metric in alone.items()}
        expected |= PRDC().fit(reference).compute(samples)
        both = fld.compute(samples)
        expected |= {"fld": both["fld"], "fld_gap": both["gap"]}
        assert {name: values[0] for name, values in side.items()} == pytest.approx(expected, rel=1e-9)
    assert list(panel.values) == list(panel.null) == ALL
    assert (panel.n_samples, panel.n_test, panel.n_train) == (100, 100, 300)


def test_the_inception_score_needs_a_classifier():
    classifier = Counting()
    panel = metric_panel(FAKE, TEST, TRAIN, classifier=classifier, n_splits=2)
    assert list(panel.values) == ["fid", "kid", "inception_score", *ALL[2:]]
    expected = InceptionScore(Counting()).fit(FAKE)(torch.from_numpy(FAKE))
    np.testing.assert_allclose(panel.values["inception_score"], float(expected), rtol=1e-6)
    assert classifier.n_seen == len(FAKE) + len(TEST)


def test_features_are_extracted_once_and_shared():
    extractor = Counting()
    metric_panel(FAKE, TEST, TRAIN, feature_extractor=extractor, n_splits=3)
    assert extractor.n_seen == len(FAKE) + len(TEST) + len(TRAIN)


def test_samples_come_in_any_container_or_from_an_estimator():
    as_array = metric_panel(FAKE, TEST, TRAIN, n_splits=2).to_dict()
    assert metric_panel(torch.from_numpy(FAKE), pd.DataFrame(TEST), TRAIN.tolist(), n_splits=2).to_dict() == as_array
    for model in (GaussianMixture(random_state=0), KernelDensity()):
        with pytest.raises(NotFittedError):
            metric_panel(model, TEST, TRAIN)
        panel = metric_panel(model.fit(TRAIN), TEST, TRAIN, n_splits=2)
        assert panel.n_samples == 100 and panel.values["fid"].std() > 0
    assert (metric_panel(GaussianMixture(random_state=0).fit(TRAIN), TEST, TRAIN).z("fid")) < 5


def test_a_fitted_gan_is_evaluated_by_its_samples():
    cleanser = toy_cleanser().fit(TRAIN[:40])
    panel = metric_panel(cleanser, TEST, TRAIN, n_splits=2)
    again = metric_panel(cleanser.sample(len(TEST))[0], TEST, TRAIN, n_splits=2)
    assert panel.to_dict() == again.to_dict() and panel.z("fid") > 5


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_copies_stand_out_in_the_last_four_metrics_alone(noise):
    X = PCA(16, random_state=0).fit_transform(load_digits().data / 16)
    X = X[np.random.default_rng(0).permutation(len(X))]
    train, test = X[:1000], X[1000:]
    copies = train[:398] + noise * train.std(axis=0) * np.random.default_rng(1).normal(size=(398, 16))
    panel = metric_panel(copies, test, train, n_splits=4)
    # Splits overlap, so that their standard deviation is too small a ruler; copies are ten times as far.
    assert all(abs(panel.z(name)) < 4 for name in ALL[:6])
    assert panel.z("ct") < -10 and panel.z("authenticity") < -10
    assert panel.z("fld") > 20 and panel.z("fld_gap") < -20


def test_real_samples_are_like_real_data():
    panel = metric_panel(X[500:], TEST, TRAIN, n_splits=5)
    assert all(abs(panel.z(name)) < 4 for name in ALL)


def test_it_is_read_as_a_table_and_as_a_dictionary(panel):
    title, header, *lines = str(panel).splitlines()
    assert title == "100 samples against 100 test and 300 training instances: mean (sd) of 3 splits"
    assert header.split() == ["metric", "better", "generated", "real", "z"]
    assert [line.split()[0] for line in lines] == ALL and len({len(line) for line in [header, *lines]}) == 1
    row = json.loads(json.dumps(panel.to_dict()))["ct"]
    values, null = panel.values["ct"], panel.null["ct"]
    assert row["mean"] == values.mean() and row["null_sd"] == null.std(ddof=1) and row["better"] == "as real"
    assert row["z"] == pytest.approx((values.mean() - null.mean()) / null.std(ddof=1))


def test_without_scatter_there_is_no_z():
    panel = MetricPanel({"fid": np.ones(2)}, {"fid": np.zeros(2)}, 60, 60, 60)
    assert panel.z("fid") == np.inf and "inf" in str(panel)


def test_random_state_draws_the_splits():
    first, second, other = (
        metric_panel(FAKE, TEST, TRAIN, n_splits=2, random_state=seed).values["fid"] for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_what_is_not_as_expected_is_named():
    with pytest.raises(ValueError, match="n_splits must be an integer of at least 2; got 1"):
        metric_panel(FAKE, TEST, TRAIN, n_splits=1)
    with pytest.raises(MetricError, match="at least 60 samples and 120 test instances; got 100 and 110"):
        metric_panel(FAKE, TEST[:110], TRAIN)
    with pytest.raises(MetricError, match="at least 60 samples and 120 test instances; got 50 and 200"):
        metric_panel(FAKE[:50], TEST, TRAIN)
    with pytest.raises(MetricError, match=r"samples have shape \(1,\) and the test instances \(2,\)"):
        metric_panel(FAKE[:, :1], TEST, TRAIN)
    with pytest.raises(NonFiniteError, match="generated samples are NaN"):
        metric_panel(FAKE * np.nan, TEST, TRAIN)
