"""Make a GAN of garments stop producing bright ones: an attribute that only a rule describes.

python examples/redact_fashion.py
"""

import numpy as np
import torch

from ganclean import GANTrainer, train_gan
from ganclean.datasets import load_fashion_mnist
from ganclean.metrics import train_classifier
from ganclean.optim import Adam
from ganclean.plotting import RedactionDisplay
from ganclean.redaction import GANRedactor

torch.set_num_threads(1)
(X, y), (X_test, _) = load_fashion_mnist(), load_fashion_mnist("test")
features = train_classifier(X, y).features
limit = np.quantile(X.mean(axis=(1, 2, 3)), 0.85)


def is_dark(images):
    return images.mean(axis=(1, 2, 3)) < limit


trainer = GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=40, latent_dim=32)
generator, discriminator = train_gan(X, trainer=trainer, random_state=0)

further = GANTrainer(optimizer=Adam(lr=5e-4, betas=(0.5, 0.99)), n_epochs=4, latent_dim=32)
redactor = GANRedactor(generator, discriminator, is_dark, trainer=further, random_state=0).fit(X)
print(redactor.report(X_test[is_dark(X_test)], feature_extractor=features, n=2000))

dark, _ = redactor.sample(1000, reject=True)
print(f"after rejection, {is_dark(dark).mean():.0%} of {len(dark)} samples are valid")
RedactionDisplay.from_estimator(redactor, n_shown=24).figure_.savefig("redacted_garments.png", dpi=150)
