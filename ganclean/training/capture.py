"""Training steps as compiled graphs.

In small networks, calling an operation takes longer than computing it. One call of a graph that holds all operations
of a step spares that time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ganclean.training.record import StepRecord
from ganclean.training.state import TrainingState
from ganclean.training.step import TrainingStep, is_shared, shifted

log = logging.getLogger(__name__)

# A run has a few forms of steps: the last batch of an epoch is smaller, a lazy penalty is due or not.
MAX_GRAPHS = 16

Graph = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class CompiledStep(TrainingStep):
    """A training step that runs as a compiled graph, and with it what else is done with a step.

    The operations of a step on plain tensors, backward passes included, are recorded once for each form of a step and
    compiled by `torch.compile`. What differs from step to step (states, instances, latents, the number of the update, a
    scheduled learning rate) are the graph's inputs. Where that does not work, the step runs as it would without, and a
    line is logged: networks that draw random numbers, such as dropout, are one such case.

    Parameters
    ----------
    generator, discriminator, loss, optimizer_generator, optimizer_discriminator, latent_shape, update, ema_decay, \
penalty, conditional
        As of `TrainingStep`.
    """

    def __call__(self, state, record, real, weights=None, push=None, divisor=None, *, functional=False):
        if functional or push is not None:
            return super().__call__(state, record, real, weights, push, divisor, functional=functional)
        return self.run(_next_state, state, record, real, weights, divisor)

    def run(self, function, state, record, real, *others):
        """Return ``function(self, state, record, real, *others)``, computed by a compiled graph where there can be one.

        Parameters
        ----------
        function : callable
            A pure function, the same object in every call. It treats the tensors in its arguments as inputs and all
            else as constants.
        state : TrainingState
        record : StepRecord
        real : Tensor of shape (batch_size, *sample_shape)
        *others
            Whatever else it takes, nested in tuples, lists and dicts.
        """
        return self._graphs(function, self, shifted(state, record), replace(record, shifts={}), real, *others)

    @cached_property
    def plain(self) -> TrainingStep:
        """The same step without graphs."""
        return TrainingStep(*(getattr(self, field.name) for field in fields(TrainingStep)))

    @cached_property
    def _graphs(self) -> _Graphs:
        return _Graphs()


def _next_state(step, state, record, real, weights, divisor):
    return TrainingStep.__call__(step, state, record, real, weights, None, divisor)


class _Graphs:
    """Compiled graphs of functions of a step, made when they are needed."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Graph | None] = {}
        self._gave_up = False

    def __getstate__(self):
        # Graphs stay in their process; another one makes its own.
        return {"_graphs": {}, "_gave_up": False}

    def __call__(
        self, function: Callable, step: TrainingStep, state: TrainingState, record: StepRecord, real: Tensor, *others
    ):
        varying, constant = _split(step, record)
        arguments = state, varying, real, others
        leaves = _leaves_of(arguments, [])
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fixed = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        due = step.penalty is not None and step.penalty.is_due(record.index)
        key = (function, constant, due, tuple(varying), real.shape, real.dtype, real.device, len(inputs), fixed)

        def called(*tensors: Tensor):
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            state, varying, real, others = _rebuilt(arguments, iter(filled))
            return function(step, state, _joined(record, varying), real, *others)

        graph = self._graphs.get(key)
        if graph is not None:
            return graph(inputs)
        result = function(step, state, record, real, *others)
        if key not in self._graphs:
            self._graphs[key] = self._made(called, inputs, result)
        return result

    def _made(self, called: Callable, inputs: list[Tensor], expected: Any) -> Graph | None:
        """Return a graph that agrees with the plain step, or None and say why."""
        # What failed once would fail again, and take its time.
        if self._gave_up:
            return None
        try:
            if len(self._graphs) >= MAX_GRAPHS:
                raise RuntimeError(f"there are {MAX_GRAPHS} graphs already")
            # One tensor in the place of two inputs would make them one.
            inputs = [tensor.detach() for tensor in inputs]
            graph = _compiled(called, inputs)
            deviation = _deviation(graph(inputs), expected)
            if not deviation <= torch.finfo(inputs[0].dtype).eps ** 0.5:
                raise RuntimeError(f"the results of one deviate by {deviation:.1e}")
            return graph
        # Compilers raise whatever there is to raise.
        except Exception as error:
            first_line = next(iter(str(error).strip().splitlines()), "")
            log.warning("Steps run without a compiled graph: %s: %s", type(error).__name__, first_line)
            self._gave_up = True
            return None


