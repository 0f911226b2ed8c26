"""Counterfactual retraining: the recorded run once more, without some instances (theory, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ganclean.training.replay import retrained_states

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence
    from ganclean.metrics import Metric


def counterfactual_retrain(
    cleaner: GANInfluence,
    removals: Sequence[Sequence[int]],
    last_epochs: int | None = None,
    *,
    metric: Metric | None = None,
    renormalize: bool = False,
    vectorize: bool | str = "auto",
    chunk_size: int = 100,
) -> np.ndarray:
    """Return the metric after really retraining without each set of instances.

    The recorded run is replayed from the start of the last epochs, with the same batches, latents and seeds.

    Parameters
    ----------
    cleaner : GANInfluence
        Fitted.
    removals : sequence of sequences of int
        Rows to remove together; an empty one replays the run as it was.
    last_epochs : int, optional
        Replay so many epochs; default the whole run.
    metric : Metric, optional
        Fitted; default the cleaner's own.
    renormalize : bool, default=False
        Whether the discriminator's mean is taken over the remaining instances of a batch; by default the sum is still
        divided by the batch size, which is what influence predicts (theory, section 1).
    vectorize : bool or "auto", default="auto"
        Whether to run the counterfactuals at once by `torch.func.vmap`, which pays where networks are so small that
        calling an operation takes longer than computing it. "auto" takes it where there is no convolution; for small
        convolutions True can be faster.
    chunk_size : int, default=100
        How many run at once.

    Returns
    -------
    ndarray of shape (n_removals,), float64

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import counterfactual_retrain
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleaner = GANInfluence(trainer=GANTrainer(n_epochs=2), random_state=0).fit(X)
    >>> values = counterfactual_retrain(cleaner, [[], [3], [5, 9]])
    >>> bool(np.isclose(values[0], cleaner.metric_value_)), values.shape
    (True, (3,))
    """
    check_is_fitted(cleaner)
    metric = cleaner.metric_ if metric is None else metric
    evaluator = cleaner._evaluator(metric.sample_size)
    states = retrained_states(
        cleaner.trajectory_,
        removals,
        last_epochs,
        renormalize=renormalize,
        vectorize=vectorize,
        chunk_size=chunk_size,
    )
    return np.array([evaluator.value(metric, state) for state in states])
