"""Redactors and baselines on a GAN of a Gaussian in the plane, of which a half-plane is redacted."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from torch.utils.data import TensorDataset

from ganclean import GANInfluence, GANTrainer, Update, train_gan
from ganclean.dynamics import capture
from ganclean.dynamics.network import loaded
from ganclean.exceptions import NetworkError, NonFiniteError
from ganclean.losses import GradientPenalty
from ganclean.optim import Adam
from ganclean.plotting import RedactionDisplay
from ganclean.recipes import gan
from ganclean.redaction import (
    AnyOf,
    ClassifierCriterion,
    CrossEntropyRefit,
    DeletionFineTuner,
    GANRedactor,
    RejectionSampler,
    RetrainingRedactor,
    SampleCriterion,
)
from ganclean.redaction.invalidity import Invalidity
from tests.practice import images
from tests.test_conditional import networks as conditional_networks

X = np.random.default_rng(0).normal(size=(512, 2)).astype(np.float32)


def is_valid(x):
    return x[:, 0] < 1


VALID = is_valid(X)
KNOWN = SampleCriterion(X[~VALID], match=is_valid)
SOFT = ClassifierCriterion(lambda x: torch.sigmoid(4 * (1 - x[:, 0])))


def trainer_of(n_epochs=3, **settings):
    return GANTrainer(n_epochs=n_epochs, latent_dim=2, optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), **settings)


@pytest.fixture(scope="module")
def pair():
    """A generator and a discriminator of a standard normal in the plane; a tenth of the samples is invalid."""
    return train_gan(X, trainer=trainer_of(40), random_state=5)


def redactor_of(pair, criterion=is_valid, kind=GANRedactor, **settings):
    return kind(*pair, criterion, **{"trainer": trainer_of(), "random_state": 0, "n_draws": 2000} | settings)


@pytest.fixture(scope="module")
def fitted(pair):
    """To be read and not changed."""
    return redactor_of(pair).fit(X)


def test_training_alone_ends_where_a_recorded_run_does():
    trainer = trainer_of(2)
    gan = GANInfluence(trainer=trainer, metric="mmd", random_state=0)
    seeds = gan._seeds()
    gan.fit(X[:100])
    initial = gan.trajectory_.state(0)
    networks = {
        "generator": loaded(gan.generator_, initial.module_values("G")),
        "discriminator": loaded(gan.discriminator_, initial.module_values("D")),
    }
    ours = train_gan(X[:100], **networks, trainer=trainer, random_state=seeds["training"])
    for one, other in zip(ours, (gan.generator_, gan.discriminator_)):
        assert all(torch.equal(one.state_dict()[name], p) for name, p in other.state_dict().items())


METHODS = {
    "data": (KNOWN, {}),
    "validity": (is_valid, {}),
    "penalty": (SOFT, {"method": "classifier"}),
    "guide": (SOFT, {"method": "classifier", "guide": "guide"}),
    "combined": (SOFT, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_redacts_more_than_deletion_with_the_same_steps(name, pair):
    criterion, settings = METHODS[name]
    redactor = redactor_of(pair, criterion, **settings).fit(X)
    deletion = redactor_of(pair, KNOWN, DeletionFineTuner).fit(X)
    assert redactor.n_steps_ == deletion.n_steps_
    assert redactor.invalidity_before_ == deletion.invalidity_before_
    assert redactor.invalidity_before_.rate > 0.08
    assert redactor.invalidity_after_.high < deletion.invalidity_after_.low < redactor.invalidity_before_.low


def test_invalidity_falls_with_lam(pair):
    rates = [float(redactor_of(pair, lam=lam).fit(X).invalidity_after_) for lam in (1.0, 0.8, 0.5)]
    assert rates[0] > rates[1] > rates[2] and rates[2] < 0.4 * rates[0]


def test_with_lam_one_and_no_classifier_redaction_is_deletion_to_the_last_bit(pair):
    redactor = redactor_of(pair, KNOWN, lam=1.0).fit(X)
    deletion = redactor_of(pair, KNOWN, DeletionFineTuner).fit(X)
    for name, parameter in deletion.generator_.state_dict().items():
        assert torch.equal(redactor.generator_.state_dict()[name], parameter)


def test_a_region_without_training_data_is_redacted_from_what_the_generator_produces(pair):
    redactor = redactor_of(pair, trainer=trainer_of(6)).fit(X[VALID])
    assert redactor.support_.all() and redactor.history_["n_negatives"][0] > 0
    assert redactor.invalidity_after_.rate < redactor.invalidity_before_.rate / 5


def test_invalidity_is_the_share_that_the_criterion_refuses(fitted):
    samples, labels = fitted.sample(50_000)
    assert labels is None and samples.shape == (50_000, 2)
    rate = 1 - is_valid(samples).mean()
    assert fitted.invalidity_after_.low <= rate <= fitted.invalidity_after_.high
    assert fitted.score() == 1 - fitted.invalidity_after_.rate


def test_every_judged_sample_is_counted(pair):
    judged = []

    def counting(x):
        judged.append(len(x))
        return is_valid(x)

    redactor = redactor_of(pair, counting, queries_per_epoch=70, n_draws=300).fit(X)
    assert redactor.n_queries_ == sum(judged) == 512 + (3 + 1) * 70 + 2 * 300
    assert redactor.history_["n_queries"] == [512 + 300 + 70 * (epoch + 1) for epoch in range(4)]
    assert redactor.history_["epoch"] == list(range(4))


def test_the_buffer_holds_what_was_refused_and_nothing_else(pair):
    redactor = redactor_of(pair, queries_per_epoch=100).fit(X)
    samples = redactor.buffer_.samples.numpy()
    assert not is_valid(samples).any()
    np.testing.assert_array_equal(samples[: (~VALID).sum()], X[~VALID])
    added = np.diff([(~VALID).sum(), *redactor.history_["n_negatives"]])
    np.testing.assert_allclose(added, 100 * np.array(redactor.history_["invalidity"]))


def test_known_samples_are_taken_once_though_they_are_in_the_data(pair):
    extra = np.array([[2.0, 0.0], [3.0, 0.0]], dtype=np.float32)
    known = SampleCriterion(np.r_[X[~VALID][:9], extra], match=is_valid)
    redactor = redactor_of(pair, known, trainer=trainer_of(1)).fit(X)
    assert len(redactor.buffer_) == (~VALID).sum() + 2
    assert redactor.method_ == "data" and np.isnan(redactor.history_["invalidity"]).all()


def test_training_stops_once_few_queries_are_invalid(pair):
    redactor = redactor_of(pair, trainer=trainer_of(50), target_invalidity=0.05).fit(X)
    *earlier, last = redactor.history_["invalidity"]
    assert last <= 0.05 < min(earlier) and redactor.n_steps_ < 50 * 7


@pytest.mark.parametrize("kind", [GANRedactor, DeletionFineTuner])
def test_the_given_networks_stay_as_they_were(kind, pair):
    before = [pickle.dumps(network.state_dict()) for network in pair]
    redactor_of(pair, kind=kind, trainer=trainer_of(1)).fit(X)
    assert [pickle.dumps(network.state_dict()) for network in pair] == before


def test_a_seed_determines_the_outcome(fitted, pair):
    again = clone(fitted).fit(X)
    other = clone(fitted).set_params(random_state=1).fit(X)
    state = fitted.generator_.state_dict()
    assert all(torch.equal(again.generator_.state_dict()[name], p) for name, p in state.items())
    assert not all(torch.equal(other.generator_.state_dict()[name], p) for name, p in state.items())
    assert np.array_equal(fitted.sample(9)[0], again.sample(9)[0])


def test_a_fitted_redactor_survives_pickling(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.sample(5)[0], fitted.sample(5)[0])
    assert again.get_params()["lam"] == 0.8 and not hasattr(clone(again), "generator_")


@pytest.mark.parametrize("container", [np.asarray, torch.from_numpy, lambda x: TensorDataset(torch.from_numpy(x))])
def test_the_function_and_the_user_see_the_container_that_the_data_came_in(container, pair):
    seen = set()

    def noting(x):
        seen.add(type(x))
        return is_valid(x)

    redactor = redactor_of(pair, noting, trainer=trainer_of(1)).fit(container(X))
    expected = np.ndarray if container is np.asarray else torch.Tensor
    assert seen == {expected} and type(redactor.sample(3)[0]) is expected


def test_rejected_samples_are_drawn_again(fitted, pair):
    assert is_valid(fitted.sample(777, reject=True)[0]).all()
    sampler = redactor_of(pair, kind=RejectionSampler).fit(X)
    samples, _ = sampler.sample(3000)
    assert len(samples) == 3000 and is_valid(samples).all()
    assert sampler.acceptance_rate_ == 1 - sampler.invalidity_before_.rate and sampler.n_steps_ == 0
    expected = fitted._sampler.step.generator.state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in sampler.generator_.state_dict().items())


def test_rejection_gives_up_where_nothing_is_valid(pair):
    sampler = redactor_of(pair, is_valid, RejectionSampler).fit(X)
    sampler.criterion_.function = lambda x: np.zeros(len(x), dtype=bool)
    with pytest.raises(RuntimeError, match="only 0 are valid"):
        sampler.sample(2)


def test_retraining_starts_anew_on_the_valid_data(pair):
    def make_networks():
        return tuple(nn.Sequential(*map(pickled_reset, network)) for network in pair)

    redactor = redactor_of(pair, KNOWN, RetrainingRedactor, make_networks=make_networks, trainer=trainer_of(1)).fit(X)
    assert redactor.support_.sum() == VALID.sum()
    assert not torch.allclose(redactor.generator_[0].weight, pair[0][0].weight, atol=0.1)
    with pytest.raises(NetworkError, match="generator of another architecture"):
        clone(redactor).set_params(make_networks=lambda: (nn.Linear(2, 2), pair[1])).fit(X)


def pickled_reset(layer):
    layer = pickle.loads(pickle.dumps(layer))
    if hasattr(layer, "reset_parameters"):
        layer.reset_parameters()
    return layer


def test_redactions_add_up(pair):
    low = AnyOf([is_valid, lambda x: x[:, 1] > -1])
    first = redactor_of(pair).fit(X)
    second = redactor_of((first.generator_, first.discriminator_), low, trainer=trainer_of(8)).fit(X)
    samples, _ = second.sample(4000)
    assert (samples[:, 0] >= 1).mean() < 0.03 and (samples[:, 1] <= -1).mean() < 0.05
    assert (second.support_ == (VALID & (X[:, 1] > -1))).all()


def test_ordinary_training_on_all_data_brings_the_region_back(fitted):
    onwards = DeletionFineTuner(
        fitted.generator_, fitted.discriminator_, np.array([[9.0, 9.0]]), trainer=trainer_of(20), random_state=0
    ).fit(X)
    relapsed = Invalidity.of(is_valid(onwards.sample(4000)[0]))
    assert relapsed.low > 3 * fitted.invalidity_after_.high


def test_what_a_cleanser_dropped_is_learned_from(pair):
    gan = GANInfluence(*pair, trainer=trainer_of(1), metric="mmd", n_remove=50, random_state=0).fit(X)
    redactor = redactor_of(pair, SampleCriterion.from_cleanser(gan), trainer=trainer_of(1)).fit(X)
    assert np.array_equal(redactor.support_, gan.support_) and len(redactor.buffer_) == 50
    assert np.isnan(redactor.invalidity_after_.rate) and str(redactor.invalidity_after_) == "not measured"


def test_conditional_networks_get_negatives_with_their_labels():
    y = np.arange(16) % 3
    points = X[:16].astype(float)
    trainer = GANTrainer(n_epochs=2, latent_dim=3, batch_size=8, conditional=True, penalty=GradientPenalty())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        redactor = GANRedactor(
            *conditional_networks(), lambda x: x[:, 0] < 0.5, trainer=trainer, random_state=0, n_draws=50
        ).fit(points, y)
        samples, labels = redactor.sample(6)
        assert samples.shape == (6, 2) and set(labels) <= {0, 1, 2}
        assert len(redactor.buffer_.labels) == len(redactor.buffer_)
        assert np.array_equal(redactor.buffer_.labels[: (points[:, 0] >= 0.5).sum()], y[points[:, 0] >= 0.5])
        with pytest.raises(ValueError, match=r"SampleCriterion\(samples, labels=\.\.\.\) needs labels too"):
            clone(redactor).set_params(criterion=points[:3]).fit(points, y)
        clone(redactor).set_params(criterion=SampleCriterion(points[:3], labels=y[:3])).fit(points, y)


def test_the_average_is_what_is_judged_and_returned(pair):
    redactor = redactor_of(pair, trainer=trainer_of(2, ema_decay=0.9)).fit(X)
    state = redactor.state_
    returned = dict(redactor.generator_.named_parameters())
    assert all(torch.equal(returned[name], p) for name, p in state.average.items())
    assert not all(torch.equal(returned[name], p) for name, p in state.generator.items())
    averaged = dict(redactor.ema_generator_.named_parameters())
    assert averaged.keys() == returned.keys() and all(torch.equal(returned[name], p) for name, p in averaged.items())


def test_without_an_average_there_is_no_averaged_generator(fitted):
    assert fitted.ema_generator_ is None


def soft_module():
    """A classifier that finds a sample the more valid, the farther it is to the left of 1."""
    model = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-4.0, 0.0]]))
        model[0].bias.fill_(4.0)
    return model


class Noting:
    """A refit that notes what it gets and moves the model by something random."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, valid, invalid):
        self.calls.append((model, valid.clone(), invalid.clone()))
        with torch.no_grad():
            model[0].bias += 0.1 * torch.rand(1)


