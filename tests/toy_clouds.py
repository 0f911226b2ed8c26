"""Points and images, as training data and as samples of some generator."""

import numpy as np

RNG = np.random.default_rng(0)
TRAIN, SAMPLES, UNSEEN = RNG.normal(size=(60, 3)), RNG.normal(size=(40, 3)), RNG.normal(size=(9, 3))
IMAGES, MADE = (RNG.uniform(-1, 1, size=(n, 1, 6, 6)).astype(np.float32) for n in (20, 8))
