"""Candidates that are re-ranked by another distance before they are credited."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from ganclean.exceptions import NetworkError
from ganclean.valuation import GMValuator
from ganclean.valuation.rerank import LPIPS
from tests.reference import gmvaluator as reference
from tests.toy_clouds import IMAGES, MADE, SAMPLES, TRAIN, UNSEEN


def manhattan(query, candidates):
    assert query.shape == (1, 3) and candidates.shape[1:] == (3,)
    return (query - candidates).abs().sum(dim=1)


@pytest.mark.parametrize("n_candidates", [60, 12])
def test_candidates_are_chosen_and_credited_by_the_given_distance(n_candidates):
    valuator = GMValuator(k=3, n_candidates=n_candidates, rerank=manhattan).fit(TRAIN, X_gen=SAMPLES)
    distances, rows = valuator.kneighbors(UNSEEN)
    for x, near, row in zip(UNSEEN, distances, rows):
        candidates = reference.contributors(TRAIN, x, n_candidates)
        expected = sorted((np.abs(TRAIN[i] - x).sum(), i) for i in candidates)[:3]
        assert [i for _, i in expected] == row.tolist()
        np.testing.assert_allclose(near, [d for d, _ in expected], rtol=1e-12)


def test_l2_compares_the_samples_themselves_and_not_their_features():
    first = GMValuator(k=3, n_candidates=60, rerank="l2", feature_extractor=lambda x: x[:, :1])
    np.testing.assert_allclose(
        first.fit(TRAIN, X_gen=SAMPLES).values_, GMValuator(k=3).fit(TRAIN, X_gen=SAMPLES).values_, rtol=1e-10
    )


def test_an_unseen_instance_has_to_be_a_candidate_before_it_is_reranked():
    settings = {"k": 3, "temperature": 0.5, "feature_extractor": lambda x: x[:, :1], "rerank": "l2"}
    all_ = GMValuator(**settings, n_candidates=60).fit(TRAIN, X_gen=SAMPLES)
    plain = GMValuator(k=3, temperature=0.5).fit(TRAIN, X_gen=SAMPLES)
    credited = plain.score_samples(UNSEEN) < 0
    np.testing.assert_allclose(all_.score_samples(UNSEEN)[credited], plain.score_samples(UNSEEN)[credited], rtol=1e-10)
    few = GMValuator(**settings, n_candidates=3).fit(TRAIN, X_gen=SAMPLES)
    behind = UNSEEN.copy()
    behind[:, 0] = SAMPLES[:, 0].max() + 5  # near in the others, but no sample's candidate
    assert (few.score_samples(behind) > 0).all()


@pytest.fixture
def random_weights(monkeypatch):
    """AlexNet with random weights, since those of ImageNet may not be here."""
    alexnet = torchvision.models.alexnet
    torch.manual_seed(0)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda **_: alexnet(weights=None))


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_that_of_torchmetrics_for_each_candidate(channels, random_weights):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    images = torch.rand(4, channels, 64, 64) * 2 - 1
    lpips = LPIPS()
    found = lpips(images[:1], images)
    theirs = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    theirs.net = lpips.network
    colour = images.expand(-1, 3, -1, -1)
    expected = [float(theirs(colour[:1], colour[i : i + 1])) for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found[0] == 0 and (found[1:] > 0).all()


def test_images_are_reranked_by_lpips(random_weights):
    samples = np.concatenate([IMAGES[[4, 9]], MADE])
    valuator = GMValuator(k=2, n_candidates=6, feature_extractor="pixels", rerank="lpips").fit(IMAGES, X_gen=samples)
    assert valuator.kneighbors(samples[:2])[1][:, 0].tolist() == [4, 9]
    assert valuator.values_.sum() == pytest.approx(10)


def test_lpips_refuses_what_is_no_image(random_weights):
    with pytest.raises(ValueError, match="LPIPS compares grey or colour images"):
        GMValuator(rerank="lpips").fit(TRAIN, X_gen=SAMPLES)


def test_weights_of_lpips_that_cannot_be_had_are_named(monkeypatch):
    def offline(**_):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "alexnet", offline)
    with pytest.raises(NetworkError, match=r"weights of LPIPS.*no network.*rerank='l2'"):
        GMValuator(feature_extractor="pixels", rerank="lpips").fit(IMAGES, X_gen=MADE)