def test_the_classifier_is_refitted_once_an_epoch_on_valid_data_and_on_what_was_refused(pair):
    noting = Noting()
    redactor = redactor_of(pair, ClassifierCriterion(soft_module(), refit=noting)).fit(X)
    assert redactor.method_ == "combined" and len(noting.calls) == redactor.history_["epoch"][-1] == 3
    for (_, valid, invalid), n_negatives in zip(noting.calls, redactor.history_["n_negatives"][1:]):
        assert {tuple(row) for row in valid.tolist()} == {tuple(row) for row in X[VALID].tolist()}
        assert torch.equal(invalid, redactor.buffer_.samples[:n_negatives])
        assert not is_valid(invalid).any()
    assert torch.equal(redactor.criterion_.model_[0].bias, noting.calls[-1][0][0].bias)


def test_valid_instances_are_valid_where_the_data_are_not_sifted_and_no_more_than_the_buffer_holds(pair):
    noting = Noting()
    settings = {"filter_retain": False, "buffer_size": 50, "trainer": trainer_of(1), "lam": 0.5}
    redactor_of(pair, ClassifierCriterion(soft_module(), refit=noting), **settings).fit(X)
    ((_, valid, invalid),) = noting.calls
    assert len(valid) == len(invalid) == 50 and is_valid(valid).all() and not is_valid(invalid).any()


