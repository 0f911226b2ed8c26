"""One probed step before a long run: can these networks take part, and what will it take?"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ganclean.data import DataSource
from ganclean.dynamics.capture import AnyStep
from ganclean.dynamics.network import Call, Network, assign, copied
from ganclean.dynamics.randomness import seeded
from ganclean.dynamics.record import StepRecord, UpdateRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.step import one_number_per_sample, spoken
from ganclean.exceptions import GANCleanError, NetworkError
from ganclean.runs.checkpoints import CheckpointPlan
from ganclean.tensors import Tensors, leaves

Trace = Callable[[AnyStep, TrainingState, StepRecord, Tensor], None]


@dataclass(frozen=True)
class CostEstimate:
    """What a fit will take, from one probed step of training and of tracing.

    Parameters
    ----------
    n_steps, n_traced : int
        Training steps, and how many of them are traced back.
    seconds_training, seconds_tracing : float
        Wall-clock time on this machine.
    memory_bytes, disk_bytes : int
        What the kept states and records take, in memory or in the trajectory's folder.
    """

    n_steps: int
    n_traced: int
    seconds_training: float
    seconds_tracing: float
    memory_bytes: int
    disk_bytes: int

    @property
    def seconds(self) -> float:
        """Training and tracing together."""
        return self.seconds_training + self.seconds_tracing

    def __str__(self) -> str:
        return (
            f"{self.n_steps} training steps, about {self.seconds_training:.3g} s; {self.n_traced} traced back, about "
            f"{self.seconds_tracing:.3g} s; trajectory: {self.memory_bytes / 2**20:.3g} MiB of memory, "
            f"{self.disk_bytes / 2**20:.3g} MiB of disk"
        )


def check_networks(
    step: AnyStep, source: DataSource, batch_size: int | None = None, recorded: StepRecord | None = None
) -> None:
    """Raise `NetworkError` where the networks do not fit the data, each other, the size of batches or the method.

    Parameters
    ----------
    step : AnyStep
    source : DataSource
    batch_size : int, optional
    recorded : StepRecord, optional
        A complete record of the user's own loop, to be checked with; by default what is checked with is drawn.
    """
    trained = sorted({player for pairs in step.names.values() for player, _ in pairs}, key=list(step.players).index)
    for player in trained:
        own = {n for pairs in step.names.values() for p, n in pairs if p == player}
        kinds = {(p.dtype, p.device) for name, p in step.players[player].named_parameters() if name in own}
        if len(kinds) > 1:
            raise NetworkError(
                f"The {spoken(player)}'s parameters mix types or devices: {sorted(map(str, kinds))}. Cast the module "
                "to one."
            )
    first = {player: next(step.players[player].parameters()) for player in trained}
    for player, p in first.items():
        other, q = next(iter(first.items()))
        if (p.dtype, p.device) != (q.dtype, q.device):
            raise NetworkError(
                f"The {spoken(other)}'s parameters are {q.dtype} on {q.device}, the {spoken(player)}'s {p.dtype} on "
                f"{p.device}. Cast both to the same type and device."
            )
    if is_gan(step) and recorded is None:
        _check_gan(step, source, batch_size)
    else:
        _check_objectives(step, source, batch_size, recorded)


def is_gan(step: AnyStep) -> bool:
    """Return whether all updates are those of the usual GAN, of which it is known what their networks take."""
    return all(hasattr(update.objective, "draw") for update in step.updates)


def _check_gan(step: AnyStep, source: DataSource, batch_size: int | None) -> None:
    _check_labels(step, source)
    n = min(2, len(source))
    real = source[list(range(n))]
    labels = (_labels_for_check(source, n),) if step.conditional else ()
    latents = step.draw_latents(n, 0)
    inputs = {"G": (latents.to(real.device), *labels), "D": (real, *labels)}
    fake = _forward("G", step.networks["G"], inputs["G"])
    if step.sampler is not None:
        return
    if not isinstance(fake, Tensor):
        raise NetworkError(
            f"The generator's forward returned a {type(fake).__name__}; expected one tensor of samples. Wrap the "
            "module so that its forward returns the samples alone."
        )
    if fake.shape != real.shape:
        raise NetworkError(
            f"The generator's samples have shape {tuple(fake.shape[1:])}, the data's {tuple(real.shape[1:])}. They "
            "must agree: change the generator's last layer, or reshape the data."
        )
    one_number_per_sample(_forward("D", step.networks["D"], inputs["D"]), n)
    for player, given in inputs.items():
        network, module = step.networks[player], step.players[player]
        if batch_size is not None and 1 in (batch_size, len(source) % batch_size):
            _check_single(spoken(player), network, tuple(t[:1] for t in given), len(source), batch_size)
        with _uncompiled():
            check_purity(spoken(player), module, network, Call(given))


def _check_labels(step: AnyStep, source: DataSource) -> None:
    if step.conditional and source.labels is None:
        raise NetworkError(
            "The networks are conditional, but there are no labels. Pass them as y, or as the second entry of the "
            "Dataset's items; or leave GANTrainer(conditional=True) out."
        )


def _check_objectives(step: AnyStep, source: DataSource, batch_size: int | None, recorded: StepRecord | None) -> None:
    """Evaluate each objective once, and compare the pure networks with the modules on what they were called with."""
    if recorded is None:
        n = min(len(source), batch_size or 4)
        updates, _ = step.plan(0, {}, lambda *_: {})
        updates = updates or tuple(UpdateRecord(str(update.name)) for update in step.updates)
        record = step.drawn(StepRecord(0, torch.arange(n), 0, updates), source)
    else:
        _check_labels(step, source)
        record, n = recorded, len(recorded.indices)
    calls: dict[str, Call] = {}
    with _listening(step, calls):
        try:
            x = source[record.indices] if record.x is None else record.x
            state = step.plain(step.initial_state(), record, x)
        except (GANCleanError, ValueError):
            raise
        except (RuntimeError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise NetworkError(
                f"An objective fails on {n} instances of shape {tuple(source.sample_shape)}: {type(error).__name__}: "
                f"{error}. It is called as objective(nets, batch, weights); batch.x holds the instances, batch.y is "
                f"{'their labels' if record.labels is not None else 'None, since no labels were given'}."
            ) from error
    labels = None if record.labels is None else record.labels
    samples = step.sample(state.evaluated, state.evaluated_buffers, step.draw_latents(n, 0), labels)
    if not isinstance(samples, Tensor) or len(samples) != n:
        got = f"shape {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise NetworkError(
            f"{n} latents gave samples of {got}; expected one tensor with {n} samples. Say how samples are drawn: "
            "GANTrainer(sampler=lambda nets, latents, labels: ...)."
        )
    for player, call in calls.items():
        with _uncompiled():
            check_purity(spoken(player), step.players[player], step.networks[player], call)


@contextmanager
def _listening(step: AnyStep, calls: dict[str, Call]) -> Iterator[None]:
    """Note the first call of each player as a whole."""
    handles = []
    for player, network in step.networks.items():

        def note(module, args, kwargs, player=player):
            if player not in calls:
                calls[player] = Call(*tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs)))

        handles.append(network.module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Call compiled modules as they were, where torch can: they are compiled anew only so many times."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _labels_for_check(source: DataSource, n: int) -> Tensor:
    """Return labels for the first instances: the lowest and the highest classes, which an embedding must hold."""
    labels = source.labels_of(torch.arange(len(source)))
    return labels[:n] if labels.is_floating_point() else torch.stack([labels.amin(dim=0), labels.amax(dim=0)])[:n]


def _forward(name: str, network: Network, inputs: tuple[Tensor, ...]):
    player, buffers = spoken(name), network.buffers()
    try:
        with torch.no_grad(), seeded(0, inputs[0].device):
            output, after = network({}, buffers, Call(inputs))
    except TypeError as error:
        if "positional argument" not in str(error):
            raise
        raise NetworkError(
            f"The {player}'s forward does not take {len(inputs)} input{'s'[: len(inputs) - 1]} ({error}). A "
            "conditional network takes labels as its second input: set GANTrainer(conditional=True). Any other is to "
            "be wrapped so that it takes one tensor."
        ) from error
    except (RuntimeError, ValueError, IndexError) as error:
        of_labels, hint = "", ""
        if len(inputs) > 1:
            labels = inputs[1]
            of_labels = f" with labels of type {labels.dtype} from {labels.min()} to {labels.max()}"
            hint = (
                ", and what it makes of labels against y: an embedding of n classes takes the integers from 0 to n - 1 "
                "(sklearn.preprocessing.LabelEncoder)"
            )
        raise NetworkError(
            f"The {player} fails on an input of shape {tuple(inputs[0].shape)}{of_labels}: {error}. Check its first "
            f"layer against {'latent_dim of the trainer' if player == 'generator' else 'the shape of the data'}{hint}."
        ) from error
    changed = [n for n, b in buffers.items() if n not in network.traced and not torch.equal(b, after[n])]
    unknown = [n for n in changed if not n.endswith("num_batches_tracked")]
    if unknown:
        owner = network.module.get_submodule(unknown[0].rpartition(".")[0])
        warnings.warn(
            f"The {player}'s buffer {unknown[0]!r} ({type(owner).__name__}) changes during training in a way that is "
            "not known here: it is carried along, but no derivative flows through it.",
            stacklevel=4,
        )
    return output


def _check_single(player: str, network: Network, inputs: tuple[Tensor, ...], n_samples: int, batch_size: int) -> None:
    try:
        with torch.no_grad(), seeded(0, inputs[0].device):
            network({}, network.buffers(), Call(inputs))
    except (RuntimeError, ValueError) as error:
        raise NetworkError(
            f"The {player} fails on a batch of one instance, which {n_samples} instances in batches of {batch_size} "
            f"leave: {error}. Choose a batch_size that leaves none or several; batch normalisation needs two."
        ) from error


def check_purity(player: str, module: nn.Module, network: Network, call: Call) -> None:
    """Raise `NetworkError` where the pure function of a module does not do what the module does, call after call."""
    plain, own, buffers = copied(module), network.buffers(), network.buffers()
    if not plain.training:
        plain.train()
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    for seed in range(2):
        # Moved, to find out a module that holds on to what it was made of.
        theta = {
            n: p.detach() + 0.1 * (float(p.detach().abs().mean()) or 0.1) * _noise(p, seed) for n, p in trained.items()
        }
        assign(plain, theta)
        try:
            expected = _called_plainly(plain, trained, call, seed)
            found = _called_purely(network, theta, buffers, call, seed)
        except (RuntimeError, NotImplementedError) as error:
            raise _untraceable(error) from error
        buffers = found[2]
        for what, one, other in [
            ("its output", found[0], expected[0]),
            ("the gradient in ", found[1], expected[1]),
            *((f"after the call the buffer {name}", {"": b}, {"": expected[2][name]}) for name, b in buffers.items()),
            *((f"before the call the buffer {n}", {"": b}, {"": own[n]}) for n, b in network.buffers().items()),
        ]:
            largest = max((float(t.detach().abs().max()) for t in other.values() if t.numel()), default=0.0)
            for name, tensor in other.items():
                if not tensor.numel():
                    continue
                deviation = float((one[name].double() - tensor.detach().double()).abs().max())
                eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
                if deviation > eps**0.5 * largest:
                    raise NetworkError(
                        f"The {player}, called with given parameters and buffers, does not do what the module itself "
                        f"does, so that its training could not be replayed: {what}{name} deviates by {deviation:.1e}, "
                        f"where values go up to {largest:.1e}. Known causes: a spectrally normalised layer that "
                        "one forward pass calls twice (use two layers); normalisation inside activation checkpointing "
                        "(call it outside); random numbers that are not torch's; parameters that are reached through "
                        "plain attributes, a list for example."
                    )


def _called_plainly(
    module: nn.Module, trained: Mapping[str, nn.Parameter], call: Call, seed: int
) -> tuple[Tensors, Tensors, Tensors]:
    """Return a module's outputs, the gradient of a random function of them, and the buffers afterwards."""
    device = next(module.parameters()).device
    with torch.enable_grad(), seeded(seed, device):
        outputs = _tensors_of(module(*call.args, **call.kwargs))
        value = _mixed(outputs, seed)
        gradient = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
    return outputs, dict(zip(trained, gradient)), dict(module.named_buffers())


