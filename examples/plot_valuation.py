"""
Credit and density: scores that need no training run
====================================================

Samples are enough to ask which training images they resemble (`GMValuator`), and the data alone to ask which of them
are typical (`DensitySelector`). Neither predicts what removal does to a metric: that is influence. To find foreign
images they may be all that is needed.
"""

# %%
# Digits, a tenth of them replaced by garments, and a GAN of them
# ---------------------------------------------------------------

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from ganclean import GANTrainer, train_gan
from ganclean.datasets import contaminate, load_digits_images, load_fashion_mnist
from ganclean.metrics import train_classifier
from ganclean.optim import Adam
from ganclean.plotting import AttributionDisplay, CreditShareDisplay, ImageGridDisplay
from ganclean.valuation import DensitySelector, GMValuator

torch.set_num_threads(1)
digits, labels = load_digits_images()
garments, kinds = load_fashion_mnist(size=8)
features = train_classifier(np.concatenate([digits, garments]), np.concatenate([labels, 10 + kinds])).features
rows = np.random.default_rng(0).permutation(len(digits))
X, X_held_out, y = digits[rows[:1200]], digits[rows[1200:]], labels[rows[:1200]]
X, is_garment = contaminate(X, garments, 0.1, random_state=0)

trainer = GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=60, latent_dim=16, ema_decay=0.99)
generator, _ = train_gan(X, trainer=trainer, random_state=0)

# %%
# Which training images do the samples owe most to?
# -------------------------------------------------
# Each sample has a credit of 1, which its ten nearest training images share. Left the samples, right of each what it
# owes most to.

valuator = GMValuator(generator, feature_extractor=features, latent_dim=16, k=10, random_state=0).fit(X)
AttributionDisplay.from_estimator(valuator, X)
plt.show()

# %%
# Credit is unevenly shared:

CreditShareDisplay.from_estimator(valuator)
plt.show()

# %%
# Images without credit resemble nothing that the generator makes: foreign ones, and what it misses. Whether it would
# be better off without them is not said.

order = np.argsort(-valuator.harmfulness_)[:16]
ImageGridDisplay(X[order], frame="#d55e00").plot()
plt.show()

# %%
# Who finds the garments?
# -----------------------
# The area under the ROC curve is 1 for a score that puts all garments before all digits, and 0.5 for chance. With
# ``query="reference"``, credit is given by held-out digits, and no generator is needed.

reference = GMValuator(feature_extractor=features, query="reference").fit(X, X_ref=X_held_out)
density = DensitySelector(retention=0.9, feature_extractor=features).fit(X)
for name, fitted in {"credit": valuator, "credit, held-out digits": reference, "density": density}.items():
    print(f"{name:25s} AUC {roc_auc_score(is_garment, fitted.harmfulness_):.2f}")
dropped = is_garment[~density.support_]
print(f"of the {len(dropped)} images of least density {dropped.mean():.0%} are garments")

# %%
# The density's tenth that would be dropped first: garments, and digits that are only unusual. Selecting by density
# buys fidelity with variety.

ImageGridDisplay(X[np.argsort(-density.harmfulness_)[:32]], frame="#d55e00").plot()
plt.show()