def _split(step: TrainingStep, record: StepRecord) -> tuple[dict[str, Any], Hashable]:
    """Return what differs from step to step as tensors, and what decides which operations there are."""
    varying: dict[str, Any] = {
        name: getattr(record, name) for name in ("latents_d", "labels", "labels_d", "labels_g", "mixing")
    }
    if not is_shared(record):
        varying["latents_g"] = record.latents_g
    constant: list[Hashable] = [record.updates_generator, is_shared(record)]
    for player, rule in (("d", step.optimizer_discriminator), ("g", step.optimizer_generator)):
        settings = dict(getattr(record, f"settings_{player}"))
        if hasattr(rule.unclipped, "lr"):
            settings = {"lr": rule.unclipped.lr, **settings}
        numbers = {name: value for name, value in settings.items() if _is_number(value)}
        constant += [tuple(numbers), tuple((n, v) for n, v in settings.items() if n not in numbers)]
        varying[f"settings_{player}"] = {name: _as_tensors(value) for name, value in numbers.items()}
        varying[f"number_{player}"] = _as_tensors(getattr(record, f"number_{player}"))
    return {name: value for name, value in varying.items() if value is not None}, tuple(constant)


def _is_number(value: Any) -> bool:
    """Return whether a hyper-parameter is a number, or several such as Adam's betas."""
    return isinstance(value, float) or (isinstance(value, tuple) and all(isinstance(v, float) for v in value))


def _as_tensors(value: Any) -> Any:
    # In float64, as Python's numbers are.
    if isinstance(value, tuple):
        return tuple(_as_tensors(v) for v in value)
    return torch.tensor(value, dtype=torch.float64)


def _joined(record: StepRecord, varying: dict[str, Any]) -> StepRecord:
    """Return a record of the same form with other values."""
    values = dict(varying)
    if is_shared(record):
        values["latents_g"] = values["latents_d"]
    for name in ("settings_d", "settings_g"):
        values[name] = {**getattr(record, name), **values[name]}
    return replace(record, **values)


def _compiled(called: Callable, inputs: list[Tensor]) -> Graph:
    forms = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        result = called(*tensors)
        leaves = _leaves_of(result, [])
        forms.append(_rebuilt(result, iter([None] * len(leaves))))
        return leaves

    with torch.no_grad():
        recorded = make_fx(flat)(*inputs)
    for node in recorded.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotImplementedError(f"the networks draw random numbers ({node.target})")
    run = torch.compile(recorded, dynamic=False)

    def graph(tensors: list[Tensor]):
        with torch.no_grad():
            return _rebuilt(forms[0], iter(run(*tensors)))

    return graph


def _deviation(found: Any, expected: Any) -> float:
    """Return how far tensors are from others, relative to the largest magnitude of the latter."""
    pairs = list(zip(_leaves_of(found, []), _leaves_of(expected, [])))
    largest = max(float(e.abs().max()) for _, e in pairs if e.numel())
    return max(float((f.double() - e.double()).abs().max()) for f, e in pairs if e.numel()) / (largest or 1.0)


# torch's own functions for nested structures take longer than small graphs do.
def _leaves_of(tree: Any, into: list) -> list:
    """Append what is nested in dicts, tuples and lists to a list, and return it."""
    if isinstance(tree, dict):
        for child in tree.values():
            _leaves_of(child, into)
    elif isinstance(tree, (tuple, list)):
        for child in tree:
            _leaves_of(child, into)
    else:
        into.append(tree)
    return into


def _rebuilt(form: Any, leaves: Iterator) -> Any:
    """Return a structure of the same form with other leaves."""
    if isinstance(form, dict):
        return {key: _rebuilt(child, leaves) for key, child in form.items()}
    if isinstance(form, (tuple, list)):
        children = [_rebuilt(child, leaves) for child in form]
        return type(form)(*children) if hasattr(form, "_fields") else type(form)(children)
    return next(leaves)
