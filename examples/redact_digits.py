"""Make a GAN of handwritten digits stop producing the digit 3, and see what that costs.

python examples/redact_digits.py
"""

import torch

from ganclean import GANTrainer, train_gan
from ganclean.datasets import load_digits_images
from ganclean.metrics import train_classifier
from ganclean.optim import Adam
from ganclean.plotting import RedactionDisplay
from ganclean.redaction import DeletionFineTuner, GANRedactor, SampleCriterion

torch.set_num_threads(1)
X, y = load_digits_images()
X_train, y_train, X_test, y_test = X[:1200], y[:1200], X[1200:], y[1200:]
classifier, judge = train_classifier(X_train, y_train), train_classifier(X_test, y_test)


def is_valid(images):
    return classifier(torch.from_numpy(images)).argmax(dim=1) != 3


def seems_valid(images):
    return judge(torch.from_numpy(images)).argmax(dim=1) != 3


# Your own trained networks go here.
trainer = GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=60, latent_dim=16)
generator, discriminator = train_gan(X_train, trainer=trainer, random_state=0)

threes = SampleCriterion(X_train[y_train == 3], match=is_valid)
further = GANTrainer(optimizer=Adam(lr=5e-4, betas=(0.5, 0.99)), n_epochs=10, latent_dim=16)
redactor = GANRedactor(generator, discriminator, threes, trainer=further, random_state=0).fit(X_train)
deletion = DeletionFineTuner(generator, discriminator, threes, trainer=further, random_state=0).fit(X_train)

print(redactor.report(X_test[y_test != 3], evaluator=seems_valid, feature_extractor=classifier.features))
print(f"deletion by fine-tuning leaves an invalidity of {deletion.invalidity_after_}")
RedactionDisplay.from_estimator(redactor, n_shown=24).figure_.savefig("redacted_digits.png", dpi=150)
