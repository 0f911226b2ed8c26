"""Whether calling the operations of a step takes longer than computing them."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ganclean.dynamics.record import StepRecord
from ganclean.dynamics.state import TrainingState
from ganclean.dynamics.step import Step

# Below so many floating point operations in one call of an operator, calling costs more than computing, and several
# runs or metrics at once are faster than one after another; measured on one CPU thread (benchmarks/retraining.py).
DISPATCH_BOUND = {"cpu": 2e5, "cuda": 2e8}


def is_dispatch_bound(step: Step, state: TrainingState, record: StepRecord, x: Tensor) -> bool:
    """Return whether the operations of a step are so small that calling them is what takes the time.

    It counts operations and does not measure time, so that the answer is the same in every run.
    """
    with _Work() as work:
        step.plain(state, record, x)
    return work.flops / work.calls <= DISPATCH_BOUND.get(x.device.type, DISPATCH_BOUND["cuda"])


class _Work(TorchDispatchMode):
    """Counts calls of operators and their floating point operations.

    `torch.utils.flop_counter.FlopCounterMode` would follow modules too, and fails on parametrised ones.
    """

    calls = flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Imported here, since it brings a compiler along.
        from torch.utils.flop_counter import flop_registry

        result = function(*args, **(kwargs or {}))
        self.calls += 1
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
