"""
Clean a data set, and prove that it helped
==========================================

A GAN learns handwritten digits, a tenth of which were replaced by images of garments. `GANInfluence` finds the
training images that harm the Fréchet distance of its samples, drops them, and real retraining judges whether that was
worth it.
"""

# %%
# Data in three parts
# -------------------
# One part is trained on. Influence is on a metric against the second, the validation data; whether removal helps is
# measured against the third, which nothing else has seen. The foreign images are in the training part only.

import matplotlib.pyplot as plt
import numpy as np
import torch

from ganclean import GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.datasets import contaminate, load_digits_images, load_fashion_mnist
from ganclean.metrics import FID, PRDC, train_classifier
from ganclean.optim import Adam
from ganclean.plotting import CleansingCurveDisplay, ImageGridDisplay, InfluenceHistogramDisplay
from ganclean.validation import cleansing_curve

torch.set_num_threads(1)
digits, labels = load_digits_images()
rows = np.random.default_rng(0).permutation(len(digits))
X, X_val, X_test = digits[rows[:1000]], digits[rows[1000:1400]], digits[rows[1400:]]
garments, kinds = load_fashion_mnist(size=8)
X, is_garment = contaminate(X, garments, 0.1, random_state=0)

# %%
# What "better" means
# -------------------
# A Fréchet distance needs features that matter for the data. A small classifier of digits and garments has them.

features = train_classifier(np.concatenate([digits, garments]), np.concatenate([labels, 10 + kinds])).features
fid = FID(features, n_samples=2000)

# %%
# Train, and trace back
# ---------------------
# Without networks of your own, there is a small convolutional pair. `estimate_cost` says beforehand what a fit will
# take.

cleanser = GANInfluence(
    trainer=GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=25, latent_dim=16, ema_decay=0.99),
    metric={"FID": fid},
    backend=ITD(last_epochs=5),
    n_remove=0.1,
    random_state=0,
)
print(cleanser.estimate_cost(X))
cleanser.fit(X, X_val=X_val)
X_clean = cleanser.transform(X)
print(f"{len(X) - len(X_clean)} images removed, {is_garment[~cleanser.support_].mean():.0%} of them garments")

# %%
# Most images hardly matter; a few matter a great deal. Colours mark what is removed.

InfluenceHistogramDisplay.from_estimator(cleanser)
plt.show()

# %%
# The images that harm most, with the predicted improvement of the metric on their removal. Not all are garments: what
# harms *this* generator is found, and many a foreign image has hardly been learned from.

ImageGridDisplay.from_estimator(cleanser, X, n_shown=24)
plt.show()

# %%
# The images that help most:

ImageGridDisplay.from_estimator(cleanser, X, which="helpful", n_shown=8)
plt.show()

# %%
# The proof
# ---------
# For each of five seeds, train, trace, remove, and train the last epochs again without what was removed. Random
# removal of as many shows what smaller data alone do. Recall shows whether fidelity is paid for with variety.

curve = cleansing_curve(
    cleanser,
    X_test,
    rates=[0.05, 0.1, 0.2],
    selectors=["influence", "random"],
    metrics={"recall": PRDC(features, quantity="recall", n_samples=len(X_test))},
    n_seeds=5,
    last_epochs=5,
)
for other in ("none", "random"):
    found = curve.compare("influence", other, 0.1)
    print(f"10% against {other}: FID better by {found.improvement:.2f} ({found.low:.2f} to {found.high:.2f})")
print("better than both, at each rate:", curve.helps().tolist())

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
CleansingCurveDisplay.from_curve(curve, ax=left)
CleansingCurveDisplay.from_curve(curve, metric="recall", ax=right)
plt.show()
