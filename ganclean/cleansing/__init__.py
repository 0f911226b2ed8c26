"""From influences to kept rows."""

from ganclean.cleansing.influence import GANInfluence
from ganclean.cleansing.meta import CleansedEstimator

__all__ = ["CleansedEstimator", "GANInfluence"]
