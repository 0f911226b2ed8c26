"""What is not to be generated, told by samples, by a rule, by a classifier, or by several of them."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.utils.data import TensorDataset

from ganclean.redaction import AnyOf, ClassifierCriterion, CrossEntropyRefit, SampleCriterion, ValidityCriterion
from ganclean.redaction.criteria import as_criterion
from tests.toy_gans import toy_cleanser, toy_data

X = toy_data()


def is_right(x):
    return x[:, 0] > 0.5


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (X, SampleCriterion),
        (torch.from_numpy(X), SampleCriterion),
        (TensorDataset(torch.from_numpy(X)), SampleCriterion),
        (is_right, ValidityCriterion),
        (nn.Linear(2, 1), ClassifierCriterion),
    ],
)
def test_a_criterion_is_made_of_samples_a_function_or_a_module(given, kind):
    criterion = as_criterion(given)
    assert type(criterion) is kind and as_criterion(criterion) is criterion


@pytest.mark.parametrize("given", [None, "digits", 3])
def test_anything_else_is_answered_with_what_a_criterion_is_made_of(given):
    with pytest.raises(ValueError, match="criterion must say what is not to be generated"):
        as_criterion(given)


@given(rows=arrays(np.int64, (9, 2), elements=st.integers(-2, 2)), chosen=st.sets(st.integers(0, 8), min_size=1))
def test_known_samples_are_sifted_out_wherever_they_occur(rows, chosen):
    rows = rows.astype(float)
    known = rows[sorted(chosen)]
    expected = ~(rows[:, None] == known[None]).all(-1).any(-1)
    for samples in (known, known.astype(np.float32), torch.from_numpy(known)):
        assert np.array_equal(SampleCriterion(samples).keeps(rows), expected)


def test_samples_alone_judge_nothing_and_with_a_predicate_they_do():
    assert not SampleCriterion(X).judges
    criterion = SampleCriterion(X[:3], match=is_right)
    assert criterion.judges
    assert np.array_equal(criterion.is_valid(X), is_right(X)) and np.array_equal(criterion.keeps(X), is_right(X))


def test_a_cleanser_gives_the_rows_that_it_drops(cleanser):
    criterion = SampleCriterion.from_cleanser(cleanser)
    np.testing.assert_array_equal(criterion.samples, X[~cleanser.support_])
    assert np.array_equal(criterion.keeps(X), cleanser.support_)
    assert np.array_equal(SampleCriterion.from_cleanser(cleanser, X).samples, criterion.samples)


def test_a_cleanser_that_drops_nothing_leaves_nothing_to_redact():
    cleanser = toy_cleanser(n_epochs=1, n_remove=0).fit(X)
    with pytest.raises(ValueError, match="drops nothing"):
        SampleCriterion.from_cleanser(cleanser)


@pytest.mark.parametrize("batch_size", [1, 5, 16, 100])
def test_a_function_is_called_in_batches_of_what_it_is_given(batch_size):
    seen = []

    def function(batch):
        seen.append(batch)
        return is_right(batch)[:, None]

    for samples in (X, torch.from_numpy(X)):
        seen.clear()
        found = ValidityCriterion(function, batch_size).is_valid(samples)
        assert np.array_equal(found, is_right(X)) and found.dtype == bool
        assert {type(batch) for batch in seen} == {type(samples)}
        assert max(map(len, seen)) <= batch_size and sum(map(len, seen)) == len(X)


@pytest.mark.parametrize("answer", [np.zeros(3), np.full(16, 0.3), np.zeros((16, 2)), "yes"])
def test_a_function_that_returns_no_truth_values_is_named(answer):
    with pytest.raises(ValueError, match=r"expected one truth value each, true where the sample is valid"):
        ValidityCriterion(lambda _: answer).is_valid(X)


@given(threshold=st.floats(0.05, 1.0))
def test_samples_are_valid_where_their_probability_reaches_the_threshold(threshold):
    probability = torch.linspace(0, 1, 16, dtype=torch.float64)
    criterion = ClassifierCriterion(lambda _: probability, threshold)
    assert np.array_equal(criterion.is_valid(X), probability.numpy() / threshold >= 1)


@pytest.mark.parametrize("invalid", [1, [1], [0, 2]])
def test_logits_of_classes_become_the_probability_of_the_others(invalid):
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 1 - logits.softmax(1)[:, np.atleast_1d(invalid)].sum(1)
    score = ClassifierCriterion(lambda _: logits, threshold=0.25, invalid_class=invalid).score(torch.from_numpy(X))
    torch.testing.assert_close(score, expected / 0.25)


def test_the_score_of_a_sure_classifier_still_has_a_gradient():
    x = torch.zeros(2, 2).requires_grad_()
    score = ClassifierCriterion(lambda x: torch.stack([40 + x[:, 0], x[:, 1]], 1), invalid_class=0).score(x)
    (gradient,) = torch.autograd.grad(score.log().sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]] * 2))


def test_a_classifier_is_called_in_evaluation_mode_and_stays_as_it_was():
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 1), nn.Sigmoid())
    model[2].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    criterion = ClassifierCriterion(model)
    assert np.array_equal(criterion.is_valid(X), criterion.is_valid(X))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (lambda x: x, {}, "for the logits of classes, give invalid_class"),
        (lambda x: 3 * x[:, 0], {}, "End it in a sigmoid"),
        (lambda x: x, {"invalid_class": 2}, "n_classes > 2"),
        (lambda x: x[:, 0], {"threshold": 0}, "threshold must lie in"),
    ],
)
def test_what_a_classifier_returns_is_checked(model, settings, message):
    with pytest.raises(ValueError, match=message):
        ClassifierCriterion(model, **settings).is_valid(X)


def test_the_union_is_invalid_where_any_part_is():
    low = ClassifierCriterion(lambda x: torch.sigmoid(4 - 4 * x[:, 1]))
    union = AnyOf([is_right, low, X[:2]])
    expected = is_right(X) & low.is_valid(X)
    assert union.judges and union.is_differentiable
    assert np.array_equal(union.is_valid(X), expected)
    expected[:2] = False
    assert np.array_equal(union.keeps(X), expected)
    torch.testing.assert_close(union.score(torch.from_numpy(X)), low.score(torch.from_numpy(X)))
    np.testing.assert_array_equal(union.known().data, X[:2])


def test_the_score_of_a_union_is_that_of_its_least_satisfied_part():
    parts = [ClassifierCriterion(lambda x, k=k: x[:, k].sigmoid()) for k in range(2)]
    points = torch.from_numpy(X)
    expected = torch.minimum(*(part.score(points) for part in parts))
    torch.testing.assert_close(AnyOf(parts).score(points), expected)


def test_a_union_of_known_samples_alone_judges_nothing():
    union = AnyOf([X[:2], X[5:6]])
    assert not union.judges and not union.is_differentiable
    assert np.flatnonzero(~union.keeps(X)).tolist() == [0, 1, 5]
    assert len(union.known()) == 3 and AnyOf([is_right]).known() is None


@pytest.mark.parametrize("invalid", [None, 1, [0, 2]])
def test_a_step_of_the_refit_is_one_of_adam_on_the_binary_cross_entropy(invalid):
    torch.manual_seed(0)
    head = [nn.Linear(3, 1), nn.Sigmoid()] if invalid is None else [nn.Linear(3, 4)]
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), *head).double().requires_grad_(False)
    valid, invalid_samples = torch.full((3, 2), 0.3, dtype=torch.float64), torch.full((5, 2), -0.8, dtype=torch.float64)
    criterion = ClassifierCriterion(model, invalid_class=invalid, refit=CrossEntropyRefit(invalid, 3, 0.01, 8))
    found = criterion.refitted(valid, invalid_samples).model_
    plain = pickle.loads(pickle.dumps(model)).requires_grad_().eval()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(3):
        losses = []
        for samples, is_valid in ((valid[:1], True), (invalid_samples[:1], False)):
            p = plain(samples) if invalid is None else 1 - plain(samples).softmax(1)[:, np.atleast_1d(invalid)].sum(1)
            losses.append(-(p if is_valid else 1 - p).log().mean())
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(found.state_dict(), plain.state_dict(), rtol=1e-9, atol=1e-9)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_the_refit_moves_a_classifier_that_is_sure_and_wrong():
    sure = nn.Linear(2, 2).requires_grad_(False)
    nn.init.zeros_(sure.weight)
    sure.bias.copy_(torch.tensor([-60.0, 60.0]))
    criterion = ClassifierCriterion(sure, invalid_class=0, refit=CrossEntropyRefit(0, n_steps=400, lr=0.5))
    invalid = torch.tensor([[-1.0, 0.0]])
    assert criterion.score(invalid) > 1.9 and criterion.refitted(-invalid, invalid).score(invalid) < 0.1


def test_the_refit_trains_modules():
    with pytest.raises(ValueError, match=r"trains a torch\.nn\.Module"):
        ClassifierCriterion(torch.sigmoid, refit=CrossEntropyRefit()).refitted(torch.ones(2, 1), torch.zeros(2, 1))


def test_without_a_refit_nothing_learns():
    criterion = ClassifierCriterion(lambda x: x[:, 0].sigmoid())
    assert not criterion.learns and criterion.refitted(X, X) is criterion
    assert not AnyOf([criterion, is_right]).learns
    assert AnyOf([ClassifierCriterion(nn.Identity(), refit=print), is_right]).learns
