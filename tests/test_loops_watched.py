"""Loops of the usual GAN in the ways in which people really write them: recorded unchanged, replayed, and traced."""

from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import softplus

from ganclean import GANInfluence, Recorder
from ganclean.backends import ITD
from ganclean.exceptions import NetworkError, ReplayMismatchError, TrajectoryError
from ganclean.metrics import FID
from ganclean.validation import counterfactual_retrain
from tests.reference.finite_differences import STENCIL
from tests.watched_shapes import (
    DTYPE,
    LATENT,
    SHAPES,
    AugmentedBefore,
    Clipped,
    ClippedOutside,
    GeneratorFirst,
    Groups,
    Joined,
    Loop,
    Mixing,
    N,
    OtherLatents,
    codes,
    fitted,
    normal,
    perceptron,
    points,
    sphere,
    tensors_of,
    trained,
    uniform,
)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_loop_is_replayed_as_it_was(shape):
    loop, recorder = trained(SHAPES[shape])
    cleanser = fitted(loop, recorder.finish())
    state = cleanser.trajectory_.store.state(0)
    for t in range(len(cleanser.trajectory_)):
        state = cleanser.trajectory_.replay(state, t)
    for player, module in (("G", loop.G), ("D", loop.D)):
        found = state.params[player] | state.buffers[player]
        # What is called after the last step belongs to the time after it.
        expected = tensors_of(module) | (
            cleanser.trajectory_.state(6).buffers[player] if shape == "monitored after" else {}
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    replayed = counterfactual_retrain(cleanser, [[]])[0]
    assert abs(replayed - cleanser.metric_value_) < 1e-6 * abs(cleanser.metric_value_)
    assert cleanser.trajectory_.steps_per_epoch == -(-N // loop.batch_size)


# By how much calls between the steps change buffers is taken for a constant.
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "monitored after"])
def test_influence_is_the_derivative_in_the_weights_of_the_users_own_loop(shape):
    loop, recorder = trained(SHAPES[shape])
    trajectory = recorder.finish()
    cleanser = fitted(loop, trajectory)
    evaluator, final = cleanser.evaluator(60), cleanser.trajectory_.state(len(cleanser.trajectory_))
    width, rows = 1e-4, [0, 5, 11]

    def value(weights):
        other = trained(SHAPES[shape], recorded=False, weights=weights)[0]
        held = tensors_of(other.G)
        state = final._replace(
            params=final.params | {"G": {n: held[n] for n in final.params["G"]}},
            buffers=final.buffers | {"G": {n: held[n] for n in final.buffers["G"]}},
            averages={"G": {n: tensors_of(other.ema)[n] for n in final.averages["G"]}} if final.averages else {},
        )
        return evaluator.value(cleanser.metric_, state)

    expected = np.zeros(len(rows))
    for place, row in enumerate(rows):
        for offset, factor in STENCIL.items():
            weights = torch.ones(N, dtype=DTYPE)
            weights[row] += offset * width
            expected[place] -= factor / width * value(weights)
    np.testing.assert_allclose(cleanser.influence_[rows], expected, rtol=1e-4)
    secant = fitted(loop, trajectory, ITD(delta=1e-4))
    np.testing.assert_allclose(secant.influence_[rows], expected, rtol=1e-2)


def test_clipping_outside_of_the_block_is_found_and_named():
    with pytest.raises(ReplayMismatchError, match=r"Between step 0 and step 1, outside .*D\.0\.weight.* after=lambda"):
        trained(ClippedOutside)


def test_weights_that_are_clipped_after_the_last_step_are_found():
    loop, recorder = trained(Clipped)
    with torch.no_grad():
        loop.D[0].weight.mul_(0.5)
    recorder._store.discard(len(recorder))
    with pytest.raises(ReplayMismatchError, match=r"D\.0\.weight"):
        recorder.finish()


class NoisyLabels(Loop):
    """Shape 22: labels are smoothed by random numbers."""

    def update_d(self, x, w, fake):
        self.opt_d.zero_grad()
        target = 0.7 + 0.5 * torch.rand(len(x), 1, dtype=DTYPE)
        (bce(self.D(x), target) + softplus(self.D(fake.detach())).mean()).backward()
        self.opt_d.step()


