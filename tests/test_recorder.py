"""A user's own training loop, recorded, proven by replay, and traced."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from ganclean import GANInfluence, Recorder
from ganclean.backends import ITD
from ganclean.dynamics.state import flatten_state
from ganclean.exceptions import GANCleanError, NetworkError, ReplayMismatchError, TrajectoryError
from ganclean.losses import R1, GradientPenalty, NonSaturating
from ganclean.metrics import FID
from tests.loops import DCGAN, WGANGP
from tests.reference.finite_differences import STENCIL

DECLARED = {
    DCGAN: {"loss": NonSaturating(outputs="probabilities")},
    WGANGP: {"loss": "wasserstein", "penalty": GradientPenalty()},
}


def images(n=24, dtype=torch.float64):
    return torch.from_numpy(np.tanh(np.random.default_rng(0).normal(size=(n, 1, 8, 8)))).to(dtype)


def some_pixels(x):
    return x.flatten(1)[:, 20:26]


def parts(loop):
    if isinstance(loop, DCGAN):
        return loop.netG, loop.netD, loop.optimizerG, loop.optimizerD
    return loop.generator, loop.discriminator, loop.optimizer_G, loop.optimizer_D


def recorder_of(loop, **settings):
    return Recorder(*parts(loop), **({"checkpoint_every": 1, "random_state": 0} | DECLARED[type(loop)] | settings))


def trained(make_loop, recorded=True, weights=None, dtype=torch.float64, **settings):
    """Run a loop from the same seeds; return it and its recorder."""
    loop = make_loop(dtype)
    recorder = recorder_of(loop, **settings.pop("recorder", {})) if recorded else None
    torch.manual_seed(1)
    loop.train(images(dtype=dtype), recorder, weights, **settings)
    return loop, recorder


def replayed_from_the_start(trajectory):
    state = trajectory.store.state(0)
    for t in range(len(trajectory)):
        state = trajectory.replay(state, t)
    return state


def cleanser_of(recorder, data=None, backend=None):
    metric = FID(some_pixels, n_samples=60)
    cleanser = GANInfluence(metric=metric, backend=backend or ITD(derivative="exact"), random_state=0)
    return cleanser.fit(images() if data is None else data, trajectory=recorder.finish())


LOOPS = [DCGAN, WGANGP, lambda dtype: WGANGP(dtype, dropout=0.3)]


@pytest.mark.parametrize("make_loop", LOOPS, ids=["dcgan", "wgan-gp", "dropout"])
def test_replaying_all_steps_gives_what_the_loop_trained(make_loop):
    loop, recorder = trained(make_loop)
    generator, discriminator, *_ = parts(loop)
    cleanser = cleanser_of(recorder)
    final = replayed_from_the_start(cleanser.trajectory_)
    # A bias in front of batch normalisation has a gradient of rounding errors, which Adam makes steps of.
    for module, params in ((generator, final.generator), (discriminator, final.discriminator)):
        for name, p in module.named_parameters():
            torch.testing.assert_close(params[name], p.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final.buffers["G"], dict(generator.named_buffers()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make_loop", LOOPS[:2], ids=["dcgan", "wgan-gp"])
def test_influence_is_the_derivative_in_the_weights_of_the_users_own_loop(make_loop):
    _, recorder = trained(make_loop)
    cleanser = cleanser_of(recorder)
    evaluator, width = cleanser.evaluator(60), 1e-4

    def value(weights):
        generator = parts(trained(make_loop, recorded=False, weights=weights)[0])[0].eval()
        with torch.no_grad():
            return float(cleanser.metric_(generator(evaluator.latents)))

    rows = [0, 7, 15, 23]
    expected = np.zeros(len(rows))
    for place, row in enumerate(rows):
        for offset, factor in STENCIL.items():
            weights = torch.ones(24, dtype=torch.float64)
            weights[row] += offset * width
            expected[place] -= factor / width * value(weights)
    np.testing.assert_allclose(cleanser.influence_[rows], expected, rtol=1e-4)
    secant = cleanser_of(recorder, backend=ITD(delta=1e-4))
    np.testing.assert_allclose(secant.influence_[rows], expected, rtol=1e-2)


@pytest.mark.parametrize("make_loop", LOOPS[:2], ids=["dcgan", "wgan-gp"])
def test_a_recorded_loop_computes_what_it_computes_alone(make_loop):
    alone, recorded = trained(make_loop, recorded=False)[0], trained(make_loop)[0]
    for a, b in zip(parts(alone)[:2], parts(recorded)[:2]):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key]), key
        assert not b._forward_hooks and not b._forward_pre_hooks


def test_randomness_in_the_networks_leaves_the_loops_own_random_numbers_alone():
    def last_number(dropout, recorded):
        trained(lambda dtype: WGANGP(dtype, dropout=dropout), recorded=recorded)
        return float(torch.rand(()))

    assert last_number(0.3, recorded=True) == last_number(0.0, recorded=False)


def test_hyper_parameters_of_a_scheduler_are_read_in_every_step():
    loop = WGANGP()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.optimizer_D, gamma=0.5)
    recorder = recorder_of(loop)
    for _ in range(3):
        loop.train(images(8), recorder, n_epochs=1)
        scheduler.step()
    trajectory = cleanser_of(recorder, images(8)).trajectory_
    assert [trajectory[t].of("D").settings.get("lr", 5e-3) for t in range(3)] == [5e-3, 2.5e-3, 1.25e-3]
    params = replayed_from_the_start(trajectory).discriminator
    for name, p in loop.discriminator.named_parameters():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_a_loop_that_has_been_running_is_recorded_from_where_it_is():
    loop = DCGAN()
    loop.train(images(), n_epochs=2)
    recorder = recorder_of(loop)
    loop.train(images(), recorder, n_epochs=1)
    trajectory = cleanser_of(recorder).trajectory_
    assert trajectory[0].of("D").number == trajectory[0].of("G").number == 7
    final = replayed_from_the_start(trajectory)
    torch.testing.assert_close(
        final.discriminator, {n: p.detach() for n, p in loop.netD.named_parameters()}, rtol=1e-6, atol=1e-8
    )


def test_sampling_in_training_mode_between_steps_is_recorded():
    loop, recorder = trained(DCGAN, sample_every=2)
    trajectory = cleanser_of(recorder).trajectory_
    shifted = [t for t in range(len(trajectory)) if trajectory[t].shifts]
    assert shifted == [2, 4]
    final = replayed_from_the_start(trajectory)
    # The last sampling comes after the last step.
    loop, recorder = trained(DCGAN, sample_every=4)
    final = replayed_from_the_start(cleanser_of(recorder).trajectory_)
    torch.testing.assert_close(final.buffers["G"], dict(loop.netG.named_buffers()), rtol=1e-9, atol=1e-12)


class Simple:
    """The shortest loop there is, to be spoiled."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.G = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.D = nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1)).double()
        self.opt_g = torch.optim.Adam(self.G.parameters(), lr=1e-2, betas=(0.5, 0.9))
        self.opt_d = torch.optim.SGD(self.D.parameters(), lr=1e-2, momentum=0.9)
        self.ema = copy.deepcopy(self.G)
        self.X = torch.randn(16, 2, dtype=torch.float64)

    def recorder(self, **settings):
        return Recorder(self.G, self.D, self.opt_g, self.opt_d, **settings)

    def train(self, recorder, spoil="", n_steps=4, update="alternating"):
        for t in range(n_steps):
            index = torch.arange(8) + 8 * (t % 2)
            x, z = self.X[index], torch.randn(8, 3, dtype=torch.float64)
            with recorder.step(x, index, z_d=z + 1 if spoil == "latents" else None):
                if spoil == "augmentation":
                    x = x + 0.1 * torch.randn_like(x)
                if spoil == "real slope" or spoil == "undeclared slope":
                    x = x.requires_grad_()
                fake = self.G(z)
                if spoil == "joint":
                    real, judged = self.D(torch.cat([x, fake.detach()])).split(8)
                else:
                    real, judged = self.D(x), self.D(fake.detach())
                loss = softplus(-real).mean() * (0.9 if spoil == "smoothing" else 1.0) + softplus(judged).mean()
                if spoil in ("real slope", "undeclared slope"):
                    slope = torch.autograd.grad(real.sum(), x, create_graph=True)[0]
                    loss = loss + 0.5 * slope.square().sum(1).mean()
                self.opt_d.zero_grad()
                loss.backward()
                if spoil == "clipping":
                    nn.utils.clip_grad_norm_(self.D.parameters(), 0.1)
                if update == "alternating":
                    self.opt_d.step()
                if spoil == "monitoring":
                    self.D(x)
                self.opt_g.zero_grad()
                gradients = torch.autograd.grad(softplus(-self.D(fake)).mean(), list(self.G.parameters()))
                for p, gradient in zip(self.G.parameters(), gradients):
                    p.grad = gradient
                if spoil == "clipping":
                    nn.utils.clip_grad_norm_(self.G.parameters(), 0.1)
                if update == "simultaneous":
                    self.opt_d.step()
                self.opt_g.step()
                if spoil == "second update":
                    self.opt_d.step()
                if spoil == "weights":
                    with torch.no_grad():
                        for p in self.D.parameters():
                            p.clamp_(-0.1, 0.1)
                with torch.no_grad():
                    for old, new in zip(self.ema.parameters(), self.G.parameters()):
                        old.lerp_(new, 0.2)
        return recorder


