"""Whether training responds linearly to small changes of the example weights."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from ganclean.dynamics.state import TrainingState, ravel
from ganclean.runs.replay import Replay

STEP = 0.1


def random_direction(n_samples: int, random_state=0) -> Tensor:
    """Return a random direction of reweighting: for each instance 1 or −1."""
    signs = check_random_state(random_state).randint(2, size=n_samples)
    return torch.from_numpy(2.0 * signs - 1.0)


def metasmoothness(replay: Replay, step: float = STEP, random_state=0) -> float:
    """Return how far the end of a run moves on in the same direction when example weights do.

    Three trainings, with the weights 1, 1 + hv and 1 + 2hv for a random v of ±1, end in the generators s₀, s₁, s₂. The
    result is the agreement in sign of s₁ − s₀ and s₂ − s₁, each parameter weighted by |s₁ − s₀|: 1 where training is
    linear, and about 0 where it is chaotic.

    Parameters
    ----------
    replay : Replay
    step : float, default=0.1
        h.
    random_state : int, RandomState instance or None, default=0
        Draws v.

    References
    ----------
    Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, Optimizing ML training with metagradient descent, 2025, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> from ganclean import GANInfluence, GANTrainer
    >>> from ganclean.runs.replay import Replay
    >>> from ganclean.runs.smoothness import metasmoothness
    >>> X = np.random.default_rng(0).normal(size=(60, 2))
    >>> cleanser = GANInfluence(trainer=GANTrainer(n_epochs=3), random_state=0).fit(X)
    >>> metasmoothness(Replay.of(cleanser.trajectory_)) > 0.9
    True
    """
    direction = random_direction(len(replay.source), random_state)
    weights = torch.stack([1 + k * step * direction for k in range(3)])
    ends = replay.map(_generator, weights)
    first, second = ends[1] - ends[0], ends[2] - ends[1]
    size = first.abs()
    if not size.any():
        return float("nan")
    return float((size * torch.sign(first) * torch.sign(second)).sum() / size.sum())


def _generator(state: TrainingState, run: int) -> Tensor:
    return ravel(state.evaluated["G"]).double().cpu()


def in_words(smoothness: float) -> str:
    """Say what a metasmoothness means for the influence of the run."""
    if np.isnan(smoothness):
        return "The weights of the instances do not change what is trained."
    if smoothness >= 0.9:
        return "Training responds almost linearly to small changes of the data: first-order influence applies."
    if smoothness >= 0.5:
        return (
            "Training responds partly linearly to small changes of the data: trust the influence of groups rather than "
            "of single instances, and check it by retraining."
        )
    return (
        "Training is rough: small changes of the data lead anywhere, and influence on this run says little. Use smooth "
        "activations, a lower learning rate, or fewer traced epochs."
    )
