"""What one training step drew and which settings it ran with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

SHIFT = "shifts/"


@dataclass(frozen=True)
class StepRecord:
    """What a training step drew; with the state before it, it determines the state after it.

    A step of `GANTrainer` draws its latents from its seed, so that a store need not keep them; `TrainingStep.drawn`
    fills them in. A step of the user's own loop brings them along.

    Parameters
    ----------
    index : int
        The number of the step, from 0.
    indices : Tensor of shape (batch_size,), int64
        The rows of the data that were drawn.
    seed : int
        Seeds whatever else is random: the latents where none are given, dropout and other noise in the networks.
    latents_d, latents_g : Tensor of shape (batch_size, *latent_shape), optional
        The latents of the discriminator's and of the generator's update. One and the same tensor where both updates
        look at the same samples, which are then generated once. Without an update of the generator, `latents_g` is
        None.
    labels : Tensor of shape (batch_size, ...), optional
        The labels of the drawn instances, where the networks are conditional. They belong to the data and are not
        stored.
    labels_d, labels_g : Tensor of shape (batch_size, ...), optional
        The labels that samples were generated for, where the networks are conditional.
    mixing : Tensor of shape (batch_size,), optional
        Shares of the real instances in the points at which a gradient penalty was taken; default drawn from the seed.
    updates_generator : bool, default=True
        Whether the step updates the generator too, or only the discriminator.
    number_d, number_g : int, optional
        The numbers of these updates of the two networks, from 1, which bias corrections depend on; default index + 1.
    settings_d, settings_g : dict, optional
        Hyper-parameters of the optimisers in this step where they differ from those of the rule, such as a scheduled
        learning rate.
    shifts : dict of str to Tensor, optional
        By how much buffers were changed between the last step and this one, by ``player/name``, as sampling in training
        mode changes running statistics.
    """

    index: int
    indices: Tensor
    seed: int
    latents_d: Tensor | None = None
    latents_g: Tensor | None = None
    labels: Tensor | None = None
    labels_d: Tensor | None = None
    labels_g: Tensor | None = None
    mixing: Tensor | None = None
    updates_generator: bool = True
    number_d: int = 0
    number_g: int = 0
    settings_d: Mapping[str, Any] = field(default_factory=dict)
    settings_g: Mapping[str, Any] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("number_d", "number_g"):
            # In a captured graph it is a tensor, of which nobody can know whether it is 0.
            if isinstance(getattr(self, name), int) and not getattr(self, name):
                object.__setattr__(self, name, self.index + 1)


def packed(records: Sequence[StepRecord]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of records under names such as ``42/indices``, and the rest as what JSON knows."""
    tensors: dict[str, Tensor] = {}
    steps = []
    for record in records:
        own = _tensors(record)
        names = [field.name for field in fields(record) if field.name not in own and field.name != "shifts"]
        values = {name: getattr(record, name) for name in names}
        shared = record.latents_d is not None and record.latents_g is record.latents_d
        if shared:
            del own["latents_g"]
        tensors |= {f"{record.index}/{name}": tensor for name, tensor in own.items()}
        values = {name: value for name, value in values.items() if value is not None}
        steps.append({"values": values, "tensors": list(own), "shared": shared})
    return tensors, {"steps": steps}


def unpacked(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> list[StepRecord]:
    """Invert `packed`."""
    records = []
    for step in rest["steps"]:
        values = {name: _tuples(value) for name, value in step["values"].items()}
        own = {name: tensors[f"{values['index']}/{name}"] for name in step["tensors"]}
        if step["shared"]:
            own["latents_g"] = own["latents_d"]
        values["shifts"] = {name.removeprefix(SHIFT): own.pop(name) for name in list(own) if name.startswith(SHIFT)}
        records.append(StepRecord(**values | own))
    return records


def moved(record: StepRecord, device: torch.device | str) -> StepRecord:
    """Return a record with its tensors on a device, except for the row numbers."""
    own = {name: tensor for name, tensor in _tensors(record).items() if name != "indices"}
    there = {id(tensor): tensor.to(device) for tensor in own.values()}
    changes: dict[str, Any] = {name: there[id(own[name])] for name in own if not name.startswith(SHIFT)}
    changes["shifts"] = {name.removeprefix(SHIFT): there[id(own[name])] for name in own if name.startswith(SHIFT)}
    return replace(record, **changes)


def _tensors(record: StepRecord) -> dict[str, Tensor]:
    values = ((field.name, getattr(record, field.name)) for field in fields(record))
    shifts = ((SHIFT + name, shift) for name, shift in record.shifts.items())
    return {name: value for name, value in (*values, *shifts) if isinstance(value, Tensor)}


def _tuples(value: Any) -> Any:
    """Return what JSON made of tuples as tuples again, inside dicts too."""
    if isinstance(value, Mapping):
        return {key: _tuples(child) for key, child in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
