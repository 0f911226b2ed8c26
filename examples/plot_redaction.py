"""
Make a GAN stop producing one class
===================================

A trained GAN of handwritten digits is trained a little further until it no longer makes the digit 3, and what that
costs is measured with a judge that redaction has not seen.
"""

# %%
# A trained GAN, and two judges
# -----------------------------
# Your own trained networks go here. One classifier says during redaction what is a 3; the other, trained on other
# data, says afterwards what is left.

import matplotlib.pyplot as plt
import torch

from ganclean import GANTrainer, train_gan
from ganclean.datasets import load_digits_images
from ganclean.metrics import train_classifier
from ganclean.optim import Adam
from ganclean.plotting import InvalidityCurveDisplay, RedactionDisplay
from ganclean.redaction import DeletionFineTuner, GANRedactor, SampleCriterion

torch.set_num_threads(1)
X, y = load_digits_images()
X_train, y_train, X_test, y_test = X[:1200], y[:1200], X[1200:], y[1200:]
classifier, judge = train_classifier(X_train, y_train), train_classifier(X_test, y_test)


def is_valid(images):
    """By the classifier that redaction works with."""
    return classifier(torch.from_numpy(images)).argmax(dim=1) != 3


def seems_valid(images):
    """By the other one."""
    return judge(torch.from_numpy(images)).argmax(dim=1) != 3


trainer = GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=60, latent_dim=16)
generator, discriminator = train_gan(X_train, trainer=trainer, random_state=0)

# %%
# Redaction, and the simpler thing
# --------------------------------
# The threes of the data, and those that the generator still makes, are shown to the discriminator as fakes, and the
# former are taken out of the data. Deletion by fine-tuning only does the latter. Both train for ten epochs, a sixth
# of the training.

threes = SampleCriterion(X_train[y_train == 3], match=is_valid)
further = GANTrainer(optimizer=Adam(lr=5e-4, betas=(0.5, 0.99)), n_epochs=10, latent_dim=16)
redactor = GANRedactor(generator, discriminator, threes, method="validity", trainer=further, random_state=0).fit(
    X_train
)
deletion = DeletionFineTuner(generator, discriminator, threes, trainer=further, random_state=0).fit(X_train)

print(redactor.report(X_test[y_test != 3], evaluator=seems_valid, feature_extractor=classifier.features))
print(f"deletion by fine-tuning leaves an invalidity of {deletion.invalidity_after_}")

# %%
# The same latents before and after; invalid samples are framed.

RedactionDisplay.from_estimator(redactor, n_shown=24)
plt.show()

# %%
# How invalidity fell, epoch by epoch:

InvalidityCurveDisplay.from_estimator(redactor)
plt.show()

# %%
# What is left can be rejected: it is drawn again until the criterion is content. Redaction is not erasure. The
# networks learn from the redacted samples, and nothing that was learned before is withdrawn.

samples, _ = redactor.sample(500, reject=True)
left = 1 - seems_valid(samples).double().mean()
print(f"after rejection, {left:.2%} of 500 samples look like a 3 to the other judge")