@pytest.mark.parametrize("refit", [CrossEntropyRefit(lr=0.01), Noting()], ids=["cross-entropy", "own"])
def test_a_refit_leaves_the_users_classifier_alone_and_is_determined_by_the_seed(refit, pair):
    model = soft_module()
    before = pickle.dumps(model.state_dict())
    criterion = ClassifierCriterion(model, refit=refit)
    torch.manual_seed(1)
    one = redactor_of(pair, criterion).fit(X)
    torch.manual_seed(2)
    other = redactor_of(pair, criterion).fit(X)
    plain = redactor_of(pair, ClassifierCriterion(model)).fit(X)
    assert pickle.dumps(model.state_dict()) == before and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not hasattr(criterion, "model_") and one.criterion_ is not criterion
    for found in ("generator_", "discriminator_"):
        states = [getattr(redactor, found).state_dict() for redactor in (one, other, plain)]
        assert all(torch.equal(states[1][name], p) for name, p in states[0].items())
        assert not all(torch.equal(states[2][name], p) for name, p in states[0].items())
    assert pickle.loads(pickle.dumps(one)).invalidity_after_ == one.invalidity_after_


def test_only_the_score_is_refitted_and_samples_are_judged_as_before(pair):
    criterion = ClassifierCriterion(soft_module(), refit=lambda *_: nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()))
    redactor = redactor_of(pair, AnyOf([criterion, lambda x: x[:, 1] > -9]), trainer=trainer_of(1)).fit(X)
    refitted = redactor.criterion_.criteria[0]
    assert np.array_equal(redactor.criterion_.is_valid(X), criterion.is_valid(X))
    assert not torch.allclose(refitted.score(torch.from_numpy(X)), criterion.score(torch.from_numpy(X)))


