"""What an instance is worth without a look at training: credit for samples, and typicality of the data."""

from ganclean.valuation.credit import top_contributors
from ganclean.valuation.criteria import efficiency, identical_attributes, identical_class, out_of_distribution
from ganclean.valuation.density import DensitySelector
from ganclean.valuation.gmvaluator import GMValuator
from ganclean.valuation.quality import DiscriminatorQuality, realism_score

__all__ = [
    "DensitySelector",
    "DiscriminatorQuality",
    "GMValuator",
    "efficiency",
    "identical_attributes",
    "identical_class",
    "out_of_distribution",
    "realism_score",
    "top_contributors",
]
