"""Find the training instances that harm a GAN, remove them, and prove that it helped."""

from importlib import import_module
from typing import TYPE_CHECKING

from ganclean._version import __version__

__all__ = [
    "Average",
    "CleansedEstimator",
    "GANInfluence",
    "GANTrainer",
    "Recorder",
    "Trajectory",
    "Update",
    "__version__",
    "train_gan",
]

if TYPE_CHECKING:
    from ganclean.cleansing import CleansedEstimator, GANInfluence
    from ganclean.dynamics.update import Average, Update
    from ganclean.recorder.recorder import Recorder
    from ganclean.runs.trajectory import Trajectory
    from ganclean.training.pretraining import train_gan
    from ganclean.training.trainer import GANTrainer
else:
    # Each name is imported when it is first asked for, since PyTorch and scikit-learn take seconds to import.
    _MODULES = {
        "Average": "ganclean.dynamics.update",
        "CleansedEstimator": "ganclean.cleansing",
        "GANInfluence": "ganclean.cleansing",
        "GANTrainer": "ganclean.training.trainer",
        "Recorder": "ganclean.recorder.recorder",
        "Update": "ganclean.dynamics.update",
        "Trajectory": "ganclean.runs.trajectory",
        "train_gan": "ganclean.training.pretraining",
    }
    _SUBMODULES = [
        "augmentation",
        "backends",
        "cleansing",
        "data",
        "datasets",
        "distances",
        "dynamics",
        "exceptions",
        "losses",
        "metrics",
        "networks",
        "optim",
        "plotting",
        "recipes",
        "recorder",
        "redaction",
        "reporting",
        "runs",
        "training",
        "validation",
        "valuation",
    ]

    def __getattr__(name):
        if name in _MODULES:
            return globals().setdefault(name, getattr(import_module(_MODULES[name]), name))
        if name in _SUBMODULES:
            return import_module(f"ganclean.{name}")
        raise AttributeError(f"module 'ganclean' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__, *_SUBMODULES})
