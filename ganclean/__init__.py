"""Find the training instances that harm a GAN, remove them, and prove that it helped."""

from ganclean._version import __version__
from ganclean.cleansing import CleansedEstimator, GANInfluence
from ganclean.training.pretraining import train_gan
from ganclean.training.recorder import Recorder
from ganclean.training.trainer import GANTrainer
from ganclean.training.trajectory import Trajectory

__all__ = ["CleansedEstimator", "GANInfluence", "GANTrainer", "Recorder", "Trajectory", "__version__", "train_gan"]