class SmoothedLabels(Loop):
    def update_d(self, x, w, fake):
        self.opt_d.zero_grad()
        (bce(self.D(x), torch.full((len(x), 1), 0.9).double()) + softplus(self.D(fake.detach())).mean()).backward()
        self.opt_d.step()


class Accumulating(Loop):
    """Shape 30: gradients are never cleared."""

    def update_d(self, x, w, fake):
        (softplus(-self.D(x)).mean() + softplus(self.D(fake.detach())).mean()).backward()
        self.opt_d.step()


class Decayed(Loop):
    def update_g(self, fake):
        self.opt_g.zero_grad()
        penalty = 0.01 * sum(p.square().sum() for p in self.G.parameters()) / 2
        (softplus(-self.D(fake)).mean() + penalty).backward()
        self.opt_g.step()


class Scaled(Loop):
    factor = 1024.0

    def update_g(self, fake):
        self.opt_g.zero_grad()
        (self.factor * softplus(-self.D(fake)).mean()).backward()
        self.opt_g.step()


class Halved(Scaled):
    factor = 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        (NoisyLabels, r"trains 'D' and judges real, fake.* a term of the loss was not declared .*noise on labels"),
        (
            SmoothedLabels,
            "0.9 times the real .* 1 times the generated .* 0.1 times real instances labelled as generated",
        ),
        (Accumulating, r"step 1 .*added to it: .*zero_grad"),
        (Decayed, r"trains 'G'.* weight_decay=0\.01"),
        (Scaled, "1024 times the declared .*precision"),
        (Halved, r"0\.5 times the declared one: pass scale=\{'G': 0\.5\}"),
        (GeneratorFirst, r"0\.5 times the declared one: pass scale=0\.5"),
    ],
)
def test_what_a_loop_does_beside_what_is_declared_is_told(make, message):
    with pytest.raises(ReplayMismatchError, match=message) as error:
        trained(make, **({"scale": 1.0} if make is GeneratorFirst else {}))
    assert "0.0%" not in str(error.value)


