"""Influence back-ends, by class and by name."""

from importlib.metadata import entry_points

from ganclean.backends.aid import AID
from ganclean.backends.base import InfluenceBackend
from ganclean.backends.baselines import GradientDot, IsolationForestScore, RandomScore
from ganclean.backends.itd import ITD

BACKENDS: dict[str, type[InfluenceBackend]] = {
    "itd": ITD,
    "aid": AID,
    "gradient_dot": GradientDot,
    "isolation_forest": IsolationForestScore,
    "random": RandomScore,
}


def resolve_backend(backend) -> InfluenceBackend:
    """Return the back-end that a name or a back-end object stands for.

    Names are those of this package and those that installed packages offer in the entry-point group
    ``ganclean.backends``.
    """
    if isinstance(backend, InfluenceBackend):
        return backend
    offered = {entry.name: entry for entry in entry_points(group="ganclean.backends")}
    if isinstance(backend, str) and backend in BACKENDS:
        return BACKENDS[backend]()
    if isinstance(backend, str) and backend in offered:
        return offered[backend].load()()
    raise ValueError(
        f"backend must be one of {sorted({*BACKENDS, *offered})} or an InfluenceBackend object; got {backend!r}."
    )


__all__ = [
    "AID",
    "ITD",
    "GradientDot",
    "InfluenceBackend",
    "IsolationForestScore",
    "RandomScore",
    "resolve_backend",
]
