"""
Search how far back to trace
============================

How many epochs influence is traced back, and how many instances are dropped, are parameters like any other.
`CleansedEstimator` makes a cleanser and an estimator into one, which scikit-learn's `GridSearchCV` tunes.
"""

# %%
# Data and a metric
# -----------------
# Points in the plane, a tenth of which come from elsewhere. Samples are judged by their Fréchet distance to clean
# points: to some for influence, to others in the search, and to a third part in the end.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from ganclean import CleansedEstimator, GANInfluence, GANTrainer
from ganclean.backends import ITD
from ganclean.datasets import contaminate
from ganclean.metrics import FID
from ganclean.optim import Adam
from ganclean.plotting import HarmfulnessScatterDisplay

torch.set_num_threads(1)
rng = np.random.default_rng(0)
points = rng.multivariate_normal([1, 1], [[1, 0.8], [0.8, 1]], size=2300).astype(np.float32)
foreign = rng.normal([-1.5, 2.5], 0.4, size=(200, 2)).astype(np.float32)
X, is_foreign = contaminate(points[:800], foreign, 0.1, random_state=0)
X_val, X_search, X_test = np.split(points[800:], 3)

# %%
# A cleanser and an estimator in one
# ----------------------------------
# The estimator is a GAN that is trained anew on the kept rows and whose score is the negative Fréchet distance:
# another `GANInfluence`, one that removes nothing. Any estimator of scikit-learn could be in its place.

gan = GANInfluence(
    trainer=GANTrainer(optimizer=Adam(lr=1e-3, betas=(0.5, 0.99)), n_epochs=40, latent_dim=8, ema_decay=0.99),
    metric={"FID": FID(n_samples=1000)},
    backend="random",
    n_remove=0,
    random_state=1,
)
cleanser = clone(gan).set_params(backend=ITD(last_epochs=1), n_remove=0.1, random_state=0)
estimator = CleansedEstimator(cleanser, gan)

# %%
# The search
# ----------
# The training rows are contaminated and the held-out ones are not, so splits are given: three random parts of the
# former, and all of the latter. ``n_remove=0`` is no cleansing, and the back-end ``"random"`` is random cleansing.

both = np.concatenate([X, X_search])
held_out = np.arange(len(X), len(both))
search = GridSearchCV(
    estimator,
    [
        {"cleanser__n_remove": [0]},
        {"cleanser__backend": ["random"]},
        {"cleanser__backend__last_epochs": [1, 5, 20, 40]},
    ],
    cv=[(rng.permutation(len(X))[:700], held_out) for _ in range(3)],
    refit=False,
).fit(both, X_val=X_val)
found = search.cv_results_
for params, mean, sd in zip(found["params"], found["mean_test_score"], found["std_test_score"]):
    print(f"FID {-mean:.3f} (s.d. {sd:.3f})  {params}")

# %%
# The best, once more
# -------------------
# The best of several is always a little too good on the data that chose it. It is fitted again to all training rows,
# and judged on other data.

best = clone(estimator).set_params(**search.best_params_).fit(X, X_val=X_val)
without = clone(estimator).set_params(cleanser__n_remove=0).fit(X, X_val=X_val)
removed = ~best.cleanser_.support_
print(f"test data: FID {-best.score(X_test):.3f}, without cleansing {-without.score(X_test):.3f}")
print(f"of {removed.sum()} removed points {is_foreign[removed].mean():.0%} are foreign")

HarmfulnessScatterDisplay.from_estimator(best.cleanser_, X)
plt.show()
