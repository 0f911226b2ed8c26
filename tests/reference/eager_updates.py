"""Training by objectives as anybody would write it: the modules themselves, their autograd, and torch.optim.

It shares nothing with the library but the objectives and the seeds of the random streams.
"""

import copy
from types import SimpleNamespace

import torch

from ganclean.dynamics.randomness import stream
from ganclean.optim import Grouped
from tests.reference.eager_training import TORCH_OPTIMIZERS


class EagerPlayer:
    """A module whose calls are each seeded anew; so are those of its submodules."""

    def __init__(self, module, clock, name):
        self._module, self._clock, self._name = module, clock, name

    def __call__(self, *args, **kwargs):
        number = self._clock.calls.get(self._name, 0)
        self._clock.calls[self._name] = number + 1
        before = torch.get_rng_state()
        torch.manual_seed(stream(*self._clock.at, self._name, number))
        try:
            return self._module(*args, **kwargs)
        finally:
            torch.set_rng_state(before)

    def __getattr__(self, name):
        value = getattr(self._module, name)
        return EagerPlayer(value, self._clock, self._name) if isinstance(value, torch.nn.Module) else value


class EagerPlayers(SimpleNamespace):
    def slope(self, function, samples):
        if not samples.requires_grad:
            samples = samples.detach().requires_grad_()
        output = function(samples)
        return output, torch.autograd.grad(output.sum(), samples, create_graph=True)[0]


def parameters_of(step, update, modules):
    return {f"{p}.{n}": modules[p].get_parameter(n) for p, n in step.names[update.name]}


def torch_optimizer_of(rule, named):
    if not isinstance(rule, Grouped):
        return TORCH_OPTIMIZERS[type(rule)](named.values(), **rule.get_params())
    groups = []
    for part, params in rule._parts(named):
        groups.append({"params": list(params.values()), **part.get_params()})
    return TORCH_OPTIMIZERS[type(next(iter(rule.rules.values())))](groups)


def train_by_objectives(step, players, X, y, trajectory, weights=None):
    """Return the trained modules and the averaged values of each player (buffers included), by its name."""
    modules = {name: copy.deepcopy(module).train() for name, module in players.items()}
    clock = SimpleNamespace(calls={}, at=None)
    moved: dict = {}
    for update in step.updates:
        moved.setdefault(update.slot, {}).update(parameters_of(step, update, modules))
    optimizers = {slot: torch_optimizer_of(step.update_named(slot).optimizer, named) for slot, named in moved.items()}
    carried = {name: torch.as_tensor(value, dtype=X.dtype).clone() for name, value in step.carried.items()}
    averages = {name: {n: v.clone() for n, v in modules[name].state_dict().items()} for name in step.averages}
    for t in range(len(trajectory)):
        record = trajectory[t]
        w = torch.ones(len(record.indices), dtype=X.dtype) if weights is None else weights[record.indices]
        start = copy.deepcopy(modules) if any(done.meets for done in record.updates) else {}
        for k, done in enumerate(record.updates):
            met = {name: start[name] if name in done.meets else module for name, module in modules.items()}
            nets = EagerPlayers(**{name: EagerPlayer(module, clock, name) for name, module in met.items()})
            update = step.update_named(done.name)
            optimizer, named = optimizers[update.slot], parameters_of(step, update, modules)
            total = {name: torch.zeros_like(p) for name, p in named.items()}
            latents = step.draw_latents(len(w), stream(record.seed, k, done.name, "latents"))
            n, micro = len(w), update.micro
            for i in range(micro):
                rows = slice(n * i // micro, n * (i + 1) // micro)
                batch = SimpleNamespace(
                    x=X[record.indices][rows],
                    y=None if y is None else y[record.indices][rows],
                    index=record.indices[rows],
                    number=t,
                    latents=done.draws.get("latents", latents)[rows],
                    carried=carried,
                    drawn=done,
                )
                clock.calls, clock.at = {}, (record.seed, k, i)
                torch.manual_seed(stream(record.seed, k, i, "objective"))
                loss = update.objective(nets, batch, w[rows]) * (rows.stop - rows.start) / n
                gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for name, gradient in zip(named, gradients):
                    total[name] += 0 if gradient is None else gradient
                carried = {name: torch.as_tensor(value).detach() for name, value in batch.carried.items()}
            for name, p in named.items():
                p.grad = total[name]
            for p in moved[update.slot].values():
                p.grad = p.grad if any(p is q for q in named.values()) else None
            optimizer.step()
            if update.after is not None:
                prefix = f"{update.trains[0]}." if len(update.trains) == 1 else ""
                new = update.after({name.removeprefix(prefix): p.detach() for name, p in named.items()})
                with torch.no_grad():
                    for name, p in named.items():
                        p.copy_(new[name.removeprefix(prefix)])
        for name, average in step.averages.items():
            follow(averages[name], modules[name], average, t)
    return modules, averages


def follow(old, module, average, t):
    """Move an average: of parameters, and of buffers as it says."""
    params = dict(module.named_parameters())
    due = (t + 1) % average.every == 0
    decay = average.decay(t) if callable(average.decay) else average.decay
    for name, value in module.state_dict().items():
        if name in params:
            if due:
                old[name] = decay * old[name] + (1 - decay) * params[name].detach()
        elif average.buffers == "live" or (due and average.buffers == "copied" and decay != 1):
            old[name] = value.clone()
