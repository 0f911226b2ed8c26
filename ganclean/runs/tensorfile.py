"""Named tensors in one file, written atomically and read back as they were."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# In bytes; PyTorch allocates at multiples of it.
ALIGNMENT = 64
UNFINISHED = ".unfinished"


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with the path of a temporary file, which then takes the place of `path`."""
    unfinished = path.with_suffix(UNFINISHED)
    write(unfinished)
    os.replace(unfinished, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors, and metadata that JSON knows, into a safetensors file."""
    # Clones, since parameters can be views of one vector, which the format does not allow.
    clones = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    # The format does not keep the order, which vectors of all parameters depend on, nor the alignment, which the last
    # bits of sums and products depend on.
    places = {name: tensor.data_ptr() % ALIGNMENT // tensor.itemsize for name, tensor in tensors.items()}
    note = to_json({"places": places, **metadata})
    write_file(path, lambda unfinished: save_file(clones, unfinished, metadata={"ganclean": note}))


def read_tensors(path: Path, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a file.

    Raises
    ------
    ValueError
        If it is not there, not complete, or not one that `write_tensors` wrote.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = json.loads(file.metadata()["ganclean"])
            tensors = {name: _placed(file.get_tensor(name), at) for name, at in metadata.pop("places").items()}
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return tensors, metadata


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON, where numbers of NumPy are numbers."""
    return json.dumps(value, indent=indent, default=lambda number: number.item())


def content_hash(content: str | Mapping[str, Tensor]) -> str:
    """Return a short hash of a text, or of named tensors with their types and shapes."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(content, str):
        digest.update(content.encode())
    else:
        for name, tensor in content.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _placed(tensor: Tensor, place: int) -> Tensor:
    """Return a copy that begins so many elements after an aligned address."""
    memory = tensor.new_empty(place + tensor.numel())
    return memory[place:].view(tensor.shape).copy_(tensor)
