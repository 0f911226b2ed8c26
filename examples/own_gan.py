"""Clean a data set for a GAN of one's own, then check the estimate by retraining.

python examples/own_gan.py
"""

import numpy as np
import torch
from torch import nn

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.metrics import FID
from ganclean.optim import Adam
from ganclean.validation import estimation_accuracy

torch.set_num_threads(1)
rng = np.random.default_rng(0)
X = rng.multivariate_normal([1, 1], [[1, 0.8], [0.8, 1]], size=1200).astype(np.float32)
X_train, X_val, X_test = X[:800], X[800:1000], X[1000:]

generator = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
discriminator = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

cleaner = GANInfluence(
    generator,
    discriminator,
    trainer=GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=40, latent_dim=8, ema_decay=0.99),
    metric=FID(n_samples=1000),
    backend=ITD(last_epochs=10),
    n_remove=0.1,
    random_state=0,
)
print(cleaner.estimate_cost(X_train))
cleaner.fit(X_train, X_val=X_val)
X_clean = cleaner.transform(X_train)
print(f"FID on the validation data: {cleaner.metric_value_:.3f}; on the test data: {-cleaner.score(X_test):.3f}")
print(f"{len(X_train) - len(X_clean)} of {len(X_train)} instances removed")

accuracy = estimation_accuracy(cleaner, n_instances=50, last_epochs=10)
print(f"predicted against retrained changes, 50 single removals: Kendall's tau {accuracy.kendall_tau:.2f}")