@pytest.mark.parametrize(
    "settings, spoil",
    [
        ({}, ""),
        ({"penalty": R1(gamma=1.0)}, "real slope"),
        ({"clip_norm": 0.1}, "clipping"),
        ({"ema_decay": 0.8}, ""),
    ],
    ids=["plain", "r1", "clipping", "moving average"],
)
def test_what_is_declared_is_replayed_to_rounding(settings, spoil):
    loop = Simple()
    if "ema_decay" in settings:
        settings = settings | {"ema": loop.ema}
    trajectory = loop.train(loop.recorder(**settings), spoil).finish()
    cleanser = GANInfluence(metric=FID(n_samples=50), random_state=0).fit(loop.X, trajectory=trajectory)
    final = replayed_from_the_start(cleanser.trajectory_)
    for params, module in ((final.generator, loop.G), (final.discriminator, loop.D), (final.average, loop.ema)):
        for name, value in params.items():
            torch.testing.assert_close(value, module.get_parameter(name).detach(), rtol=1e-9, atol=1e-12)


def test_a_simultaneous_loop_is_replayed():
    loop = Simple()
    recorder = loop.train(loop.recorder(update="simultaneous"), update="simultaneous")
    trajectory = GANInfluence(random_state=0).fit(loop.X, trajectory=recorder.finish()).trajectory_
    torch.testing.assert_close(
        replayed_from_the_start(trajectory).generator, {n: p.detach() for n, p in loop.G.named_parameters()}
    )


