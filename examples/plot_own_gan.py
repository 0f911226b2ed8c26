"""
Your own networks, and points in the plane
==========================================

Two perceptrons learn a correlated normal distribution. The estimate is checked by really retraining without single
instances.
"""

# %%
# Networks are ordinary modules
# -----------------------------
# They are copied and never changed. Smooth activations (SiLU rather than ReLU) make training predictable.

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import FID
from ganclean.optim import Adam
from ganclean.plotting import HarmfulnessScatterDisplay, InfluenceScatterDisplay
from ganclean.validation import estimation_accuracy

torch.set_num_threads(1)
torch.manual_seed(0)
rng = np.random.default_rng(0)
X = rng.multivariate_normal([1, 1], [[1, 0.8], [0.8, 1]], size=1200).astype(np.float32)
X_train, X_val, X_test = X[:800], X[800:1000], X[1000:]

generator = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
discriminator = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

cleanser = GANInfluence(
    generator,
    discriminator,
    trainer=GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=40, latent_dim=8, ema_decay=0.99),
    metric={"FID": FID(n_samples=1000)},
    backend=ITD(last_epochs=10),
    n_remove=0.1,
    random_state=0,
)
print(cleanser.estimate_cost(X_train))
cleanser.fit(X_train, X_val=X_val)
print(f"FID on the validation data: {cleanser.metric_value_:.3f}; on the test data: {-cleanser.score(X_test):.3f}")

# %%
# What harms
# ----------
# Where the generator puts too much, instances harm, and where it puts too little, they help: influence shows what is
# wrong with the samples. The ringed points would be dropped.

X_clean = cleanser.transform(X_train)
print(f"{len(X_train) - len(X_clean)} of {len(X_train)} instances removed")

HarmfulnessScatterDisplay.from_estimator(cleanser, X_train)
plt.show()

# %%
# Is the estimate true?
# ---------------------
# The ten traced epochs are really run again without each of fifty instances.

accuracy = estimation_accuracy(cleanser, n_instances=50, last_epochs=10)
low, high = accuracy.interval("kendall_tau")
print(
    f"50 single removals, predicted and retrained: Kendall's tau {accuracy.kendall_tau:.2f} ({low:.2f} to {high:.2f})"
)

InfluenceScatterDisplay.from_agreement(accuracy, metric="FID")
plt.show()
