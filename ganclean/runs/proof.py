"""Whether a replay is what was recorded: of our own training to the last bits, of a user's loop beyond rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import Tensors, TrainingState, flatten_state
from ganclean.dynamics.step import Step, spoken
from ganclean.exceptions import ReplayMismatchError
from ganclean.runs.diagnosis import Diagnosis, Seen

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
    moving = [("params", player) for player in recorded.params] + [("averages", player) for player in recorded.averages]
    off = []
    for field, player in moving:
        before, after, found = (getattr(state, field)[player] for state in (start, recorded, replayed))
        moved, missed = _distance(before, after), _distance(after, found)
        if not missed <= SEGMENT_TOLERANCE * moved:
            off.append((missed / moved if moved else math.inf, field, player, missed, moved))
    if off:
        _, field, player, missed, moved = max(off)
        whose = f"{spoken(player)}'s parameters" if field == "params" else f"average of the {spoken(player)}"
        raise ReplayMismatchError(
            f"Replaying the steps up to step {index} did not lead to where the loop was: the {whose} "
            f"are {missed:.2e} away, and they moved by {moved:.2e} in all; {SEGMENT_TOLERANCE:.0%} of that is "
            "allowed. The loop's first steps were as declared: does it do something else later on, such as a penalty "
            "in every so many steps, clipping from some step on, or another loss? Recorder(n_checked=...) proves more "
            "steps, and says what it finds. If nothing changes, training amplifies rounding too much to be replayed "
            "over so many steps: keep more states (a smaller checkpoint_every)."
        )


def check_step(
    step: Step, before: TrainingState, recorded: TrainingState, record: StepRecord, x: Tensor, seen: Seen
) -> None:
    """Raise `ReplayMismatchError` where a replayed step is not what the loop did, beyond rounding.

    Gradients, where they were seen, and moments are compared by their size. Parameters are compared by how far the step
    moved them, except where the gradient is so small that rounding decides on the direction in which Adam moves them.

    Parameters
    ----------
    step : Step
    before, recorded : TrainingState
        The states before and after the step, as the loop left them.
    record : StepRecord
        Complete.
    x : Tensor of shape (batch_size, *sample_shape)
    seen : Seen
        What else is known of the step.
    """
    diagnosis = Diagnosis(step, before, recorded, record, x, seen)
    compare = _Comparison(diagnosis)
    for k, (expected, found) in enumerate(diagnosis.gradients()):
        scale = _largest(expected)
        for name, tensor in expected.items():
            allowed = GRADIENT_TOLERANCE * float(tensor.abs().max()) + 0.1 * NEGLIGIBLE * scale
            compare(f"the gradient of {name}", tensor, found[name], allowed, scale, k)
    replayed = diagnosis.states[-1]
    squares: dict[str, Tensors] = {}
    for slot, moments in recorded.moments.items():
        for moment, tensors in moments.items():
            # The mean of squares counts like the mean itself.
            power = 0.5 if moment == "square" else 1.0
            scale = _largest(tensors) ** power
            for name, tensor in tensors.items():
                a, b = _power(tensor, power), _power(replayed.moments[slot][moment][name], power)
                allowed = GRADIENT_TOLERANCE * float(a.abs().max()) + 0.1 * NEGLIGIBLE * scale
                compare(f"moments/{slot}/{moment}/{name}", a, b, allowed, scale)
        for name, square in moments.get("square", {}).items():
            player, _, own = name.partition(".")
            squares.setdefault(player, {})[own] = square
    for player in recorded.params:
        start, there, here = (state.params[player] for state in (before, recorded, replayed))
        _check_params(compare, f"params/{player}", start, there, here, squares.get(player, {}))
        for name, tensor in recorded.buffers[player].items():
            if tensor.is_floating_point():
                scale = float(tensor.abs().max()) if tensor.numel() else 0.0
                other = replayed.buffers[player][name]
                compare(f"buffers/{player}/{name}", tensor, other, BUFFER_TOLERANCE * scale, scale)
    for player in recorded.averages:
        start, there, here = (state.averages[player] for state in (before, recorded, replayed))
        _check_params(compare, f"averages/{player}", start, there, here, {})
    for name, tensor in recorded.carried.items():
        scale = float(tensor.abs().max())
        compare(f"carried/{name}", tensor, replayed.carried[name], GRADIENT_TOLERANCE * scale, scale)


class _Comparison:
    """Compares tensors, and raises with the diagnosis where one is off."""

    def __init__(self, diagnosis: Diagnosis):
        self.diagnosis = diagnosis

    def __call__(
        self, path: str, recorded: Tensor, replayed: Tensor, allowed: float, scale: float, update: int | None = None
    ) -> None:
        if not recorded.numel():
            return
        deviation = float((recorded - replayed).abs().max())
        if deviation <= allowed:
            return
        index = self.diagnosis.record.index
        raise ReplayMismatchError(
            f"Replaying step {index} did not give what the loop computed: {path} deviates by {deviation:.2e}, where "
            f"the values that count go up to {scale:.2e} and {allowed:.1e} is allowed. {self.diagnosis(path, update)}"
        )


def _check_params(
    compare: _Comparison, path: str, before: Tensors, recorded: Tensors, replayed: Tensors, squares: Tensors
) -> None:
    largest = max((float((recorded[n] - p).abs().max()) for n, p in before.items() if p.numel()), default=0.0)
    floor = NEGLIGIBLE * _largest(squares) ** 0.5
    for name, tensor in recorded.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Where there never was a gradient, nothing moves by rounding.
        certain = name not in squares or not floor
        counts = torch.ones_like(tensor, dtype=torch.bool) if certain else squares[name].sqrt() > floor
        change = (tensor - before[name]).abs().where(counts, 0.0)
        rounding = 16 * torch.finfo(tensor.dtype).eps * float(tensor.abs().max())
        allowed = CHANGE_TOLERANCE * float(change.max()) + NEGLIGIBLE * largest + rounding
        other = torch.where(counts, replayed[name], tensor)
        compare(f"{path}/{name}", tensor, other, allowed, float(change.max()) or largest)


def _distance(a: Tensors, b: Tensors) -> float:
    return sum(float((a[name] - b[name]).double().square().sum()) for name in a) ** 0.5


def _largest(tensors: Tensors) -> float:
    return max((float(tensor.abs().max()) for tensor in tensors.values()), default=0.0)


def _power(tensor: Tensor, power: float) -> Tensor:
    return tensor if power == 1.0 else tensor.abs() ** power