class Autocast(Loop):
    """Shape 26."""

    def step(self, x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            super().step(x, w)


class Skipping(Loop):
    """Shape 26: a scaler that leaves steps out."""

    def update_d(self, x, w, fake):
        softplus(self.D(x)).mean().backward()

    def update_g(self, fake):
        pass


class Buffered(Loop):
    """Shape 30: samples of earlier steps are judged."""

    old = None

    def step(self, x, w):
        fake = self.G(normal(len(x))).detach()
        self.update_d(x, w, fake if self.old is None else self.old)
        self.old = fake


class Apart(Loop):
    """A part of the generator is called by itself."""

    def step(self, x, w):
        fake = self.G[2](self.G[1](self.G[0](normal(len(x)))))
        self.update_d(x, w, fake)


class Headed(Loop):
    """Shape 13: the discriminator has a second output."""

    def networks(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.one, self.two = nn.Linear(2, 6), nn.Linear(6, 1), nn.Linear(6, 3)

            def forward(self, x):
                h = softplus(self.body(x))
                return self.one(h), self.two(h)

        return perceptron(LATENT, 6, 2), Two().double()

    def step(self, x, w):
        self.opt_d.zero_grad()
        fake = self.G(normal(len(x)))
        (softplus(-self.D(x)[0]).mean() + softplus(self.D(fake)[0]).mean() + self.D(x)[1].square().mean()).backward()
        self.opt_d.step()


class Relativistic(Loop):
    def update_g(self, fake):
        self.opt_g.zero_grad()
        softplus(self.D(self.X[:8]).mean() - self.D(fake)).mean().backward()
        self.opt_g.step()


class Reshaped(Loop):
    def augmented(self, x):
        return x[..., None]

    def update_d(self, x, w, fake):
        super().update_d(x.view(len(x), -1), w, fake)


@pytest.mark.parametrize(
    "make, message",
    [
        (Autocast, "mixed precision.*autocast"),
        (Skipping, "no optimiser stepped.*precision"),
        (Buffered, "of a buffer of earlier samples a replay knows nothing.*updates="),
        (Apart, r"part of the generator, '0', was called by itself.*updates=\["),
        (Headed, r"returned a tuple.*Keep the network as it is, and declare"),
        (Reshaped, r"on the instances in the shape \(8, 2\), but x has the shape \(8, 2, 1\)"),
        (Relativistic, "neither the x of the step nor what the generator returned.*updates="),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(make, message):
    with pytest.raises(NetworkError, match=message):
        trained(make)


class Augmenting(AugmentedBefore):
    declared = MappingProxyType({})


def test_instances_that_are_not_those_of_the_data_are_found():
    with pytest.raises(ReplayMismatchError, match=r"step 0 are not the rows of data.*augments.*store_x=True"):
        trained(Augmenting, data=points())
    loop, recorder = trained(Augmenting)
    with pytest.raises(TrajectoryError, match="augmentation"):
        fitted(loop, recorder.finish())
    loop, recorder = trained(Loop, data=points())
    fitted(loop, recorder.finish())


@pytest.mark.parametrize("n_devices", [2])
def test_several_devices_are_refused(n_devices):
    loop = Loop()
    wrapped = nn.DataParallel(loop.G)
    wrapped.device_ids = list(range(n_devices))
    with pytest.raises(NetworkError, match="2 devices at once"):
        Recorder(wrapped, loop.D, loop.opt_g, loop.opt_d)


class WithReplacement(Loop):
    def train(self, recorder=None, weights=None, n_epochs=3):
        for _ in range(8):
            index = torch.randint(N, (8,))
            with recorder.step(self.X[index], index):
                self.step(self.X[index], torch.ones(8, dtype=DTYPE))
        return recorder


class OneBatchTwice(Loop):
    def train(self, recorder=None, weights=None, n_epochs=3):
        for index in torch.randperm(N).split(8):
            for _ in range(2):
                with recorder.step(self.X[index], index):
                    self.step(self.X[index], torch.ones(8, dtype=DTYPE))
        return recorder


@pytest.mark.parametrize("make", [WithReplacement, OneBatchTwice])
def test_the_length_of_an_epoch_is_not_guessed_where_it_cannot_be_known(make):
    with pytest.warns(UserWarning, match=r"steps_per_epoch=") as warned:
        _, recorder = trained(make)
    assert len(warned) == 1
    assert recorder.finish().steps_per_epoch == len(recorder)
    assert trained(make, steps_per_epoch=3)[1].finish().steps_per_epoch == 3


def test_an_incomplete_last_batch_that_is_left_out_is_no_other_way_of_drawing():
    loop = Loop()
    recorder = loop.recorder()
    for _ in range(3):
        for index in torch.randperm(N).split(5)[:3]:
            with recorder.step(loop.X[index], index):
                loop.step(loop.X[index], torch.ones(5, dtype=DTYPE))
    assert recorder.finish().steps_per_epoch == 3


def test_metrics_sample_the_generator_as_the_loop_does():
    for draw, holds in [
        (uniform, lambda z: z.abs().max() <= 1),
        (sphere, lambda z: torch.allclose(z.norm(dim=1), torch.ones(len(z), dtype=DTYPE))),
        (codes, lambda z: bool((z[:, :2].sum(1) == 1).all())),
    ]:
        loop, recorder = trained(partial(OtherLatents, draw))
        latents = fitted(loop, recorder.finish()).evaluator(100).latents
        assert latents.shape == (100, LATENT) and holds(latents)
    loop, recorder = trained(Mixing)
    cleanser = fitted(loop, recorder.finish())
    evaluator = cleanser.evaluator(60)
    assert evaluator.latents.dtype == torch.int64
    samples = evaluator.samples(cleanser.trajectory_.state(6), 60)
    assert samples.shape == (60, 2) and len(samples.unique(dim=0)) > 30
    own = trained(Loop, latents=uniform)[1].finish().step
    assert own.draw_latents(50, 0).abs().max() <= 1


def test_a_sampler_of_recorded_inputs_goes_to_other_processes_and_comes_from_folders(tmp_path):
    loop, recorder = trained(Mixing)
    expected = counterfactual_retrain(fitted(loop, recorder.finish()), [[0], [3]])
    loop, recorder = trained(Mixing, store=tmp_path)
    cleanser = fitted(loop, recorder.finish())
    np.testing.assert_allclose(counterfactual_retrain(cleanser, [[0], [3]], n_jobs=2), expected, rtol=1e-9)
    again = Mixing().recorder(store=tmp_path).load()
    np.testing.assert_allclose(fitted(loop, again).influence_, cleanser.influence_, rtol=1e-9)


def test_one_process_of_several_is_one_device(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/at", rank=0, world_size=1)
    try:
        loop = Loop()
        loop.G, loop.D = (nn.parallel.DistributedDataParallel(net) for net in (loop.G, loop.D))
        recorder = loop.train(loop.recorder())
        final = fitted(loop, recorder.finish()).trajectory_.state(6)
        torch.testing.assert_close(final.params["G"], tensors_of(loop.G.module))
    finally:
        torch.distributed.destroy_process_group()


class OtherLabels(Joined):
    """The networks get something that the loop makes of the labels."""

    def train(self, recorder=None, weights=None, n_epochs=2):
        for _ in range(n_epochs):
            for index in torch.arange(N).split(8):
                with recorder.step(self.X[index], index, y=self.y[index] + 5):
                    self.step(self.X[index], torch.ones(8, dtype=DTYPE), self.y[index])
        return recorder


def test_labels_are_those_of_the_data():
    loop, recorder = trained(Joined)
    with pytest.raises(NetworkError, match="there are no labels"):
        GANInfluence(random_state=0).fit(loop.X, trajectory=recorder.finish())
    with pytest.raises(TrajectoryError, match="other labels"):
        GANInfluence(random_state=0).fit(loop.X, 1 - loop.y, trajectory=recorder.finish())
    loop, recorder = trained(OtherLabels)
    cleanser = GANInfluence(metric=FID(n_samples=60), random_state=0)
    trajectory = cleanser.fit(loop.X, trajectory=recorder.finish()).trajectory_
    assert not trajectory.step.conditional
    torch.testing.assert_close(trajectory.replay(trajectory.state(3), 3).params["D"], tensors_of(loop.D))


def test_parameters_that_are_switched_off_are_left_out_and_those_that_rest_are_not():
    loop = Loop()
    loop.G[0].requires_grad_(False)
    loop.D.requires_grad_(False)
    recorder = loop.recorder()
    loop.D.requires_grad_(True)
    trajectory = fitted(loop, loop.train(recorder).finish()).trajectory_
    assert list(trajectory.state(0).params["G"]) == ["2.weight", "2.bias"]
    assert list(trajectory.state(0).params["D"]) == [name for name, _ in loop.D.named_parameters()]
    loop = Loop()
    loop.G.requires_grad_(False)
    recorder = loop.recorder()
    loop.G[2].requires_grad_(True)
    with pytest.raises(NetworkError, match=r"skips G\.0\.weight.*freeze them before the Recorder is made"):
        loop.train(recorder)


def test_groups_share_no_bound_on_the_norm():
    loop = Groups()
    with pytest.raises(ValueError, match="clip_norm bounds the gradient of a whole network"):
        loop.train(loop.recorder(clip_norm=1.0))


class Further(Loop):
    """A third optimiser that nobody knows moves the generator, in a block in which the generator rests."""

    from_step = 0

    def step(self, x, w):
        self.update_d(x, w, self.G(normal(len(x))))
        if self.t >= self.from_step:
            with torch.no_grad():
                self.G[0].bias.add_(0.1)


class FurtherLater(Further):
    from_step = 4


def test_what_moves_parameters_unseen_is_found():
    with pytest.raises(ReplayMismatchError, match=r"params/G/0\.bias deviates .*a further optimiser, or a change"):
        trained(Further)
    with pytest.raises(ReplayMismatchError, match=r"In step 4, G\.0\.bias changed, though none of the optimisers"):
        trained(FurtherLater, checkpoint_every=100)
