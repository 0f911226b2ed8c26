"""Can the influence of this run be trusted? Small random reweightings, predicted and real (theory, section 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import pearsonr
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ganclean.runs.replay import Replay
from ganclean.runs.smoothness import STEP, in_words, random_direction
from ganclean.validation.counterfactual import Judge, replayed

if TYPE_CHECKING:
    from ganclean.cleansing import GANInfluence


@dataclass(frozen=True)
class TrustReport:
    """What tells whether first-order influence holds for a run.

    Parameters
    ----------
    smoothness : float
        The metasmoothness of the traced epochs; see `GANInfluence.smoothness_`.
    predicted, true : ndarray of shape (n_probes,), float64
        The change of the metric under random reweightings of the instances, by influence and by retraining.
    pearson : float
        Their correlation.
    relative_error : float
        ‖predicted − true‖ / ‖true‖.
    """

    smoothness: float
    predicted: np.ndarray
    true: np.ndarray
    pearson: float
    relative_error: float

    def words(self) -> list[str]:
        """Say what the numbers mean, in a sentence each."""
        n, r = len(self.true), self.pearson
        probes = f"Over {n} random reweightings of the data, predicted and real change of the metric have correlation"
        if r >= 0.9:
            verdict = "influence predicts this run well."
        elif r >= 0.5:
            verdict = "influence ranks changes of this run roughly; rely on groups, and confirm by retraining."
        else:
            verdict = "influence does not predict this run; do not act on it without retraining."
        return [in_words(self.smoothness), f"{probes} {r:.2f}: {verdict}"]


def trust_report(
    cleanser: GANInfluence, *, n_probes: int = 10, step: float = STEP, random_state=0, n_jobs: int | None = None
) -> TrustReport:
    """Return how smooth the traced part of a run is, and how well influence predicts random reweightings of it.

    Each probe multiplies the weight of every instance by 1 + h or 1 − h, at random, and retrains the traced epochs.

    Parameters
    ----------
    cleanser : GANInfluence
        Fitted.
    n_probes : int, default=10
    step : float, default=0.1
        h.
    random_state : int, RandomState instance or None, default=0
    n_jobs : int, optional
        How many processes share the probes, through joblib.

    Returns
    -------
    TrustReport

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.validation import trust_report
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=20), random_state=0).fit(X)
    >>> report = trust_report(cleanser)
    >>> report.smoothness > 0.9, report.pearson > 0.9
    (True, True)
    """
    check_is_fitted(cleanser)
    if n_probes < 2:
        raise ValueError(f"At least 2 probes are needed for a correlation; got n_probes={n_probes!r}.")
    trajectory, rng = cleanser.trajectory_, check_random_state(random_state)
    directions = torch.stack([random_direction(len(cleanser.influence_), rng) for _ in range(n_probes)])
    replay = Replay.of(trajectory, trajectory.start_of_last(cleanser.backend_.traced_epochs()))
    weights = torch.cat([torch.ones_like(directions[:1]), 1 + step * directions])
    values = replayed(replay, weights, Judge.of(cleanser, {"": cleanser.metric_}), {}, n_jobs)[:, 0]
    true = values[1:] - values[0]
    # Influence is the change on removal, the weight going from 1 to 0; of this run alone, not of an average over runs.
    influence = cleanser.backend_.influences_[cleanser.metric_name_]
    predicted = -step * directions.numpy() @ influence
    return TrustReport(
        cleanser.smoothness_,
        predicted,
        true,
        float(pearsonr(predicted, true).statistic),
        float(np.linalg.norm(predicted - true) / np.linalg.norm(true)),
    )