@pytest.mark.parametrize(
    "spoil, tensor, looks_like",
    [
        ("smoothing", "the gradient of D", "0.9 times the real instances' terms, 1 times the generated"),
        ("undeclared slope", "the gradient of D", r"pass penalty=R1\(gamma=1\)"),
        ("clipping", "the gradient of D", "pass clip_norm=0.1"),
        ("weights", "params/D/", r"clips the discriminator's weights to ±0.1 .*after=lambda"),
    ],
)
def test_what_is_not_declared_is_found_at_once_and_named(spoil, tensor, looks_like):
    loop = Simple()
    with pytest.raises(ReplayMismatchError, match=rf"step 0 .*{tensor}.* deviates by .*{looks_like}"):
        loop.train(loop.recorder(), spoil)


def test_another_loss_is_found_at_once():
    loop = Simple()
    with pytest.raises(ReplayMismatchError, match="another loss: pass loss='non_saturating'"):
        loop.train(loop.recorder(loss="least_squares"))


def test_another_decay_of_the_average_is_found_at_once():
    loop = Simple()
    with pytest.raises(ReplayMismatchError, match=r"averages/G/.* has a decay of 0.8 in this step; declared is 0.9"):
        loop.train(loop.recorder(ema=loop.ema, ema_decay=0.9))


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        ("augmentation", NetworkError, "augmentation belongs into the discriminator"),
        ("second update", NetworkError, "updated twice"),
        ("latents", ReplayMismatchError, "z_d of step 0"),
    ],
)
def test_a_step_that_is_not_one_is_refused_with_advice(spoil, error, message):
    loop = Simple()
    with pytest.raises(error, match=message):
        loop.train(loop.recorder(), spoil)
    # The hooks are gone, and the user may go on without recording.
    loop.D(loop.X)