def _called_purely(
    network: Network, theta: Tensors, buffers: Tensors, call: Call, seed: int
) -> tuple[Tensors, Tensors, Tensors]:
    """Return the same of the pure function, called as a training step does."""
    with torch.no_grad():
        buffers = {**buffers, **network.iterate(theta, buffers)}
    params = leaves(theta)
    with network.installed(params), torch.enable_grad(), seeded(seed, next(network.module.parameters()).device):
        output, after = network(params, buffers, call)
        outputs = _tensors_of(output)
        found = torch.autograd.grad(_mixed(outputs, seed), list(params.values()), materialize_grads=True)
    outputs = {name: output.detach() for name, output in outputs.items()}
    return outputs, dict(zip(params, found)), {name: b.detach() for name, b in after.items()}


def _tensors_of(output: object) -> Tensors:
    """Return the floating-point tensors of whatever a module returns."""
    flat = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return {"" if len(flat) == 1 else f" {i}": leaf for i, leaf in enumerate(flat)}


def _mixed(outputs: Tensors, seed: int) -> Tensor:
    return torch.stack([(output * _noise(output, seed)).sum() for output in outputs.values()]).sum()


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _untraceable(error: Exception) -> NetworkError:
    return NetworkError(
        f"A step of this training cannot be run and traced: {error}. Replace the operation; if it only lacks a second "
        "derivative, use ITD(derivative='secant') or AID(derivative='secant'), the default of both, which needs none."
    )


