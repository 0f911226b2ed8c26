"""
Keep your own training loop
===========================

The loop is that of the DCGAN tutorial, with batch normalisation and a sigmoid at the end of the discriminator. Only
the lines with ``recorder`` are new.
"""

# %%
# Networks and optimisers as you have them
# ----------------------------------------

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ganclean import GANInfluence, Recorder
from ganclean.backends import ITD
from ganclean.data import Indexed
from ganclean.datasets import load_digits_images
from ganclean.losses import NonSaturating
from ganclean.metrics import FID, train_classifier
from ganclean.plotting import ImageGridDisplay, InfluenceScatterDisplay
from ganclean.validation import estimation_accuracy

torch.set_num_threads(1)
torch.manual_seed(0)
X, y = load_digits_images()
X = torch.as_tensor(X)
latent_dim = 16

netG = nn.Sequential(
    nn.ConvTranspose2d(latent_dim, 32, 2, 1, 0, bias=False),
    nn.BatchNorm2d(32),
    nn.SiLU(),
    nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
    nn.BatchNorm2d(16),
    nn.SiLU(),
    nn.ConvTranspose2d(16, 1, 4, 2, 1, bias=False),
    nn.Tanh(),
)
netD = nn.Sequential(
    nn.Conv2d(1, 16, 4, 2, 1, bias=False),
    nn.SiLU(),
    nn.Conv2d(16, 32, 4, 2, 1, bias=False),
    nn.BatchNorm2d(32),
    nn.SiLU(),
    nn.Conv2d(32, 1, 2, 1, 0, bias=False),
    nn.Sigmoid(),
)
criterion = nn.BCELoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=1e-3, betas=(0.5, 0.99))
optimizerG = torch.optim.Adam(netG.parameters(), lr=1e-3, betas=(0.5, 0.99))

# %%
# The loop
# --------
# The recorder is told the loss, and reads everything else from the optimisers and the networks. It proves what it was
# told: the first steps are replayed, and a loop that does something else is named at once. ``Indexed`` makes the
# loader return the row numbers of a batch.

recorder = Recorder(netG, netD, optimizerG, optimizerD, loss=NonSaturating(outputs="probabilities"), random_state=0)
for _ in range(20):
    for data, index in DataLoader(Indexed(X), batch_size=64, shuffle=True):
        with recorder.step(data, index):
            # Discriminator: maximise log D(x) + log(1 - D(G(z)))
            netD.zero_grad()
            label = torch.ones(len(data))
            criterion(netD(data).view(-1), label).backward()
            fake = netG(torch.randn(len(data), latent_dim, 1, 1))
            label.fill_(0.0)
            criterion(netD(fake.detach()).view(-1), label).backward()
            optimizerD.step()
            # Generator: maximise log D(G(z))
            netG.zero_grad()
            label.fill_(1.0)
            criterion(netD(fake).view(-1), label).backward()
            optimizerG.step()
trajectory = recorder.finish()
print(f"recorded {len(trajectory)} steps, {trajectory.steps_per_epoch} an epoch")

# %%
# Influence from the record
# -------------------------
# Nothing is trained again. The secant needs no second derivative of the networks; how far it is from the exact one is
# measured in the first traced step.

metric = FID(train_classifier(X.numpy(), y, n_features=16).features, n_samples=1000)
cleanser = GANInfluence(metric={"FID": metric}, backend=ITD(last_epochs=2), n_remove=0.1, random_state=0)
cleanser.fit(X, trajectory=trajectory)
harmful = np.argsort(-cleanser.harmfulness_)[:10]
print(f"FID {cleanser.metric_value_:.2f}")
print(f"the ten most harmful digits are rows {harmful.tolist()}, labels {y[harmful].tolist()}")
print(f"the secant is {cleanser.backend_.deviation_:.1%} from the exact derivative")

ImageGridDisplay.from_estimator(cleanser, X)
plt.show()

# %%
# Is the estimate true?
# ---------------------
# The last two epochs are really run again without groups of 5% of the digits, with the same batches and latents.

accuracy = estimation_accuracy(cleanser, n_instances=20, last_epochs=2, group_size=90)
print(f"predicted against retrained, 20 groups of 5%: Kendall's tau {accuracy.kendall_tau:.2f}")

InfluenceScatterDisplay.from_agreement(accuracy, metric="FID")
plt.show()
