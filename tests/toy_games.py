"""GANs at a point that they were not trained to, as games whose Jacobian is known."""

from dataclasses import replace

import numpy as np
from torch import nn

from ganclean import GANTrainer
from ganclean.backends.game import Game, draw_chunks
from ganclean.data import DataSource
from ganclean.losses import R1, GradientPenalty
from ganclean.optim import SGD, Clipped
from tests.toy_gans import toy_data, toy_networks

X = toy_data()
LABELS = np.arange(16) % 3


class Conditional(nn.Module):
    def __init__(self, body, n_features):
        super().__init__()
        self.body, self.embed = body, nn.Embedding(3, n_features).double()

    def forward(self, x, y):
        return self.body(x + self.embed(y))


def frozen_networks():
    generator, discriminator = toy_networks()
    generator[0].weight.requires_grad_(False)
    discriminator[2].bias.requires_grad_(False)
    return generator, discriminator


GAMES = {
    "plain": (toy_networks, {}),
    "simultaneous": (toy_networks, {"update": "simultaneous"}),
    "R1": (toy_networks, {"penalty": R1(gamma=0.7)}),
    "lazy R1": (toy_networks, {"penalty": R1(gamma=0.7, every=4)}),
    "gradient penalty": (toy_networks, {"penalty": GradientPenalty(weight=0.5)}),
    "weight decay": (toy_networks, {"optimizer": Clipped(SGD(weight_decay=0.3), max_norm=1.0)}),
    "frozen": (frozen_networks, {}),
    "some rows": (toy_networks, {"n_batch": 11}),
    "conditional": (
        lambda: tuple(Conditional(net, n) for net, n in zip(toy_networks(), (3, 2))),
        {"labels": LABELS, "penalty": R1(gamma=0.7)},
    ),
}
GAMES["conditional gradient penalty"] = (GAMES["conditional"][0], {"labels": LABELS, "penalty": GradientPenalty(0.5)})


def random_networks(kind):
    generator, discriminator = toy_networks()
    if kind == "dropout":
        return generator.insert(1, nn.Dropout(0.3)), discriminator.insert(1, nn.Dropout(0.3))
    if kind == "batch norm":
        return generator.insert(1, nn.BatchNorm1d(6).double()), discriminator.insert(1, nn.BatchNorm1d(6).double())
    for network in (generator, discriminator):
        nn.utils.parametrizations.spectral_norm(network[0])
    return generator, discriminator


def make_game(networks=None, derivative="secant", batch_size=5, n_batch=None, labels=None, **settings):
    generator, discriminator = toy_networks() if networks is None else networks
    trainer = GANTrainer(latent_dim=3, conditional=labels is not None, **settings)
    step, source = trainer.make_step(generator, discriminator), DataSource(X, labels=labels)
    chunks = tuple(step.drawn(chunk, source) for chunk in draw_chunks(step, 16, batch_size, n_batch))
    return Game(step, step.initial_state(), source, chunks, derivative, 1e-4)


def moved_game(game, player, move):
    params = game.state.params[player]
    pieces = move.split([p.numel() for p in params.values()])
    moved = {n: p + piece.view_as(p) for (n, p), piece in zip(params.items(), pieces)}
    return replace(game, state=game.state._replace(params={**game.state.params, player: moved}))
