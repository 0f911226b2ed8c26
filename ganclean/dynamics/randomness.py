"""Independent streams of random numbers, derived by hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def stream(seed: int, *names: object) -> int:
    """Return the seed of the stream with some names among those of a seed, from 0 to 2**63 - 1.

    Streams of different names are independent, whatever the seed: nothing is added to it.

    Examples
    --------
    >>> from ganclean.dynamics.randomness import stream
    >>> stream(0, "D", 1) == stream(0, "D", 1), stream(0, "D", 1) == stream(0, "D", 2)
    (True, False)
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int, *devices: torch.device | None) -> Iterator[None]:
    """Seed torch's global generators, of the CPU and of other devices, inside the block and restore them afterwards."""
    generators = [torch.default_generator, *_accelerated(devices)]
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        # Not torch.manual_seed, which on a build with CUDA formats a stack trace whenever it is called.
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before):
            generator.set_state(state)


def random_states(*devices: torch.device | None) -> dict[str, Tensor]:
    """Return the states of torch's global generators by device."""
    return {str(generator.device): generator.get_state() for generator in _generators(devices)}


@contextmanager
def continued(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Put torch's global generators into given states inside the block and restore them afterwards."""
    generators = {str(g.device): g for g in _generators([torch.device(name) for name in states])}
    before = {name: generator.get_state() for name, generator in generators.items()}
    put_back(states)
    try:
        yield
    finally:
        put_back(before)


def put_back(states: Mapping[str, Tensor]) -> None:
    """Put torch's global generators into given states."""
    for generator in _generators([torch.device(name) for name in states]):
        generator.set_state(states[str(generator.device)].cpu())


def _generators(devices) -> list[torch.Generator]:
    return [torch.default_generator, *_accelerated(devices)]


def _accelerated(devices) -> list[torch.Generator]:
    cuda = dict.fromkeys(d.index or 0 for d in devices if d is not None and d.type == "cuda")
    return [torch.cuda.default_generators[index] for index in cuda]
