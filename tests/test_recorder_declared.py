"""A user's own loop whose objectives are declared: the loop stays, or the recorder does its updates."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from ganclean import GANInfluence, Recorder, Update
from ganclean.backends import ITD
from ganclean.exceptions import NetworkError, ReplayMismatchError
from ganclean.metrics import FID
from ganclean.optim import Adam
from ganclean.recipes import gan
from ganclean.validation import counterfactual_retrain
from tests.reference.finite_differences import STENCIL

N, LATENT = 16, 3
DTYPE = torch.float64


def normal(n):
    return torch.randn(n, LATENT, dtype=DTYPE)


class LabelledGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(3, 2), nn.Linear(LATENT + 2, 6), nn.Linear(6, 2)

    def forward(self, z, y):
        return self.last(torch.tanh(self.first(torch.cat([z, self.embed(y)], dim=1))))


class TwoHeads(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.body, self.validity, self.classes = nn.Linear(2, 6), nn.Linear(6, 1), nn.Linear(6, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        h = self.dropout(softplus(self.body(x)))
        return self.validity(h), self.classes(h)


def of_d(nets, batch, weights):
    fake = nets.G(normal(len(batch.x)), batch.y)
    validity, classes = nets.D(batch.x)
    real = softplus(-validity.flatten()) + cross_entropy(classes, batch.y, reduction="none")
    return (weights * real).mean() + softplus(nets.D(fake.detach())[0]).mean()


def of_g(nets, batch, weights):
    validity, classes = nets.D(nets.G(normal(len(batch.x)), batch.y))
    return softplus(-validity).mean() + cross_entropy(classes, batch.y)


class Auxiliary:
    """An auxiliary classifier GAN; `spoil` says what its loop does beside."""

    def __init__(self, dropout=0.0):
        torch.manual_seed(0)
        self.X, self.y = torch.randn(N, 2, dtype=DTYPE), torch.arange(N) % 3
        self.G, self.D = LabelledGenerator().double(), TwoHeads(dropout).double()
        settings = {"lr": 1e-2, "betas": (0.5, 0.9), "eps": 1e-3}
        self.opt_g, self.opt_d = (torch.optim.Adam(net.parameters(), **settings) for net in (self.G, self.D))

    def recorder(self, updates=(("D", of_d), ("G", of_g)), **settings):
        settings = {"checkpoint_every": 1, "random_state": 0} | settings
        players, optimizers = {"G": self.G, "D": self.D}, {"G": self.opt_g, "D": self.opt_d}
        return Recorder(players=players, optimizers=optimizers, updates=list(updates), **settings)

    def train(self, recorder, weights=None, spoil="", n_epochs=3):
        weights = torch.ones(N, dtype=DTYPE) if weights is None else weights
        for _ in range(n_epochs):
            for index in torch.randperm(N).split(8):
                x, y, w = self.X[index], self.y[index], weights[index]
                if recorder is None:
                    self.step(x, y, w, spoil)
                elif spoil == "run":
                    recorder.run(x, index, y=y)
                else:
                    with recorder.step(x, index, y=y):
                        self.step(x, y, w, spoil)
        return recorder

    def step(self, x, y, w, spoil):
        z = normal(len(x))
        if spoil == "another draw":
            torch.rand(1)
        self.opt_d.zero_grad()
        fake = self.G(z, y)
        validity, classes = self.D(x)
        real = softplus(-validity.flatten()) + cross_entropy(classes, y, reduction="none")
        ((w * real).mean() + softplus(self.D(fake.detach())[0]).mean()).backward()
        self.opt_d.step()
        self.opt_g.zero_grad()
        validity, classes = self.D(self.G(normal(len(x)), y))
        factor = 0.5 if spoil == "half" else 1.0
        (factor * (softplus(-validity).mean() + cross_entropy(classes, y))).backward()
        self.opt_g.step()


def fitted(loop, trajectory, **settings):
    backend = settings.pop("backend", ITD(derivative="exact"))
    cleanser = GANInfluence(metric=FID(n_samples=60), backend=backend, random_state=0)
    return cleanser.fit(loop.X, getattr(loop, "y", None), trajectory=trajectory)


def check_replay(cleanser, modules):
    """Assert that replaying all steps gives what a loop has trained."""
    trajectory = cleanser.trajectory_
    state = trajectory.store.state(0)
    for t in range(len(trajectory)):
        state = trajectory.replay(state, t)
    for player, module in modules.items():
        expected = {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}
        torch.testing.assert_close(state.params[player] | state.buffers[player], expected, rtol=1e-9, atol=1e-11)
    replayed = counterfactual_retrain(cleanser, [[]])[0]
    assert abs(replayed - cleanser.metric_value_) < 1e-6 * abs(cleanser.metric_value_)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("spoil", ["", "run"])
def test_declared_objectives_are_replayed(spoil, dropout):
    loop = Auxiliary(dropout)
    torch.manual_seed(1)
    cleanser = fitted(loop, loop.train(loop.recorder(), spoil=spoil).finish())
    check_replay(cleanser, {"G": loop.G, "D": loop.D})
    assert cleanser.trajectory_.steps_per_epoch == 2
    assert cleanser.sample(4)[0].shape == (4, 2)


def test_influence_is_the_derivative_in_the_weights_of_the_users_own_loop():
    loop = Auxiliary(dropout=0.3)
    torch.manual_seed(1)
    trajectory = loop.train(loop.recorder()).finish()
    cleanser = fitted(loop, trajectory)
    evaluator, final = cleanser.evaluator(60), cleanser.trajectory_.state(6)

    def value(weights):
        other = Auxiliary(dropout=0.3)
        torch.manual_seed(1)
        other.train(None, weights)
        params = {name: p.detach() for name, p in other.G.named_parameters()}
        return evaluator.value(cleanser.metric_, final._replace(params=final.params | {"G": params}))

    rows, width = [0, 5, 11], 1e-4
    expected = np.zeros(3)
    for place, row in enumerate(rows):
        for offset, factor in STENCIL.items():
            weights = torch.ones(N, dtype=DTYPE)
            weights[row] += offset * width
            expected[place] -= factor / width * value(weights)
    np.testing.assert_allclose(cleanser.influence_[rows], expected, rtol=1e-4)
    secant = fitted(loop, trajectory, backend=ITD(delta=1e-4))
    np.testing.assert_allclose(secant.influence_[rows], expected, rtol=1e-2)


@pytest.mark.parametrize(
    "spoil, message",
    [("half", "trains 'G'.* 0.5 times the declared one: multiply"), ("another draw", "random generator was not where")],
)
def test_what_is_not_declared_is_found(spoil, message):
    loop = Auxiliary()
    torch.manual_seed(1)
    with pytest.raises(ReplayMismatchError, match=message):
        loop.train(loop.recorder(), spoil=spoil)


def test_autocast_is_refused():
    loop = Auxiliary()
    with pytest.raises(NetworkError, match="precision"), torch.autocast("cpu", dtype=torch.bfloat16):
        loop.train(loop.recorder())


def test_a_folder_is_loaded_and_an_interrupted_recording_goes_on(tmp_path):
    loop = Auxiliary()
    torch.manual_seed(1)
    cleanser = fitted(loop, loop.train(loop.recorder(store=tmp_path / "whole"), spoil="run").finish())
    again = Auxiliary().recorder(store=tmp_path / "whole").load()
    np.testing.assert_allclose(fitted(loop, again).influence_, cleanser.influence_, rtol=1e-9)
    part = Auxiliary()
    torch.manual_seed(1)
    part.train(part.recorder(store=tmp_path / "part"), spoil="run", n_epochs=2)
    resumed = Auxiliary()
    recorder = resumed.recorder(store=tmp_path / "part")
    assert recorder.resume() == 4
    torch.manual_seed(1)
    torch.randperm(N), torch.randperm(N)
    resumed.train(recorder, spoil="run", n_epochs=1)
    np.testing.assert_allclose(fitted(resumed, recorder.finish()).influence_, cleanser.influence_, rtol=1e-8)


class Information:
    """A third optimiser over the generator and a head: it holds parameters of two players."""

    def __init__(self):
        torch.manual_seed(0)
        self.X = torch.randn(N, 2, dtype=DTYPE)
        self.G = nn.Sequential(nn.Linear(LATENT, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.D = nn.Sequential(nn.Linear(2, 6), nn.Softplus(), nn.Linear(6, 1)).double()
        self.Q = nn.Linear(6, LATENT).double()
        self.average = copy.deepcopy(self.D)
        adam = {"lr": 1e-2, "eps": 1e-3}
        self.optimizers = {
            "D": torch.optim.Adam(self.D.parameters(), **adam),
            "G": torch.optim.Adam(self.G.parameters(), **adam),
            "information": torch.optim.Adam([*self.G.parameters(), *self.Q.parameters()], **adam),
        }

    @staticmethod
    def of_d(nets, batch, weights):
        fake = nets.G(batch.latents)
        return (weights * softplus(-nets.D(batch.x)).flatten()).mean() + softplus(nets.D(fake)).mean()

    @staticmethod
    def slope(nets, batch, weights):
        x = batch.x.detach().requires_grad_()
        slope = torch.autograd.grad(nets.D(x).sum(), x, create_graph=True)[0]
        return (weights * slope.square().sum(1)).mean()

    @staticmethod
    def of_g(nets, batch, weights):
        value = softplus(-nets.D(nets.G(batch.latents))).mean()
        batch.carried["mean"] = 0.9 * batch.carried["mean"] + 0.1 * value.detach()
        return value + 0.1 * (value - batch.carried["mean"]).square()

    @staticmethod
    def information(nets, batch, weights):
        z = batch.latents
        return (nets.Q(nets.D[1](nets.D[0](nets.G(z)))) - z).square().mean()

    def recorder(self, **settings):
        return Recorder(
            players={"G": self.G, "D": self.D, "Q": self.Q},
            optimizers=self.optimizers,
            updates=[
                Update("D", self.of_d, Adam(), micro=2),
                Update("D", self.slope, "D", due=2, name="slope"),
                Update("G", self.of_g, Adam(), due=lambda t: t % 3 == 2),
                ("information", self.information),
            ],
            averages={"D": (self.average, 0.9)},
            carried={"mean": torch.tensor(0.5)},
            latent_dim=LATENT,
            random_state=0,
            checkpoint_every=1,
            **settings,
        )


def test_the_recorder_does_updates_of_any_kind_itself():
    loop = Information()
    recorder = loop.recorder()
    torch.manual_seed(1)
    for _ in range(3):
        for index in torch.randperm(N).split(8):
            recorder.run(loop.X[index], index)
    cleanser = fitted(loop, recorder.finish())
    check_replay(cleanser, {"G": loop.G, "D": loop.D, "Q": loop.Q})
    names = [[done.name for done in cleanser.trajectory_[t].updates] for t in range(3)]
    assert names == [["D", "slope", "information"], ["D", "information"], ["D", "slope", "G", "information"]]
    final = cleanser.trajectory_.state(6)
    torch.testing.assert_close(
        final.averages["D"], {n: p.detach() for n, p in loop.average.named_parameters()}, rtol=1e-9, atol=1e-12
    )
    assert final.carried["mean"] != 0.5
    assert loop.optimizers["D"].state[loop.D[0].weight]["step"] == 9


def test_recipes_are_run_by_the_recorder_but_not_found_in_a_loop():
    loop = Auxiliary()
    loop.G, loop.D = nn.Linear(LATENT, 2).double(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    loop.opt_g, loop.opt_d = (torch.optim.Adam(net.parameters(), eps=1e-3) for net in (loop.G, loop.D))
    recorder = loop.recorder(gan("hinge"), latent_dim=LATENT)
    for index in torch.arange(N).split(8):
        recorder.run(loop.X[index], index)
    check_replay(fitted(loop, recorder.finish()), {"G": loop.G, "D": loop.D})
    with pytest.raises(NetworkError, match=r"recorder\.run"):
        recorder = loop.recorder(gan("hinge"), latent_dim=LATENT)
        with recorder.step(loop.X[:8], torch.arange(8)):
            loop.opt_d.zero_grad()
            loop.D(loop.X[:8]).sum().backward()
            loop.opt_d.step()


def test_what_a_loop_carries_is_read_where_it_keeps_it():
    loop = Auxiliary()

    def carrying(nets, batch, weights):
        value = of_d(nets, batch, weights)
        batch.carried["k"] = batch.carried["k"] + 0.1 * value.detach()
        return value * (1 + 0 * batch.carried["k"])

    carried = {"k": torch.tensor(1.0, dtype=DTYPE)}
    step = loop.step

    def stepping(*args):
        before = torch.get_rng_state()
        fake = loop.G(normal(8), args[1])
        torch.set_rng_state(before)
        validity, classes = loop.D(args[0])
        real = softplus(-validity.flatten()) + cross_entropy(classes, args[1], reduction="none")
        value = real.mean() + softplus(loop.D(fake)[0]).mean()
        step(*args)
        if not forgets:
            carried["k"] = carried["k"] + 0.1 * value.detach()

    loop.step, forgets = stepping, False
    updates = [("D", carrying), ("G", of_g)]
    cleanser = fitted(loop, loop.train(loop.recorder(updates, carried=carried)).finish())
    torch.testing.assert_close(cleanser.trajectory_.replay(cleanser.trajectory_.state(5), 5).carried, carried)
    forgets = True
    with pytest.raises(ReplayMismatchError, match=r"carried/k deviates .*Recorder\(carried="):
        loop.train(loop.recorder(updates, carried=carried))


def test_optimizers_and_updates_must_fit():
    loop = Auxiliary()
    with pytest.raises(ValueError, match="Each update needs its optimiser"):
        Recorder(players={"G": loop.G}, optimizers={"D": loop.opt_g}, updates=[("G", of_g)])
    with pytest.raises(ValueError, match="in none of the networks"):
        Recorder(players={"G": loop.G}, optimizers={"D": loop.opt_d}, updates=[("D", of_d)])
    with pytest.raises(ValueError, match="objectives say everything"):
        Recorder(loop.G, players={"G": loop.G}, optimizers={}, updates=[])
    with pytest.raises(ValueError, match="Recorder takes the networks"):
        Recorder(loop.G, loop.D)
    with pytest.raises(ValueError, match="run needs the objectives"):
        Recorder(loop.G, loop.D, loop.opt_g, loop.opt_d).run(loop.X, torch.arange(N))


def test_latents_that_are_not_normal_are_to_be_declared():
    G, D = nn.Linear(LATENT, 2).double(), nn.Linear(2, 1).double()
    opt_g = torch.optim.SGD(G.parameters(), lr=0.01)

    def of_uniform(nets, batch, weights):
        return nets.D(nets.G(torch.rand(len(batch.x), LATENT, dtype=DTYPE))).mean() + 0 * weights.sum()

    def recorder(**settings):
        return Recorder(players={"G": G, "D": D}, optimizers={"G": opt_g}, updates=[("G", of_uniform)], **settings)

    x = torch.randn(64, 2, dtype=DTYPE)
    with pytest.warns(UserWarning, match=r"standard normal.*latents=lambda n"):
        recorder().run(x, torch.arange(64))
    own = recorder(latents=lambda n: torch.rand(n, LATENT, dtype=DTYPE))
    own.run(x, torch.arange(64))
    assert own.finish().step.draw_latents(20, 0).min() >= 0