def test_a_refitted_classifier_learns_what_another_judge_refuses(pair):
    model = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, 3.0)
    criterion = AnyOf([is_valid, ClassifierCriterion(model, refit=CrossEntropyRefit(n_steps=100, lr=0.1))])
    redactor = redactor_of(pair, criterion).fit(X)
    score = redactor.criterion_.score(torch.from_numpy(X)).numpy() / 2
    assert ((score >= 0.5) == VALID).mean() > 0.95


def test_without_data_the_generators_own_valid_samples_take_their_place(pair):
    with pytest.warns(UserWarning, match="which costs variety"):
        redactor = redactor_of(pair).fit()
    assert len(redactor.support_) == 2000
    assert redactor.invalidity_after_.rate < redactor.invalidity_before_.rate / 3
    with pytest.raises(ValueError, match="cannot judge samples"):
        redactor_of(pair, X[~VALID]).fit()


def test_unsifted_data_are_warned_of_with_the_residual_that_theory_predicts(pair):
    share = (~VALID).mean()
    with pytest.warns(UserWarning, match=f"keeps an invalidity of {(share - 0.05) / 0.95:.1%}") as warned:
        redactor = redactor_of(pair, lam=0.95, filter_retain=False, trainer=trainer_of(1)).fit(X)
    assert len(warned) == 1 and redactor.support_.all() and len(redactor.buffer_) > (~VALID).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        redactor_of(pair, lam=0.5, filter_retain=False, trainer=trainer_of(1)).fit(X)


