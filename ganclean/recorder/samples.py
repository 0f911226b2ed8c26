"""How a watched loop's generator is sampled for metrics: from inputs such as it had in training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ganclean.dynamics.record import StepRecord
from ganclean.exceptions import TrajectoryError

# So many rows are kept to be drawn from.
MOST_ROWS = 2**14


class Inputs(NamedTuple):
    """How metrics sample the generator: the step's `latents` and `sampler`, and the shape of a latent."""

    latents: Any
    sampler: Any
    latent_shape: tuple[int, ...]


class RecordedLatents:
    """Draws latents that training drew.

    Parameters
    ----------
    rows : Tensor of shape (n_rows, *latent_shape)
    """

    def __init__(self, rows: Tensor):
        self.rows = rows

    def __call__(self, n: int) -> Tensor:
        return self.rows[_some(len(self.rows), n)]


class RecordedRows:
    """Draws the numbers of inputs that training drew, which `SamplesOfInputs` looks up.

    Parameters
    ----------
    n_rows : int
    """

    def __init__(self, n_rows: int):
        self.n_rows = n_rows

    def __call__(self, n: int) -> Tensor:
        return _some(self.n_rows, n)


class SamplesAt:
    """Calls the generator on latents, and takes the samples out of what it returns.

    Parameters
    ----------
    place : tuple
        Where they are.
    labelled : bool, default=True
        Whether the generator gets labels where there are any.
    """

    def __init__(self, place: tuple, labelled: bool = True):
        self.place, self.labelled = place, labelled

    def __call__(self, nets: Any, latents: Tensor, labels: Tensor | None) -> Tensor:
        given = (latents,) if labels is None or not self.labelled else (latents, labels)
        return _at(nets.G(*given), self.place)


class SamplesOfInputs:
    """Calls the generator on rows of recorded inputs, whatever these are made of.

    Parameters
    ----------
    forms : list of (object, list of Tensor, tuple)
        Inputs that one call can take together: their structure with numbers in the places of tensors, the tensors, and
        where the samples are in the output.
    """

    def __init__(self, forms: list[tuple[Any, list[Tensor], tuple]]):
        self.forms = forms

    @property
    def n_rows(self) -> int:
        """How many inputs there are."""
        return sum(len(tensors[0]) for _, tensors, _ in self.forms)

    def __call__(self, nets: Any, latents: Tensor, labels: Tensor | None) -> Tensor:
        made, places, begin = [], [], 0
        for form, tensors, place in self.forms:
            end = begin + len(tensors[0])
            chosen = ((latents >= begin) & (latents < end)).nonzero()[:, 0]
            if len(chosen):
                rows = latents[chosen] - begin
                args, kwargs = _filled(form, [tensor[rows.to(tensor.device)] for tensor in tensors])
                made.append(_at(nets.G(*args, **kwargs), place))
                places.append(chosen)
            begin = end
        return torch.cat(made)[torch.cat(places).argsort()]


def inputs_as_recorded(records: Iterable[StepRecord], conditional: bool) -> Inputs:
    """Return how to sample the generator on what it was called with in some steps.

    Where that is one tensor of latents, beside labels where the networks are conditional, latents are drawn from them.
    Otherwise whole inputs are.
    """
    calls = []
    for record in records:
        for update in record.updates:
            if "inputs" in update.draws and update.samples_of is None:
                calls.append((update.draws["inputs"], tuple(update.draws.get("output", ())), len(record.indices)))
    if not calls:
        raise TrajectoryError("The record holds no call of the generator.")
    simple = _latents_of(calls, conditional)
    if simple is not None:
        place = calls[0][1]
        return Inputs(RecordedLatents(simple), SamplesAt(place) if place else None, tuple(simple.shape[1:]))
    forms: dict[str, tuple[Any, list[list[Tensor]], tuple]] = {}
    for inputs, place, n in calls:
        tensors: list[Tensor] = []
        form = _form(inputs, n, tensors)
        if tensors:
            key = repr((_hashable(form), place, [tuple(t.shape[1:]) for t in tensors]))
            forms.setdefault(key, (form, [], place))[1].append(tensors)
    sampler = SamplesOfInputs([(f, [torch.cat(parts) for parts in zip(*of)], place) for f, of, place in forms.values()])
    if not sampler.n_rows:
        raise TrajectoryError("The generator was called without a tensor of one row per sample: say how it is sampled.")
    return Inputs(RecordedRows(sampler.n_rows), sampler, ())


def spread(n_steps: int, batch_size: int) -> list[int]:
    """Return some steps all over a run, whose inputs are enough to draw from."""
    wanted = max(1, min(n_steps, -(-MOST_ROWS // max(batch_size, 1))))
    return sorted({i * n_steps // wanted for i in range(wanted)})


def is_standard_normal(latents: Tensor) -> bool:
    """Return whether numbers could be standard normal, by their mean and variance: six standard errors are allowed."""
    if not latents.is_floating_point() or latents.numel() < 2:
        return False
    values, n = latents.double(), latents.numel()
    return abs(float(values.mean())) < 6 / n**0.5 and abs(float(values.var()) - 1) < 6 * (2 / n) ** 0.5


def _latents_of(calls: list, conditional: bool) -> Tensor | None:
    """Return all latents in one tensor, where each call took nothing but one, and labels where there are any."""
    found = []
    for (args, kwargs), place, _ in calls:
        tensors = all(isinstance(value, Tensor) for value in args)
        if kwargs or len(args) != 1 + conditional or not tensors or place != calls[0][1] or not args[0].ndim:
            return None
        found.append(args[0])
    return torch.cat(found) if len({tensor.shape[1:] for tensor in found}) == 1 else None


def _some(n_rows: int, n: int) -> Tensor:
    """Return n random rows: different ones, as long as there are enough."""
    return torch.randperm(n_rows)[:n] if n <= n_rows else torch.randint(n_rows, (n,))


class _Slot(NamedTuple):
    number: int


def _form(node: Any, n: int, tensors: list[Tensor]) -> Any:
    """Return a structure with numbered slots in the places of tensors that hold one row per sample."""
    if isinstance(node, Tensor) and node.ndim and len(node) == n:
        tensors.append(node)
        return _Slot(len(tensors) - 1)
    if isinstance(node, Mapping):
        return {key: _form(child, n, tensors) for key, child in node.items()}
    if isinstance(node, (tuple, list)):
        return type(node)(_form(child, n, tensors) for child in node)
    return node


def _filled(form: Any, tensors: list[Tensor]) -> Any:
    if isinstance(form, _Slot):
        return tensors[form.number]
    if isinstance(form, Mapping):
        return {key: _filled(child, tensors) for key, child in form.items()}
    if isinstance(form, (tuple, list)):
        return type(form)(_filled(child, tensors) for child in form)
    return form


def _hashable(form: Any) -> Any:
    if isinstance(form, Tensor):
        return form.tolist()
    if isinstance(form, Mapping):
        return {key: _hashable(child) for key, child in form.items()}
    if isinstance(form, (tuple, list)) and not isinstance(form, _Slot):
        return [type(form).__name__, *map(_hashable, form)]
    return form


def _at(output: Any, place: tuple) -> Tensor:
    for key in place:
        output = output[key]
    return output
