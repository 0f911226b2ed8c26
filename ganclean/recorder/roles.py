"""From what was seen in a step to the updates that happened: which calls belong to which, and what each was for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ganclean.dynamics.record import UpdateRecord
from ganclean.dynamics.step import spoken
from ganclean.exceptions import NetworkError
from ganclean.losses import Penalty
from ganclean.recorder.watch import DECLARE, PRECISION, SeenCall, SeenStep, Watch

# How far samples may be from a mixture of real and generated ones, relative to the distance of these.
MIXTURE = 1e-4


@dataclass
class Group:
    """One update, and the discriminator's calls that it looks at.

    Parameters
    ----------
    step : SeenStep
    passes : list of (str, SeenCall)
        In order, with what each is for.
    """

    step: SeenStep
    passes: list[tuple[str, SeenCall]] = field(default_factory=list)


def updates_of(
    watch: Watch, penalty: Penalty | None, y: Tensor | None = None
) -> tuple[tuple[UpdateRecord, ...], Tensor | None]:
    """Return the updates of a watched step, and the labels of its instances where the discriminator gets any.

    The discriminator's calls since the last step of an optimiser belong to the update whose optimiser steps next. Where
    two step without a call in between, the generated samples that a gradient flowed through last are the generator's.
    Calls that no loss uses belong to none.
    """
    groups = _grouped(watch)
    for group in groups:
        _name_passes(group, watch, penalty)
    labels = _labels(groups, watch)
    if y is not None and labels is not None and not (y.shape == labels.shape and torch.equal(y.to(labels), labels)):
        # Something that the loop makes of the labels: it is recorded as it is.
        labels = None
    of_players = {("G", call.role[1]) for group in groups for _, call in group.passes if len(call.role) > 1}
    of_players |= {("D", call.number) for group in groups for _, call in group.passes}
    own: dict[int, int] = {}
    records = []
    for k, group in enumerate(groups):
        idle = [call for call in watch.calls if call.moved_buffers and (call.player, call.number) not in of_players]
        records.append(_record(k, group, groups, own, watch, labels, idle))
    return tuple(records), labels


def _grouped(watch: Watch) -> list[Group]:
    """Return the updates with the calls that belong to them."""
    if not watch.steps:
        if any(call.used for call in watch.calls):
            raise NetworkError(
                "Losses were differentiated in the step, but no optimiser stepped. A GradScaler leaves steps out: "
                + PRECISION.format("a step was skipped")
                + " Several batches for one update are declared: Update(..., micro=n)."
            )
        raise _not_a_step(watch)
    judging = [call for call in watch.calls if call.player == "D"]
    # Where gradients cannot be seen to flow, what has a graph counts.
    judging = [call for call in judging if call.used] or [call for call in judging if call.tracked]
    groups: list[Group] = []
    begin, waiting = 0, list(watch.steps)
    while waiting:
        end = waiting[0].time
        pool = [call for call in judging if begin < call.time < end]
        later = [call.time for call in judging if call.time > end]
        together = [step for step in waiting if not later or step.time < min(later)]
        groups += _shared_out(pool, together, watch)
        begin = together[-1].time
        waiting = waiting[len(together) :]
    return groups


def _shared_out(pool: list[SeenCall], steps: list[SeenStep], watch: Watch) -> list[Group]:
    """Share calls out to the updates whose optimisers step after them, one after the other."""
    names = [step.name for step in steps]
    if len({*names}) < len(names):
        raise NetworkError(
            f"The {spoken(max(names, key=names.count))} was updated twice without being called in between. Let each "
            f"update have calls of its own, or {DECLARE}. {_told(watch)}"
        )
    if not pool:
        raise _not_a_step(watch)
    if len(steps) == 1:
        return [Group(steps[0], [("", call) for call in pool])]
    generated = [call for call in pool if call.role[0] == "generated"]
    last = [call for call in generated if call.attached][-1:] or generated[-1:]
    if not last:
        raise _not_a_step(watch)
    rest = [call for call in pool if call is not last[0]]
    of = {"G": [("", last[0])], "D": [("", call) for call in rest]}
    return [Group(step, list(of[step.name])) for step in steps]


def _name_passes(group: Group, watch: Watch, penalty: Penalty | None) -> None:
    """Say what each call of an update is for."""
    of_d = group.step.name == "D"
    if not group.passes:
        raise NetworkError(
            f"The {spoken(group.step.name)} was updated twice, or without a loss: nothing was judged for this update. "
            f"Let each update have calls of its own, or {DECLARE}. {_told(watch)}"
        )
    named = []
    for _, call in group.passes:
        kind = call.role[0]
        if call.returned != "Tensor":
            raise NetworkError(
                f"The discriminator returned a {call.returned}; a declared loss knows one tensor with one number per "
                f"sample. Keep the network as it is, and {DECLARE}."
            )
        if kind == "other" and of_d and penalty is not None and penalty.at == "interpolated":
            kind = "interpolated"
        if kind == "generated":
            kind = "fake" if of_d else "generator"
        named.append((kind, call))
    reals = [call for kind, call in named if kind == "real"]
    if of_d and len(reals) == 2 and penalty is not None and penalty.at == "real":
        # Two calls on the instances: one for the loss, one for the penalty's slope.
        sloped = [call for call in reals if call.leaf]
        named = [("slope" if call is (sloped or reals)[-1] else kind, call) for kind, call in named]
    group.passes = named
    kinds = [kind for kind, _ in named]
    strange = [call for kind, call in named if kind in ("other", "nothing")]
    if strange:
        raise _strange(strange[0], watch)
    doubled = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    allowed = {"real", "fake", "slope", "interpolated", "real+fake", "fake+real"} if of_d else {"generator"}
    complete = (
        {"real", "fake"} <= {*kinds} or bool({"real+fake", "fake+real"} & {*kinds}) if of_d else kinds == ["generator"]
    )
    if doubled or not complete or not {*kinds} <= allowed:
        expected = "real and generated samples once" if of_d else "generated samples once, and nothing else"
        raise NetworkError(
            f"An update of the {spoken(group.step.name)} must judge {expected}, for the declared loss; this one judged "
            f"{', '.join(kinds)}. For any other loss, {DECLARE}. {_told(watch)}"
        )


def _record(
    k: int,
    group: Group,
    groups: list[Group],
    own: dict[int, int],
    watch: Watch,
    labels: Tensor | None,
    idle: list[SeenCall],
) -> UpdateRecord:
    """Return the record of update `k`; `own` says which calls of the generator earlier updates have made."""
    step, passes = group.step, group.passes
    kinds = tuple(kind for kind, _ in passes)
    made = {call.role[1:] for _, call in passes if len(call.role) > 1}
    if len(made) != 1:
        raise NetworkError(
            f"An update of the {spoken(step.name)} judged samples of {len(made)} calls of the generator; expected "
            f"those of one. For more, {DECLARE}."
        )
    number, place = made.pop()
    of_g = next(call for call in watch.calls if call.player == "G" and call.number == number)
    samples = next(output for at, output in of_g.outputs if at == place)
    meets: dict[str, int] = {}
    versions = {_version(call, watch) for _, call in passes}
    _meet("D", min(versions), k, step, groups, meets)
    samples_of = own.get(number)
    if samples_of is None:
        own[number] = k
        _meet("G", _version(of_g, watch), k, step, groups, meets)
    else:
        # What an earlier update generated, it must have generated as the generator was then.
        known: dict[str, int] = {}
        _meet("G", _version(of_g, watch), k if step.name == "G" else samples_of, step, groups, known)
        if known:
            raise NetworkError(
                "Two updates look at samples that were generated before the generator was updated, and the first of "
                f"them came after it. {DECLARE.capitalize()}. {_told(watch)}"
            )
    draws: dict[str, Any] = {"inputs": (_plain(of_g.args), _plain(of_g.kwargs)), "output": place}
    first = next(_tensors(draws["inputs"]), None)
    if first is not None:
        draws["latents"] = first
    if "interpolated" in kinds:
        draws["mixing"] = _mixing(dict(passes)["interpolated"], watch.x, samples)
    beside = _beside(passes, len(watch.x), labels)
    if "labels" in beside:
        draws["labels"] = beside.pop("labels")
    if beside:
        draws["beside"] = beside
    calls, asides = _calls(k, group, of_g if samples_of is None else None, watch, idle)
    if asides:
        draws["aside"] = asides
    return UpdateRecord(step.name, step.number, dict(step.settings), draws, samples_of, meets, kinds, calls)


def _version(call: SeenCall, watch: Watch) -> int:
    """Return how many updates lay behind a call."""
    return sum(step.time < call.time for step in watch.steps)


def _meet(player: str, version: int, k: int, step: SeenStep, groups: list[Group], meets: dict[str, int]) -> None:
    """Note that an update met a player as it was before other updates of the step, where it did."""
    if not any(groups[j].step.name == player for j in range(version, k)):
        return
    if step.name == player:
        raise NetworkError(
            f"The {spoken(player)} was updated from a loss that was computed before another update of its own; "
            f"expected one evaluation for each update. Call the networks anew, or {DECLARE}."
        )
    meets[player] = version


def _labels(groups: list[Group], watch: Watch) -> Tensor | None:
    """Return what the discriminator gets beside the instances, where that is one label for each."""
    n = len(watch.x)
    for group in groups:
        for kind, call in group.passes:
            args, kwargs = call.beside
            if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].ndim:
                continue
            if kind == "real" and len(args[0]) == n:
                return args[0]
            if kind in ("real+fake", "fake+real") and len(args[0]) == len(call.args[0]):
                return args[0][:n] if kind == "real+fake" else args[0][-n:]
    return None


def _beside(passes: list[tuple[str, SeenCall]], n: int, labels: Tensor | None) -> dict[str, Any]:
    """Return what the discriminator gets beside the samples in each pass, but for the labels, which are the same."""
    found: dict[str, Any] = {}
    of_fake: Tensor | None = None
    for kind, call in passes:
        args, kwargs = call.beside
        if not args and not kwargs and labels is None:
            continue
        one = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].ndim else None
        if labels is not None and one is not None:
            real = {"real+fake": one[:n], "fake+real": one[-n:]}.get(kind, one)
            if kind in ("fake", "generator"):
                of_fake = one
                continue
            if kind in ("real+fake", "fake+real") and torch.equal(real, labels):
                of_fake = one[n:] if kind == "real+fake" else one[:-n]
                continue
            if one.shape == labels.shape and torch.equal(one, labels):
                continue
        found[kind] = (_plain(args), _plain(kwargs))
    return found if of_fake is None else {**found, "labels": of_fake}


def _calls(
    k: int, group: Group, of_g: SeenCall | None, watch: Watch, idle: list[SeenCall]
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[tuple]]]:
    """Return the numbers of the calls that an update makes, and the calls that move buffers, but that no loss uses."""
    begin = watch.steps[k - 1].time if k else 0
    judged = [call for _, call in group.passes]
    asides: dict[str, list[tuple]] = {}
    numbers: dict[str, list[tuple[float, int, int]]] = {"G": [], "D": []}
    for place, call in enumerate(judged):
        numbers["D"].append((place, call.time, call.number))
    if of_g is not None:
        numbers["G"].append((-0.5, of_g.time, of_g.number))
    for call in idle:
        if not begin < call.time < group.step.time:
            continue
        if call.player == "D":
            at: int | str = sum(other.time < call.time for other in judged)
        else:
            at = "first" if of_g is None or call.time < of_g.time else len(judged)
        # Before the pass of that place.
        numbers[call.player].append((-1.0 if isinstance(at, str) else at - 0.1, call.time, call.number))
        asides.setdefault(str(at), []).append((call.player, _plain(call.args), _plain(call.kwargs)))
    return {player: tuple(number for *_, number in sorted(of)) for player, of in numbers.items() if of}, asides


def _mixing(call: SeenCall, x: Tensor, fake: Tensor) -> Tensor:
    """Return the shares of the real instances in the samples that a gradient penalty was taken at."""
    mixed, generated = call.args[0].flatten(1).double(), fake.flatten(1).double()
    if mixed.shape == generated.shape == x.flatten(1).shape:
        apart = x.to(fake).flatten(1).double() - generated
        share = ((mixed - generated) * apart).sum(1) / apart.square().sum(1)
        missed = (mixed - generated - share[:, None] * apart).norm() / apart.norm()
        if bool(share.isfinite().all()) and float(missed) < MIXTURE:
            return share.to(fake.dtype)
    raise NetworkError(
        f"The discriminator was called on samples of shape {tuple(call.args[0].shape)} that are neither the "
        "instances, nor generated, nor mixtures of both with one share for each pair, of which the declared penalty "
        f"is taken. For another penalty, {DECLARE}."
    )


def _plain(node: Any) -> Any:
    """Return inputs as a record can hold them."""
    if isinstance(node, Tensor):
        return node.detach() if node.requires_grad else node
    if isinstance(node, Mapping):
        return {str(key): _plain(child) for key, child in node.items()}
    if isinstance(node, (tuple, list)):
        return type(node)(map(_plain, node)) if type(node) in (tuple, list) else tuple(map(_plain, node))
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if hasattr(node, "item") and not hasattr(node, "__len__"):
        return node.item()
    raise NetworkError(
        f"A network was called with a {type(node).__name__}, which a record cannot hold; expected tensors, numbers and "
        f"strings, in lists and dicts. For anything else, {DECLARE}."
    )


def _tensors(node: Any):
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, (tuple, list, Mapping)):
        for child in node.values() if isinstance(node, Mapping) else node:
            yield from _tensors(child)


def _strange(call: SeenCall, watch: Watch) -> NetworkError:
    if call.role[0] == "nothing":
        return NetworkError(
            f"The discriminator's first input is no tensor of samples. For losses on anything else, {DECLARE}."
        )
    samples, x = call.args[0], watch.x
    if samples.numel() == x.numel() and torch.equal(samples.flatten(), x.to(samples).flatten()):
        return NetworkError(
            f"The discriminator was called on the instances in the shape {tuple(samples.shape)}, but x has the shape "
            f"{tuple(x.shape)}. Pass x as the discriminator gets it, and the data in that shape to fit."
        )
    return NetworkError(
        f"The discriminator was called on samples of shape {tuple(samples.shape)} that are neither the x of the step "
        "nor what the generator returned in it. Inside the step, augmentation belongs into the discriminator, "
        "torch.nn.Sequential(DiffAugment(), discriminator); a gradient penalty is declared, "
        "Recorder(penalty=GradientPenalty()); a network is called itself, not its forward method; of a buffer of "
        f"earlier samples a replay knows nothing. For any other loss, {DECLARE}."
    )


def _not_a_step(watch: Watch) -> NetworkError:
    return NetworkError(
        "A step must judge real and generated samples and update the discriminator, or judge generated samples and "
        f"update the generator, once or several times. {_told(watch)}"
    )


def _told(watch: Watch) -> str:
    """Return in words what was seen."""
    seen: list[tuple[int, str]] = []
    words = {"real": "real", "generated": "generated", "other": "other", "nothing": "no"}
    for call in watch.calls:
        what = "generator called" if call.player == "G" else f"{words.get(call.role[0], call.role[0])} samples judged"
        seen.append((call.time, what if call.player == "G" or call.used else f"{what} without a loss"))
    seen += [(step.time, f"update of the {spoken(step.name)}") for step in watch.steps]
    return f"This one did: {', '.join(what for _, what in sorted(seen)) or 'nothing'}."