@pytest.mark.parametrize(
    ("criterion", "settings", "message"),
    [
        (X[~VALID][:19], {}, "Only 19 samples of the region are known"),
        (lambda x: x[:, 0] < -1, {}, r"[78]\d% of the samples are invalid"),
        (lambda x: x[:, 0] < 9, {}, "Hardly anything is there to redact"),
    ],
)
def test_what_is_known_to_fail_is_warned_of(criterion, settings, message, pair):
    with pytest.warns(UserWarning, match=message) as warned:
        redactor_of(pair, criterion, trainer=trainer_of(1), **settings).fit(X)
    assert len(warned) == 1


@pytest.mark.parametrize("criterion", [is_valid, KNOWN, SOFT, X[~VALID][:20]])
def test_what_is_not_known_to_fail_is_not_warned_of(criterion, pair):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        redactor_of(pair, criterion, trainer=trainer_of(1)).fit(X)


@pytest.mark.parametrize(
    ("criterion", "settings", "message"),
    [
        (is_valid, {"method": "gradient"}, "method must be one of"),
        (is_valid, {"guide": "both"}, "guide must be one of"),
        (is_valid, {"lam": 0}, r"lam must lie in \(0, 1\]"),
        (is_valid, {"lam": 1.2}, r"lam must lie in \(0, 1\]"),
        (is_valid, {"queries_per_epoch": 0}, "queries_per_epoch must be a positive integer"),
        (is_valid, {"buffer_size": 1.5}, "buffer_size must be a positive integer"),
        (is_valid, {"label_smoothing": (0.5, 0)}, "label_smoothing must be two numbers"),
        (is_valid, {"target_invalidity": 2}, "target_invalidity must be None or lie in"),
        (X[~VALID], {"target_invalidity": 0.1}, "target_invalidity needs a criterion that judges"),
        (is_valid, {"trainer": "adam"}, "trainer must be a GANTrainer"),
        (is_valid, {"method": "combined"}, "needs a criterion with a differentiable score"),
        (
            ClassifierCriterion(soft_module(), refit=CrossEntropyRefit()),
            {"method": "classifier"},
            "refit learns from samples of the region",
        ),
        (ClassifierCriterion(soft_module(), refit="adam"), {}, "refit must be a function"),
        (X[~VALID], {"method": "validity"}, "needs a criterion that judges samples"),
        (lambda x: x[:, 0] < 99, {"method": "data"}, "has nothing to learn from"),
        (lambda x: x[:, 0] > 99, {}, "Only 0 of 512 training instances are valid"),
        (None, {}, "criterion must say what is not to be generated"),
    ],
)
def test_what_cannot_be_redacted_is_said_before_anything_is_trained(criterion, settings, message, pair):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
        warnings.simplefilter("ignore")
        redactor_of(pair, criterion, **settings).fit(X)