@pytest.mark.parametrize("spoil", ["joint", "monitoring"])
def test_what_is_no_difference_is_none(spoil):
    loop = Simple()
    trajectory = loop.train(loop.recorder(), spoil).finish()
    cleanser = GANInfluence(metric=FID(n_samples=50), random_state=0).fit(loop.X, trajectory=trajectory)
    final = replayed_from_the_start(cleanser.trajectory_)
    for params, module in ((final.generator, loop.G), (final.discriminator, loop.D)):
        for name, value in params.items():
            torch.testing.assert_close(value, module.get_parameter(name).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_the_other_order_of_updates_is_named(update):
    loop = Simple()
    other = {"alternating": "simultaneous", "simultaneous": "alternating"}[update]
    with pytest.raises(NetworkError, match=f"update='{update}'"):
        loop.train(loop.recorder(update=other), update=update)


def test_an_empty_step_and_an_index_of_another_length_are_refused():
    loop = Simple()
    recorder = loop.recorder()
    with pytest.raises(NetworkError, match="did: nothing"), recorder.step(loop.X[:8], torch.arange(8)):
        pass
    with pytest.raises(ValueError, match="names 7 rows, but x holds 8"), recorder.step(loop.X[:8], torch.arange(7)):
        pass
    with pytest.raises(TrajectoryError, match="Nothing was recorded"):
        recorder.finish()


def test_the_length_of_an_epoch_is_found():
    loop = Simple()
    assert loop.train(loop.recorder(), n_steps=5).finish().steps_per_epoch == 2


def test_other_data_are_refused():
    loop = Simple()
    trajectory = loop.train(loop.recorder()).finish()
    for X in (loop.X.flip(0), loop.X[:12], loop.X * 2):
        with pytest.raises(TrajectoryError, match="other data"):
            GANInfluence(random_state=0).fit(X, trajectory=trajectory)


def test_networks_beside_a_recorded_loop_are_refused():
    loop = Simple()
    trajectory = loop.train(loop.recorder()).finish()
    with pytest.raises(ValueError, match="brings its networks along"):
        GANInfluence(loop.G, loop.D).fit(loop.X, trajectory=trajectory)


def test_the_folder_gives_the_same_influences_as_memory(tmp_path):
    expected = cleanser_of(trained(DCGAN)[1]).influence_
    _, recorder = trained(DCGAN, recorder={"store": tmp_path, "checkpoint_every": 4})
    assert np.allclose(cleanser_of(recorder).influence_, expected, rtol=1e-9)
    again = recorder_of(DCGAN(), store=tmp_path).load()
    fitted = GANInfluence(metric=FID(some_pixels, n_samples=60), backend=ITD(derivative="exact"), random_state=0)
    assert np.allclose(fitted.fit(images(), trajectory=again).influence_, expected, rtol=1e-9)


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    trained(DCGAN, recorder={"store": tmp_path})[1].finish()
    with pytest.raises(TrajectoryError):
        trained(DCGAN, recorder={"store": tmp_path})
    with pytest.raises(TrajectoryError, match="another model"):
        recorder_of(WGANGP(), store=tmp_path).load()


@pytest.mark.parametrize("make_loop", LOOPS[:2], ids=["dcgan", "wgan-gp"])
def test_rare_checkpoints_in_single_precision_predict_the_same(make_loop):
    def influence(every):
        _, recorder = trained(make_loop, dtype=torch.float32, recorder={"checkpoint_every": every})
        return cleanser_of(recorder, images(dtype=torch.float32), ITD()).influence_

    expected, found = influence(1), influence(3)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_loop_that_changes_later_on_is_found_where_the_states_are_recomputed():
    loop = Simple()
    recorder = loop.recorder(checkpoint_every=10, n_checked=2)
    loop.train(recorder, n_steps=5)
    loop.train(recorder, "weights", n_steps=5)
    with pytest.raises(ReplayMismatchError, match=r"up to step 10 .*discriminator"):
        GANInfluence(random_state=0).fit(loop.X, trajectory=recorder.finish())


class Killed(Exception):
    pass


@pytest.mark.parametrize("every", [1, 2])
def test_an_interrupted_recording_goes_on_where_it_was(tmp_path, every):
    expected, recorder = trained(DCGAN)
    undisturbed = cleanser_of(recorder)
    interrupted = DCGAN()
    recorder = recorder_of(interrupted, store=tmp_path, checkpoint_every=every)

    def dying(step, *args):
        if len(recorder) == 3:
            raise Killed
        return step(*args)

    whole = recorder.step
    recorder.step = lambda *args: dying(whole, *args)
    torch.manual_seed(1)
    with pytest.raises(Killed):
        interrupted.train(images(), recorder)
    with pytest.raises(TrajectoryError, match="not finished"):
        GANInfluence(random_state=0).fit(images(), trajectory=tmp_path)
    again = DCGAN(seed=7)
    recorder = recorder_of(again, store=tmp_path, checkpoint_every=every)
    start = recorder.resume()
    assert start == 3 - 3 % every
    torch.manual_seed(1)
    again.train(images(), recorder, start=start)
    for key, value in expected.netG.state_dict().items():
        torch.testing.assert_close(again.netG.state_dict()[key], value, rtol=1e-9, atol=1e-12)
    assert np.allclose(cleanser_of(recorder).influence_, undisturbed.influence_, rtol=1e-8)


def test_a_small_budget_thins_the_states_out_and_changes_no_number():
    _, full = trained(DCGAN, n_epochs=8)
    states = [flatten_state(full._store.state(0))]
    size = sum(tensor.nbytes for tensor in states[0].values())
    _, thinned = trained(DCGAN, n_epochs=8, recorder={"checkpoint_every": "auto", "memory_budget": 6 * size})
    expected, cleanser = cleanser_of(full), cleanser_of(thinned)
    assert len(full._store.kept()) == 25 and len(thinned._store.kept()) <= 7
    assert np.allclose(cleanser.influence_, expected.influence_, rtol=1e-9)


def test_all_errors_of_the_recorder_are_of_one_family():
    assert issubclass(ReplayMismatchError, GANCleanError) and issubclass(NetworkError, GANCleanError)
