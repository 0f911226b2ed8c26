"""Find the training instances that harm a GAN, remove them, and prove that it helped."""

from importlib import import_module
from typing import TYPE_CHECKING

from ganclean._version import __version__

__all__ = ["CleansedEstimator", "GANInfluence", "GANTrainer", "Recorder", "Trajectory", "__version__", "train_gan"]

if TYPE_CHECKING:
    from ganclean.cleansing import CleansedEstimator, GANInfluence
    from ganclean.training.pretraining import train_gan
    from ganclean.training.recorder import Recorder
    from ganclean.training.trainer import GANTrainer
    from ganclean.training.trajectory import Trajectory
else:
    # Each name is imported when it is first asked for, since PyTorch and scikit-learn take seconds to import.
    _MODULES = {
        "CleansedEstimator": "ganclean.cleansing",
        "GANInfluence": "ganclean.cleansing",
        "GANTrainer": "ganclean.training.trainer",
        "Recorder": "ganclean.training.recorder",
        "Trajectory": "ganclean.training.trajectory",
        "train_gan": "ganclean.training.pretraining",
    }
    _SUBMODULES = [
        "augmentation",
        "backends",
        "cleansing",
        "data",
        "datasets",
        "exceptions",
        "losses",
        "metrics",
        "networks",
        "optim",
        "plotting",
        "redaction",
        "reporting",
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
