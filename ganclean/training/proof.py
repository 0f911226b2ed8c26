"""Whether the replay of a recorded step is what a training loop did."""

from __future__ import annotations

import torch
from torch import Tensor

from ganclean.exceptions import ReplayMismatchError
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState

# The loop adds up the same numbers in another order. Its gradients differ from the replayed ones by rounding; those
# that consist of nothing else, such as a bias in front of batch normalisation, are found by their size.
GRADIENT_TOLERANCE = 1e-3
NEGLIGIBLE = 1e-4
CHANGE_TOLERANCE = 2e-2
BUFFER_TOLERANCE = 1e-4
HINT = (
    "Does the loop do what was declared to the Recorder: loss, penalty, clipping, moving average, and the order real, "
    "generated, interpolated samples? Augmentation belongs into the discriminator, torch.nn.Sequential(DiffAugment(), "
    "discriminator), and all that changes the parameters into the step."
)


def check_step(before: TrainingState, recorded: TrainingState, replayed: TrainingState, record: StepRecord) -> None:
    """Raise `ReplayMismatchError` where a replayed step is not what the loop did, beyond rounding.

    Moments are compared by their size. Parameters are compared by how far the step moved them, except where the
    gradient is so small that rounding decides on the direction in which Adam moves them.

    Parameters
    ----------
    before, recorded : TrainingState
        The states before and after the step, as the loop left them.
    replayed : TrainingState
        What the replay made of the state before.
    record : StepRecord
    """
    for player in ("discriminator", "generator"):
        moments = {name: getattr(state, f"moments_{player}") for name, state in (("rec", recorded), ("rep", replayed))}
        for moment, tensors in moments["rec"].items():
            # The mean of squares counts like the mean itself.
            power = 0.5 if moment == "square" else 1.0
            scale = _largest(tensors) ** power
            for name, tensor in tensors.items():
                a, b = _power(tensor, power), _power(moments["rep"][moment][name], power)
                allowed = GRADIENT_TOLERANCE * float(a.abs().max()) + 0.1 * NEGLIGIBLE * scale
                _compare(f"moments_{player}/{moment}/{name}", a, b, allowed, scale, record)
        squares = moments["rec"].get("square", {})
        _check_params(player, *(getattr(state, player) for state in (before, recorded, replayed)), squares, record)
        for name, tensor in getattr(recorded, f"buffers_{player}").items():
            if tensor.is_floating_point():
                other = getattr(replayed, f"buffers_{player}")[name]
                scale = float(tensor.abs().max())
                _compare(f"buffers_{player}/{name}", tensor, other, BUFFER_TOLERANCE * scale, scale, record)
    _check_params("average", before.average, recorded.average, replayed.average, {}, record)


def _check_params(
    player: str, before: Tensors, recorded: Tensors, replayed: Tensors, squares: Tensors, record: StepRecord
) -> None:
    largest = max((float((recorded[n] - p).abs().max()) for n, p in before.items()), default=0.0)
    floor = NEGLIGIBLE * _largest(squares) ** 0.5
    for name, tensor in recorded.items():
        counts = squares[name].sqrt() > floor if squares else torch.ones_like(tensor, dtype=torch.bool)
        change = (tensor - before[name]).abs().where(counts, 0.0)
        rounding = 16 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
        allowed = CHANGE_TOLERANCE * float(change.max()) + NEGLIGIBLE * largest + rounding
        other = torch.where(counts, replayed[name], tensor)
        _compare(f"{player}/{name}", tensor, other, allowed, float(change.max()) or largest, record)


def _compare(path: str, recorded: Tensor, replayed: Tensor, allowed: float, scale: float, record: StepRecord) -> None:
    deviation = float((recorded - replayed).abs().max())
    if not deviation <= allowed:
        relative = deviation / scale if scale else float("inf")
        raise ReplayMismatchError(
            f"Replaying step {record.index} did not give what the loop computed: {path} deviates by {deviation:.2e}, "
            f"{relative:.1%} of what was expected to change; {allowed:.1e} is allowed. {HINT}"
        )


def _largest(tensors: Tensors) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors.values()), default=0.0)


def _power(tensor: Tensor, power: float) -> Tensor:
    return tensor if power == 1.0 else tensor.abs() ** power