def test_objectives_of_ones_own_are_refused_before_anything_is_judged(pair):
    judged = []

    def hinge(nets, batch, weights):
        return (weights * torch.relu(1 - nets.D(batch.x).flatten())).mean()

    trainer = GANTrainer(updates=[Update("D", hinge, Adam()), gan()[1]], latent_dim=2)
    with pytest.raises(ValueError, match=r"there is none among the updates \(D: hinge, G: GeneratorObjective\)"):
        redactor_of(pair, judged.append, trainer=trainer).fit(X)
    assert not judged


def test_the_updates_of_the_usual_gan_are_redacted_like_its_settings(fitted, pair):
    rule = Adam(lr=1e-3, betas=(0.5, 0.99))
    trainer = GANTrainer(updates=gan(optimizer_g=rule, optimizer_d=rule), n_epochs=3, latent_dim=2)
    again = redactor_of(pair, trainer=trainer).fit(X)
    assert all(torch.equal(again.generator_.state_dict()[n], p) for n, p in fitted.generator_.state_dict().items())


@pytest.mark.parametrize("name", ["validity", "penalty", "refit"])
def test_compiled_steps_redact_alike(name, pair, monkeypatch):
    # Graphs are captured, but run as they are: to translate one to machine code takes half a minute.
    monkeypatch.setattr(capture.torch, "compile", lambda module, **_: module)
    logits = nn.Linear(2, 2)
    refit = {"criterion": ClassifierCriterion(logits, invalid_class=0, refit=CrossEntropyRefit(0, lr=0.1))}
    settings = {"validity": {}, "penalty": {"criterion": SOFT, "method": "classifier"}, "refit": refit}[name]
    plain, compiled = (redactor_of(pair, trainer=trainer_of(2, compile=c), **settings).fit(X) for c in (False, True))
    for name, p in plain.generator_.state_dict().items():
        torch.testing.assert_close(compiled.generator_.state_dict()[name], p, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Hardly anything")
def test_latents_are_those_of_the_training(pair):
    def uniform(n):
        return torch.rand(n, 2)

    seen = []
    generator = nn.Sequential(nn.Identity(), pair[0])
    generator[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    redactor = redactor_of((generator, pair[1]), trainer=trainer_of(1, latents=uniform), queries_per_epoch=50).fit(X)
    redactor.sample(100)
    assert seen and all(((z >= 0) & (z <= 1)).all() for z in seen)


@pytest.mark.parametrize("kind", [GANRedactor, DeletionFineTuner])
def test_both_networks_are_needed(kind, pair):
    with pytest.raises(NetworkError, match=r"discriminator must be a trained torch\.nn\.Module; got None"):
        kind(pair[0], None, is_valid).fit(X)
    with pytest.raises(NetworkError, match="generator must be a trained"):
        kind(None, pair[1], is_valid).fit(X)


def test_divergence_is_an_error_and_leaves_the_redactor_unfitted(fitted):
    broken = clone(fitted).set_params(trainer__optimizer__lr=1e30)
    with pytest.raises(NonFiniteError, match="Training diverged"):
        broken.fit(X)
    assert not hasattr(broken, "state_")


def test_a_report_tells_what_was_gained_and_what_was_paid(fitted):
    reference = np.random.default_rng(1).normal(size=(400, 2)).astype(np.float32)
    reference = reference[is_valid(reference)]
    report = fitted.report(reference, evaluator=lambda x: x[:, 0] < 1.5, n=1000)
    assert report.invalidity == (fitted.invalidity_before_, fitted.invalidity_after_)
    before, after, floor = report.evaluated
    assert before.rate > after.rate and floor.rate == 0 and before.n_samples == 1000
    assert report.reduction == 1 - after.rate / before.rate
    drawn = fitted.before_and_after(1000)
    assert before.rate == pytest.approx(float((drawn[0][:, 0] >= 1.5).float().mean()))
    assert report.recall_drop == report.quality[0]["recall"] - report.quality[1]["recall"]
    assert report.to_dict()["n_queries"] == fitted.n_queries_
    lines = str(report).splitlines()
    assert lines[0].split() == ["before", "after"] and "invalidity by the evaluator" in lines[2]
    assert str(after) in str(report) and f"{fitted.n_steps_} training steps" in lines[-1]


def test_lost_variety_is_warned_of(fitted):
    collapsed = pickle.loads(pickle.dumps(fitted))
    params = {**fitted.state_.params, "G": {name: 0 * p for name, p in fitted.state_.generator.items()}}
    collapsed.state_ = fitted.state_._replace(params=params)
    with pytest.warns(UserWarning, match="the generator has lost variety"):
        collapsed.report(X[VALID])


def test_a_display_frames_what_is_invalid():
    pictures, _ = images(32)
    before, after = pictures[:16, :1], pictures[16:, :1]
    invalid = np.zeros((2, 16), dtype=bool)
    invalid[0, :3] = invalid[1, 9] = True
    axes = RedactionDisplay(before, after, invalid, n_columns=8).plot().axes_
    assert axes.shape == (4, 8)
    framed = {(row, column) for row in range(4) for column in range(8) if axes[row, column].spines["top"].get_visible()}
    assert framed == {(0, 0), (0, 1), (0, 2), (3, 1)}
    shown = axes[3, 1].images[0].get_array()
    np.testing.assert_allclose(shown, (after[9, 0] + 1) / 2)


@pytest.mark.parametrize(("n", "k"), [(4000, 20), (50, 0), (7, 7)])
def test_the_interval_of_an_invalidity_is_wilsons(n, k):
    found = Invalidity.of(np.arange(n) >= k)
    z, p = 1.959963984540054, k / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (found.rate, found.low, found.high) == pytest.approx((p, middle - half, middle + half), abs=1e-12)