def probe_step(step: AnyStep, source: DataSource, record: StepRecord, trace: Trace) -> tuple[float, float]:
    """Run and trace one step, and return the seconds that each took.

    Raises
    ------
    NetworkError
        If the networks use an operation that cannot be differentiated as the back-end needs it.
    """
    state, real = step.initial_state(), source[record.indices] if record.x is None else record.x
    seconds = []
    for run in (lambda: step(state, record, real), lambda: trace(step, state, record, real)):
        try:
            run()
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        except (RuntimeError, NotImplementedError) as error:
            raise _untraceable(error) from error
    return seconds[0], max(seconds[1] - seconds[0], 0.0)


def estimate_cost(
    step: AnyStep, source: DataSource, record: StepRecord, trace: Trace, plan: CheckpointPlan
) -> CostEstimate:
    """Return what a run takes whose states are kept as planned, if every step is recomputed as often as any is."""
    training, tracing = probe_step(step, source, record, trace)
    n_traced = plan.n_steps - plan.start
    # A seed stands for all else that a step draws.
    records = plan.n_steps * (record.indices.nbytes + 8)
    kept = plan.bytes_kept + records
    return CostEstimate(
        n_steps=plan.n_steps,
        n_traced=n_traced,
        seconds_training=training * plan.n_steps,
        seconds_tracing=(tracing + training * plan.recomputations) * n_traced,
        memory_bytes=plan.bytes_held + (0 if plan.on_disk else kept),
        disk_bytes=kept if plan.on_disk else 0,
    )
