"""Ways to train, as lists of updates: the objectives of well-known GANs, to be used as they are or read as examples."""

from ganclean.recipes.adversarial import gan
from ganclean.recipes.autoencoder import vae
from ganclean.recipes.auxiliary import acgan
from ganclean.recipes.paired import image_to_image
from ganclean.recipes.redacting import redaction
from ganclean.recipes.relativistic import relativistic
from ganclean.recipes.stylegan2 import stylegan2
from ganclean.recipes.wasserstein import wgan_gp

__all__ = ["acgan", "gan", "image_to_image", "redaction", "relativistic", "stylegan2", "vae", "wgan_gp"]
