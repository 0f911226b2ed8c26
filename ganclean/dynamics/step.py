"""One training step as a pure function of the state and of the example weights (theory, section 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ganclean.data import DataSource
from ganclean.dynamics.drawing import Drawing
from ganclean.dynamics.network import Network
from ganclean.dynamics.objective import Calls, Left, Live, Point, evaluated, gradient, point_of
from ganclean.dynamics.players import Players
from ganclean.dynamics.randomness import continued, random_states, seeded, stream
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.update import Average, Update
from ganclean.exceptions import NetworkError
from ganclean.optim import Optimizer
from ganclean.tensors import Tensors


@dataclass(frozen=True)
class Step:
    """The map Φ from a training state and example weights to the next state (theory, section 1).

    A step is an ordered list of updates. Each is the gradient of a scalar in some players' parameters, followed by an
    optimiser's rule; a later one meets the players as the earlier have left them, unless its record says otherwise.

    Parameters
    ----------
    players : dict of str to torch.nn.Module
        Define the architecture; their own parameters serve as the initial ones and are never changed. The player G
        generates.
    updates : tuple of Update
        In the order in which they happen.
    averages : dict of str to Average
        By player.
    carried : dict of str to Tensor
        What objectives hand on from step to step, with its first values.
    sampler : callable, optional
        ``sampler(nets, latents, labels)`` gives the samples that metrics judge; default ``nets.G(latents)``, with
        labels where the networks are conditional.
    latents : callable, optional
        From a number n to n latents, drawn from torch's global generator; default standard normal.
    latent_shape : tuple of int
        The shape of one latent, where `latents` is not given.
    conditional : bool
        Whether batches have labels.
    trained : dict of str to tuple of str, optional
        The names of each player's trained parameters; default those that require a gradient.
    """

    players: Mapping[str, nn.Module]
    updates: tuple[Update, ...]
    averages: Mapping[str, Average] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    sampler: Callable | None = None
    latents: Callable[[int], Tensor] | None = None
    latent_shape: tuple[int, ...] = ()
    conditional: bool = False
    trained: Mapping[str, tuple[str, ...]] | None = None
    # Which calls each update was last seen to make: what that makes of some buffers is then known beforehand.
    seen_calls: dict[tuple, Calls] = field(default_factory=dict, repr=False, compare=False)
    # Updates whose objectives take for a constant what depends on what they train.
    centred: set[str] = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [update.name for update in self.updates]
        doubled = sorted({str(name) for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"Updates need names of their own; got {doubled} more than once. Pass Update(name=...).")
        for update in self.updates:
            if update.slot not in names or isinstance(self._by_name[update.slot].optimizer, str):
                raise ValueError(
                    f"The update {update.name!r} shares the optimiser of {update.slot!r}; expected the name of an "
                    f"update with a rule of its own among {names}."
                )
        for player in self.averages:
            if player not in self.players:
                raise ValueError(f"There is no player {player!r} to average; the players are {list(self.players)}.")

    @cached_property
    def _by_name(self) -> dict[str | None, Update]:
        return {update.name: update for update in self.updates}

    @property
    def generator(self) -> nn.Module:
        """The player G."""
        return self.players["G"]

    @property
    def discriminator(self) -> nn.Module | None:
        """The player D, where there is one."""
        return self.players.get("D")

    @cached_property
    def networks(self) -> dict[str, Network]:
        """The players as pure functions."""
        return {player: Network(module) for player, module in self.players.items()}

    @cached_property
    def like(self) -> Tensor:
        """A tensor of the type and on the device of the players."""
        for module in self.players.values():
            for p in module.parameters():
                return p.detach().new_empty(0)
        return torch.empty(0)

    @cached_property
    def names(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """For each update, which parameters it trains: pairs of a player and a name in its module."""
        own = self.trained or {
            player: tuple(name for name, p in module.named_parameters() if p.requires_grad)
            for player, module in self.players.items()
        }
        found = {}
        for update in self.updates:
            pairs = []
            for part in update.trains:
                player, _, path = part.partition(".")
                if player not in self.players:
                    raise ValueError(
                        f"The update {update.name!r} trains {part!r}, but the players are {', '.join(self.players)}."
                    )
                inside = [n for n in own.get(player, ()) if not path or f"{n}.".startswith(f"{path}.")]
                if not inside:
                    raise NetworkError(
                        f"The {spoken(player)} has no trainable parameter{' in ' + path if path else ''}: nothing "
                        "would be learned or traced. Check requires_grad."
                    )
                pairs += [(player, name) for name in inside if (player, name) not in pairs]
            assert update.name is not None
            found[update.name] = tuple(pairs)
        return found

    @cached_property
    def _slot_names(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """For each optimiser, by the name of its update, which parameters it moves."""
        slots: dict[str, dict[tuple[str, str], None]] = {}
        for update in self.updates:
            slots.setdefault(update.slot, {}).update(dict.fromkeys(self.names[str(update.name)]))
        return {slot: tuple(pairs) for slot, pairs in slots.items()}

    def update_named(self, name: str) -> Update:
        """Return one of the updates."""
        return self._by_name[name]

    def rule_named(self, name: str) -> Optimizer:
        """Return the rule of one of the updates, which may be that of another."""
        rule = self._by_name[self._by_name[name].slot].optimizer
        assert isinstance(rule, Optimizer)
        return rule

    def rule_of(self, done: UpdateRecord) -> Optimizer:
        """Return the rule of an update as it was then: with its hyper-parameters, and its projection."""
        return self._by_name[done.name].projected(self.rule_named(done.name).at(done.settings))

    def initial_state(self) -> TrainingState:
        """Return the state before the first step: the modules' parameters and buffers, and zero moments."""
        params: dict[str, Tensors] = {player: {} for player in self.players}
        for pairs in self.names.values():
            for player, name in pairs:
                if name not in params[player]:
                    params[player][name] = self.players[player].get_parameter(name).detach().clone()
        buffers = {player: network.buffers() for player, network in self.networks.items()}
        moments = {}
        for slot, pairs in self._slot_names.items():
            moments[slot] = self.rule_named(slot).init(
                {f"{player}.{name}": params[player][name] for player, name in pairs}
            )
        averages = {}
        for player, average in self.averages.items():
            own = params[player] if average.buffers == "live" else {**params[player], **buffers[player]}
            averages[player] = {name: tensor.clone() for name, tensor in own.items()}
        carried = {name: torch.as_tensor(value).detach().clone().to(self.like) for name, value in self.carried.items()}
        return TrainingState(params, moments, averages, buffers, carried)

    def differentiable(self, state: TrainingState) -> TrainingState:
        """Return the part of a state that derivatives flow through: all but constant buffers and counters."""
        traced = {player: network.trace(state.buffers[player]) for player, network in self.networks.items()}
        averages = {
            player: {n: t for n, t in tensors.items() if n in state.params[player] or n in traced[player]}
            for player, tensors in state.averages.items()
        }
        return state._replace(buffers=traced, averages=averages)

    def draw_latents(self, n: int, seed: int | None = None) -> Tensor:
        """Return n latents of a stream; without a seed, from torch's global generator as it is."""
        with nullcontext() if seed is None else seeded(seed):
            if self.latents is None:
                return torch.randn(n, *self.latent_shape, dtype=self.like.dtype).to(self.like.device)
            drawn = self.latents(n)
        if not isinstance(drawn, Tensor) or len(drawn) != n:
            raise ValueError(f"latents({n}) must return a tensor of {n} latents; got {drawn!r}.")
        return drawn.to(self.like) if drawn.is_floating_point() else drawn.to(self.like.device)

    def plan(self, index: int, numbers: Mapping[str, int], settings: Callable[[str, int], Mapping[str, Any]]):
        """Return the updates that are due in a step, and how often each optimiser has updated after it.

        Parameters
        ----------
        index : int
            The number of the step.
        numbers : dict of str to int
            How often each optimiser has updated before.
        settings : callable
            From the name of an update with a rule and the number of its update to scheduled hyper-parameters.
        """
        numbers, done = dict(numbers), []  # type: ignore[var-annotated]
        for update in self.updates:
            if not update.is_due(index):
                continue
            number = numbers[update.slot] = numbers.get(update.slot, 0) + 1
            meets, samples_of = {}, None
            if update.meets == "before" and done:
                trained = {player for player, _ in self.names[str(update.name)]}
                meets = {player: 0 for player in self.players if player not in trained}
                samples_of = 0 if getattr(update.objective, "shares_samples", False) else None
            done.append(UpdateRecord(str(update.name), number, settings(update.slot, number), {}, samples_of, meets))
        return tuple(done), numbers

    def drawn(self, record: StepRecord, source: DataSource) -> StepRecord:
        """Return a record with all that its seed and the data determine: latents, labels and mixing shares."""
        labels = source.labels_of(record.indices) if self.conditional and source.labels is not None else record.labels
        updates: list[UpdateRecord] = []
        for k, done in enumerate(record.updates):
            draw = getattr(self._by_name[done.name].objective, "draw", None)
            if draw is not None:
                known = dict(done.draws)
                if done.samples_of is not None:
                    earlier = updates[done.samples_of].draws
                    known |= {n: earlier[n] for n in ("latents", "labels", "inputs", "output") if n in earlier}
                drawing = Drawing(self, source, len(record.indices), record.index, stream(record.seed, k, done.name))
                done = replace(done, draws=draw(drawing, known))
            updates.append(done)
        return replace(record, labels=labels, updates=tuple(updates))

    def __call__(
        self,
        state: TrainingState,
        record: StepRecord,
        x: Tensor,
        weights: Tensor | None = None,
        *,
        functional: bool = False,
    ) -> TrainingState:
        """Return the state after the step.

        Parameters
        ----------
        state : TrainingState
        record : StepRecord
            Complete, as `drawn` returns it.
        x : Tensor of shape (batch_size, *sample_shape)
            The drawn instances.
        weights : Tensor of shape (batch_size,), optional
            Of the instances; default 1. Weight 0 removes an instance, as the objectives define it, and leaves the terms
            of all others alone.
        functional : bool, default=False
            Whether to take gradients by `torch.func`, so that the step itself can be transformed by it. Otherwise they
            are those of plain autograd, which any module that trains allows.
        """
        return self.states(state, record, x, weights, functional=functional)[0][-1]

    def states(
        self,
        state: TrainingState,
        record: StepRecord,
        x: Tensor,
        weights: Tensor | None = None,
        *,
        functional: bool = False,
    ) -> tuple[list[TrainingState], list[Mapping[str, Tensor]]]:
        """Return the states before the step and after each of its updates, and those of random number generators
        before each update, where they are continued. The last state holds the averages after the step.
        """
        states = [shifted(state, record)]
        randoms: list[Mapping[str, Tensor]] = []
        with continued(record.random) if record.random else nullcontext():
            for k in range(len(record.updates)):
                randoms.append(random_states(x.device) if record.random else {})
                states.append(self._updated(states, k, record, x, weights, functional))
        averages = self.averaged(states[0].averages, states[-1], record)
        states[-1] = states[-1]._replace(averages=averages)
        return states, randoms

    def run(self, function: Callable, state: TrainingState, record: StepRecord, x: Tensor, *others):
        """Return ``function(self, state, record, x, *others)``; a step that is compiled compiles it too."""
        return function(self, state, record, x, *others)

    @property
    def plain(self) -> Step:
        """The step whose operations are called one by one."""
        return self

    def point(self, k: int, states: list[TrainingState], done: UpdateRecord, weights: Tensor) -> Point:
        """Return where the objective of update `k` was evaluated; see `point_of`."""
        return point_of(self, k, states, done, weights)

    def objective(
        self, k: int, record: StepRecord, x: Tensor, point: Point, live: Live, **how: Any
    ) -> tuple[Tensor, Left, dict[str, Tensors]]:
        """Return the scalar of update `k`, what its evaluation leaves, and the players' parameters; see `evaluated`."""
        return evaluated(self, k, record, x, point, live, **how)

    def gradient(
        self, k: int, record: StepRecord, x: Tensor, point: Point, **how: Any
    ) -> tuple[dict[tuple[str, str], Tensor], Left]:
        """Return the gradient of update `k` in what it trains, and what its evaluation leaves; see `gradient`."""
        return gradient(self, k, record, x, point, **how)

    def averaged(self, averages: Mapping[str, Tensors], state: TrainingState, record: StepRecord) -> dict[str, Tensors]:
        """Return the averages after a step, given those before it and the state after its updates."""
        after = {}
        for player, average in self.averages.items():
            old, kept = averages[player], self.decay_of(player, record)
            values = {**state.params[player], **state.buffers[player]}
            after[player] = old
            if kept is not None:
                mixed = {n: n in state.params[player] or average.mixes(tensor) for n, tensor in old.items()}
                after[player] = {
                    name: torch.lerp(values[name], tensor, kept) if mixed[name] else values[name]
                    for name, tensor in old.items()
                }
        return after

    def decay_of(self, player: str, record: StepRecord) -> float | None:
        """Return the share of the old average after a step; None where it does not follow."""
        trained = any(player == p for done in record.updates for p, _ in self.names[done.name])
        decay = self.averages[player].decay_at(record.index)
        return decay if trained and decay != 1 else None

    def sample(
        self,
        params: Mapping[str, Tensors],
        buffers: Mapping[str, Tensors],
        latents: Any,
        labels: Tensor | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Return samples in evaluation mode, what metrics look at; noise in the networks is of a stream of its own."""
        nets = self._evaluating(params, buffers, seed)
        with seeded(stream(seed, "sampler"), self.like.device):
            if self.sampler is not None:
                return self.sampler(nets, latents, labels)
            return nets.G(latents) if labels is None or not self.conditional else nets.G(latents, labels)

    def judge(
        self, params: Mapping[str, Tensors], buffers: Mapping[str, Tensors], samples: Tensor, labels=None
    ) -> Tensor:
        """Return the discriminator's outputs as a vector in evaluation mode."""
        nets = self._evaluating(params, buffers, 0)
        return one_number_per_sample(nets.D(samples) if labels is None else nets.D(samples, labels), len(samples))

    def _evaluating(self, params: Mapping[str, Tensors], buffers: Mapping[str, Tensors], seed: int) -> Players:
        return Players(
            self.networks,
            params,
            params,
            buffers,
            seed_of=lambda player, i: stream(seed, player, i),
            device=self.like.device,
            training=False,
        )

    def _updated(
        self,
        states: list[TrainingState],
        k: int,
        record: StepRecord,
        x: Tensor,
        weights: Tensor | None,
        functional: bool,
    ) -> TrainingState:
        """Return the state after update `k`."""
        done, state = record.updates[k], states[k]
        point = self.point(k, states, done, x.new_ones(len(x)) if weights is None else weights)
        gradient, left = self.gradient(k, record, x, point, functional=functional)
        self.seen_calls[self.form_of(record, k)] = left.calls
        pairs, update = self.names[done.name], self._by_name[done.name]
        params = {f"{player}.{name}": state.params[player][name] for player, name in pairs}
        moments = moments_of(state.moments[update.slot], params)
        new, after = self.rule_of(done).update(
            params, {f"{player}.{name}": g for (player, name), g in gradient.items()}, moments, done.number
        )
        changed = {player: dict(tensors) for player, tensors in state.params.items()}
        for player, name in pairs:
            changed[player][name] = new[f"{player}.{name}"]
        all_moments = {m: {**tensors, **after[m]} for m, tensors in state.moments[update.slot].items()}
        return state._replace(
            params={p: changed[p] if any(p == q for q, _ in pairs) else state.params[p] for p in changed},
            moments={**state.moments, update.slot: all_moments},
            buffers={player: left.buffers[player] for player in self.players},
            carried=left.carried,
        )

    def form_of(self, record: StepRecord, k: int) -> tuple:
        """Return what tells the forms of a step apart that differ in their calls, so far as is known."""
        return tuple(done.name for done in record.updates), k, len(record.indices), record.updates[k].passes


def shifted(state: TrainingState, record: StepRecord) -> TrainingState:
    """Return the state with what was done to the buffers before the step, beside training."""
    if not record.shifts:
        return state
    buffers = {player: dict(tensors) for player, tensors in state.buffers.items()}
    for path, shift in record.shifts.items():
        player, name = path.split("/", 1)
        buffers[player][name] = buffers[player][name] + shift
    return state._replace(buffers=buffers)


def one_number_per_sample(output: Any, n_samples: int) -> Tensor:
    """Return a discriminator's output as a vector, or say that it is not one number per sample."""
    if not isinstance(output, Tensor):
        raise NetworkError(
            f"The discriminator's forward returned a {type(output).__name__}; expected one tensor with one number per "
            "sample. Objectives of your own take whatever it returns: GANTrainer(updates=[...]), or the recipe "
            "ganclean.recipes.acgan for a class beside the logit."
        )
    if output.numel() != n_samples or (output.ndim and output.shape[0] != n_samples):
        raise NetworkError(
            f"The discriminator's output for {n_samples} samples has shape {tuple(output.shape)}; expected one number "
            f"per sample, shape ({n_samples},) or ({n_samples}, 1). Average patch outputs in the module's forward, or "
            "give objectives of your own: GANTrainer(updates=[...])."
        )
    return output.reshape(n_samples)


def moments_of(moments: Mapping[str, Tensors], params: Tensors) -> dict[str, Tensors]:
    """Return the moments of some parameters; of groups with rules of their own, some have not all."""
    return {moment: {n: t for n, t in tensors.items() if n in params} for moment, tensors in moments.items()}


def spoken(player: str) -> str:
    """Return what messages call a player."""
    return {"G": "generator", "D": "discriminator"}.get(player, f"player {player}")
