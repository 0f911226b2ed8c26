"""
Objectives of your own: an auxiliary classifier
===============================================

A discriminator that also tells the class is no loss of single numbers. Its objective is written as one would write it
anyway, and says what the removal of an instance means. Groups of instances are then really removed, and the prediction
is compared.
"""

# %%
# A discriminator with two answers
# --------------------------------
# Points of three classes; the generator is told which to make.

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

from ganclean import GANInfluence, GANTrainer, Update
from ganclean.backends import ITD
from ganclean.metrics import FID
from ganclean.optim import Adam
from ganclean.plotting import HarmfulnessScatterDisplay, InfluenceScatterDisplay
from ganclean.validation import linear_datamodeling_score

torch.set_num_threads(1)
torch.manual_seed(0)
rng = np.random.default_rng(0)
y = rng.integers(0, 3, size=900)
centres = np.array([[0.0, 1.2], [-1.0, -0.6], [1.0, -0.6]])
X = (centres[y] + 0.35 * rng.normal(size=(900, 2))).astype(np.float32)
X_train, y_train, X_val = X[:600], y[:600], X[600:]


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.body = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, z, y):
        return self.body(z + self.embed(y))


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(2, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.validity, self.classes = nn.Linear(48, 1), nn.Linear(48, 3)

    def forward(self, x):
        h = self.trunk(x)
        return self.validity(h).flatten(), self.classes(h)


# %%
# The two objectives
# ------------------
# The weights multiply both terms of an instance: whoever is removed teaches neither what is real nor its class.


def discriminator_loss(nets, batch, weights):
    validity, classes = nets.D(batch.x)
    rejected, _ = nets.D(nets.G(batch.latents, batch.y).detach())
    own = softplus(-validity) + cross_entropy(classes, batch.y, reduction="none")
    return (weights * own).mean() + softplus(rejected).mean()


def generator_loss(nets, batch, weights):
    validity, classes = nets.D(nets.G(batch.latents, batch.y))
    return softplus(-validity).mean() + cross_entropy(classes, batch.y)


rule = Adam(lr=1e-3, betas=(0.5, 0.99))
cleanser = GANInfluence(
    Generator(),
    Discriminator(),
    trainer=GANTrainer(
        updates=[Update("D", discriminator_loss, rule), Update("G", generator_loss, rule)],
        n_epochs=40,
        latent_dim=8,
        ema_decay=0.99,
    ),
    metric={"FID": FID(n_samples=1000)},
    backend=ITD(last_epochs=5),
    n_remove=0.1,
    random_state=0,
)
cleanser.fit(X_train, y_train, X_val=X_val)
print(f"FID: {cleanser.metric_value_:.3f}")
print("mean harmfulness by class:", [round(float(cleanser.harmfulness_[y_train == c].mean()), 5) for c in range(3)])

HarmfulnessScatterDisplay.from_estimator(cleanser, X_train)
plt.show()

# %%
# Predicted and true
# ------------------
# Random halves of the data are removed in a replay of the traced epochs.

score = linear_datamodeling_score(cleanser, n_subsets=30, last_epochs=5)
print(f"rank correlation of predicted and true FID over {len(score.true)} random halves: {score.spearman:.2f}")

InfluenceScatterDisplay.from_agreement(score, metric="FID")
plt.show()
