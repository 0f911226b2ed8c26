"""Training steps as compiled graphs.

In small networks, calling an operation takes longer than computing it. One call of a graph that holds all operations
of a step spares that time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.step import Step, shifted

log = logging.getLogger(__name__)

# A run has a few forms of steps: the last batch of an epoch is smaller, a lazy penalty is due or not.
MAX_GRAPHS = 16

Graph = Callable[[list[Tensor]], Any]


class CompiledStep:
    """A training step that runs as a compiled graph, and with it what else is done with a step.

    The operations of a step on plain tensors, backward passes included, are recorded once for each form of a step and
    compiled by `torch.compile`. What differs from step to step (states, instances, latents, the number of the update, a
    scheduled learning rate) are the graph's inputs. Where that does not work, the step runs as it would without, and a
    line is logged: networks and objectives that draw random numbers are one such case.

    Parameters
    ----------
    step : Step
        Everything but a call and `run` is its own.
    """

    def __init__(self, step: Step):
        self.plain = step
        self._graphs = _Graphs()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "plain":
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __call__(self, state, record, x, weights=None, *, functional=False):
        if functional:
            return self.plain(state, record, x, weights, functional=True)
        return self.run(_next_state, state, record, x, weights)

    def run(self, function, state, record, x, *others):
        """Return ``function(step, state, record, x, *others)``, computed by a compiled graph where there can be one.

        Parameters
        ----------
        function : callable
            A pure function, the same object in every call. It treats the tensors in its arguments as inputs and all
            else as constants.
        state : TrainingState
        record : StepRecord
        x : Tensor of shape (batch_size, *sample_shape)
        *others
            Whatever else it takes, nested in tuples, lists and dicts.
        """
        return self._graphs(function, self.plain, shifted(state, record), replace(record, shifts={}), x, *others)


def _next_state(step, state, record, x, weights):
    return step(state, record, x, weights)


AnyStep = Step | CompiledStep


class _Graphs:
    """Compiled graphs of functions of a step, made when they are needed."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, Graph | None] = {}
        self._told: set[str] = set()

    def __getstate__(self):
        # Graphs stay in their process; another one makes its own.
        return {"_graphs": {}, "_told": set()}

    def __call__(self, function: Callable, step: Step, state: TrainingState, record: StepRecord, x: Tensor, *others):
        varying, constant = _split(step, record)
        arguments = state, varying, x, others
        leaves = _leaves_of(arguments, [])
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        fixed = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        key = (function, constant, x.shape, x.dtype, x.device, len(inputs), fixed)

        def called(*tensors: Tensor):
            rest = iter(tensors)
            filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            state, varying, x, others = _rebuilt(arguments, iter(filled))
            return function(step, state, _joined(record, varying), x, *others)

        graph = self._graphs.get(key)
        if graph is not None:
            return graph(inputs)
        result = function(step, state, record, x, *others)
        if key not in self._graphs:
            self._graphs[key] = self._made(step, called, inputs, result)
        return result

    def _made(self, step: Step, called: Callable, inputs: list[Tensor], expected: Any) -> Graph | None:
        """Return a graph that agrees with the plain step, or None and say why."""
        try:
            if len(self._graphs) >= MAX_GRAPHS:
                raise RuntimeError(f"there are {MAX_GRAPHS} graphs already")
            free = [update.name for update in step.updates if not hasattr(update.objective, "draw")]
            if free:
                raise NotImplementedError(f"what objectives of one's own draw and count is not known ({free[0]})")
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
            reason = f"{type(error).__name__}: {first_line}"
            kind = re.sub(r"\d[\d.e+-]*", "", reason)
            if kind not in self._told:
                log.warning("Steps of one form run without a compiled graph: %s", reason)
                self._told.add(kind)
            return None


def _split(step: Step, record: StepRecord) -> tuple[dict[str, Any], Hashable]:
    """Return what differs from step to step as tensors, and what decides which operations there are."""
    updates, constant = [], []
    for done in record.updates:
        update = step.update_named(done.name)
        settings = dict(done.settings)
        own = step.rule_named(done.name).unclipped
        if hasattr(own, "lr"):
            settings = {"lr": own.lr, **settings}
        numbers = {name: value for name, value in settings.items() if _is_number(value)}
        tensors = {name: draw for name, draw in done.draws.items() if isinstance(draw, Tensor)}
        if done.samples_of is not None:
            # The same tensors as those of the earlier update.
            tensors = {name: draw for name, draw in tensors.items() if name not in ("latents", "labels")}
        varying = {"number": _as_tensors(done.number), "settings": {n: _as_tensors(v) for n, v in numbers.items()}}
        updates.append(varying | {"draws": tensors})
        penalty = getattr(update.objective, "penalty", None)
        due = penalty is not None and penalty.is_due(record.index)
        others = tuple((n, v) for n, v in settings.items() if n not in numbers)
        shared = done.samples_of, tuple(done.meets.items()), done.passes
        constant.append((done.name, tuple(numbers), repr(others), shared, due, tuple(tensors)))
    decays = {player: step.decay_of(player, record) for player in step.averages}
    varying_labels = {} if record.labels is None else {"labels": record.labels}
    return {"updates": updates, **varying_labels}, (tuple(constant), tuple(decays.items()))


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
    updates: list[UpdateRecord] = []
    for done, values in zip(record.updates, varying["updates"]):
        draws = {**done.draws, **values["draws"]}
        if done.samples_of is not None:
            earlier = updates[done.samples_of].draws
            draws |= {name: earlier[name] for name in ("latents", "labels") if name in earlier}
        settings = {**done.settings, **values["settings"]}
        updates.append(replace(done, number=values["number"], settings=settings, draws=draws))
    return replace(record, updates=tuple(updates), labels=varying.get("labels", record.labels))


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
