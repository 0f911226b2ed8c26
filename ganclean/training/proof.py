"""Whether a replay is what was recorded: of our own training to the last bits, of a user's loop beyond rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ganclean.exceptions import ReplayMismatchError
from ganclean.training.record import StepRecord
from ganclean.training.state import Tensors, TrainingState, flatten_state

# How far a recomputed state may be from the recorded one, relative to each tensor's largest magnitude.
TOLERANCE = {torch.float64: 1e-7}
TOLERANCE_OF_OTHER_TYPES = 1e-3

# The loop adds up the same numbers in another order. Its gradients differ from the replayed ones by rounding; those
# that consist of nothing else, such as a bias in front of batch normalisation, are found by their size.
GRADIENT_TOLERANCE = 1e-3
NEGLIGIBLE = 1e-4
CHANGE_TOLERANCE = 2e-2
BUFFER_TOLERANCE = 1e-4
# Over many steps, rounding grows. What then counts is where the parameters went.
SEGMENT_TOLERANCE = 0.25
HINT = (
    "Does the loop do what was declared to the Recorder: loss, penalty, clipping, moving average, and the order real, "
    "generated, interpolated samples? Augmentation belongs into the discriminator, torch.nn.Sequential(DiffAugment(), "
    "discriminator), and all that changes the parameters into the step."
)


def check_replay(recorded: TrainingState, replayed: TrainingState, index: int) -> None:
    """Raise `ReplayMismatchError` where the recomputed state before step `index` is not the recorded one."""
    expected, found = flatten_state(recorded), flatten_state(replayed)
    deviations = {path: _deviation(tensor, found[path]) for path, tensor in expected.items()}
    wrong = [path for path, deviation in deviations.items() if not deviation <= _tolerance(expected[path])]
    if wrong:
        worst = max(wrong, key=lambda path: deviations[path] / _tolerance(expected[path]))
        raise ReplayMismatchError(
            f"Recomputing the steps up to step {index} did not lead to the recorded state: {worst} deviates by "
            f"{deviations[worst]:.1e} of its largest magnitude, {_tolerance(expected[worst]):.0e} is allowed. Either "
            "an operation is not deterministic (see torch.use_deterministic_algorithms), or the machine or the "
            "versions are not those of the recording. Keep more states (a smaller checkpoint_every, 1 for all), so "
            "that fewer are recomputed, or train anew here."
        )


def _deviation(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if torch.equal(expected, found):
        return 0.0
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def _tolerance(tensor: torch.Tensor) -> float:
    return TOLERANCE.get(tensor.dtype, TOLERANCE_OF_OTHER_TYPES)


def check_segment(start: TrainingState, recorded: TrainingState, replayed: TrainingState, index: int) -> None:
    """Raise `ReplayMismatchError` where replaying several steps of a user's loop led far from where it was.

    The distance of both networks' parameters from the recorded ones must be small beside that which they have moved
    since the last recorded state.

    Parameters
    ----------
    start, recorded : TrainingState
        The recorded states before the steps and after them.
    replayed : TrainingState
        What the replay made of the first.
    index : int
        The number of the step that would come next.
    """
    for player in ("generator", "discriminator", "average"):
        before, after, found = (getattr(state, player) for state in (start, recorded, replayed))
        moved, missed = _distance(before, after), _distance(after, found)
        if not missed <= SEGMENT_TOLERANCE * moved:
            raise ReplayMismatchError(
                f"Replaying the steps up to step {index} did not lead to where the loop was: the {player}'s parameters "
                f"are {missed:.2e} away, and they moved by {moved:.2e} in all; {SEGMENT_TOLERANCE:.0%} of that is "
                f"allowed. {HINT} If it does, training amplifies rounding too much to be replayed over so many steps: "
                "keep more states (a smaller checkpoint_every)."
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
        moments, others = (getattr(state, f"moments_{player}") for state in (recorded, replayed))
        for moment, tensors in moments.items():
            # The mean of squares counts like the mean itself.
            power = 0.5 if moment == "square" else 1.0
            scale = _largest(tensors) ** power
            for name, tensor in tensors.items():
                a, b = _power(tensor, power), _power(others[moment][name], power)
                allowed = GRADIENT_TOLERANCE * float(a.abs().max()) + 0.1 * NEGLIGIBLE * scale
                _compare(f"moments_{player}/{moment}/{name}", a, b, allowed, scale, record)
        squares = moments.get("square", {})
        start, there, here = (getattr(state, player) for state in (before, recorded, replayed))
        _check_params(player, start, there, here, squares, record)
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


def _distance(a: Tensors, b: Tensors) -> float:
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a) ** 0.5


def _largest(tensors: Tensors) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors.values()), default=0.0)


def _power(tensor: Tensor, power: float) -> Tensor:
    return tensor if power == 1.0 else tensor.abs() ** power
