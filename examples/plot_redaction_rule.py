"""
Make a GAN stop producing what a rule forbids
=============================================

Bright garments are not to be generated. No label says what is bright: the criterion is a rule that is only called,
and any function, model or person could be in its place.
"""

# %%

import matplotlib.pyplot as plt
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
    """Whether an image's mean is below that of 85% of the data."""
    return images.mean(axis=(1, 2, 3)) < limit


trainer = GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=40, latent_dim=32)
generator, discriminator = train_gan(X, trainer=trainer, random_state=0)

# %%
# Four epochs more, a tenth of the training. The report compares with held-out garments that the rule allows.

further = GANTrainer(optimizer=Adam(lr=5e-4, betas=(0.5, 0.99)), n_epochs=4, latent_dim=32)
redactor = GANRedactor(generator, discriminator, is_dark, trainer=further, random_state=0).fit(X)
print(redactor.report(X_test[is_dark(X_test)], feature_extractor=features, n=2000))

# %%
# The same latents before and after; bright ones are framed.

RedactionDisplay.from_estimator(redactor, n_shown=24)
plt.show()

# %%
# What is left is drawn again until the rule is content.

dark, _ = redactor.sample(1000, reject=True)
print(f"after rejection, {is_dark(dark).mean():.0%} of {len(dark)} samples are valid")
