"""What redaction did, and what was paid for it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ganclean.data import DataSource
from ganclean.metrics import FID, PRDC
from ganclean.metrics.extractors import resolve_extractor
from ganclean.redaction.invalidity import Invalidity

LARGE_RECALL_DROP = 0.1


@dataclass(frozen=True)
class RedactionReport:
    """A generator before and after redaction.

    Parameters
    ----------
    invalidity : tuple of two Invalidity
        By the criterion, before and after.
    evaluated : tuple of three Invalidity, or None
        By an independent evaluator, before, after, and of the reference: below what it finds in valid data, it
        cannot tell.
    quality : tuple of two dicts of str to float
        Before and after: ``"frechet_distance"`` to the reference, ``"precision"``, ``"recall"``, ``"density"`` and
        ``"coverage"``.
    n_queries, n_steps : int
        Judged samples and training steps.
    """

    invalidity: tuple[Invalidity, Invalidity]
    evaluated: tuple[Invalidity, Invalidity, Invalidity] | None
    quality: tuple[dict[str, float], dict[str, float]]
    n_queries: int
    n_steps: int

    @property
    def reduction(self) -> float:
        """The share of the invalidity that is gone: by the evaluator where there is one, else by the criterion."""
        before, after = self.invalidity if self.evaluated is None else self.evaluated[:2]
        return 1 - after.rate / before.rate if before.rate else math.nan

    @property
    def recall_drop(self) -> float:
        """By how much recall fell."""
        return self.quality[0]["recall"] - self.quality[1]["recall"]

    def to_dict(self) -> dict[str, Any]:
        """Return all values as what JSON knows; what was not measured as None."""
        values = asdict(self) | {"recall_drop": self.recall_drop}
        values["invalidity"] = [asdict(part) if part.n_samples else None for part in self.invalidity]
        values["reduction"] = None if math.isnan(self.reduction) else self.reduction
        return values

    def __str__(self) -> str:
        rows = [("invalidity by the criterion", *map(str, self.invalidity))]
        if self.evaluated is not None:
            rows.append(("invalidity by the evaluator", *map(str, self.evaluated[:2])))
        rows += [
            (name.replace("_", " "), *(f"{values[name]:.3g}" for values in self.quality)) for name in self.quality[0]
        ]
        lines = [f"{name:<28}  {before:>24}  {after:>24}" for name, before, after in [("", "before", "after"), *rows]]
        if self.evaluated is not None:
            lines.append(f"The evaluator finds {self.evaluated[2]} of the valid reference data invalid.")
        lines.append(f"{self.n_steps} training steps, {self.n_queries} queries of the criterion")
        return "\n".join(lines)


@torch.no_grad()
def quality_of(
    batches: tuple[Tensor, Tensor], reference: DataSource, feature_extractor: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the Fréchet distance, precision, recall, density and coverage of two batches of samples."""
    extractor = resolve_extractor(feature_extractor, reference.sample_shape)
    source = reference.cast(batches[0].dtype, batches[0].device)
    frechet, prdc = FID(extractor).fit(source), PRDC(extractor).fit(source)
    before, after = (
        # The other four compare between as many samples as reference instances.
        {"frechet_distance": float(frechet(batch))} | prdc.compute(batch[: prdc.sample_size])
        for batch in batches
    )
    return before, after
