"""Differentiable augmentation of images, for discriminators that have few of them to learn from."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn


class DiffAugment(nn.Module):
    """Random augmentations of images that gradients pass through, of Zhao et al. (2020).

    In front of a discriminator, ``nn.Sequential(DiffAugment(), discriminator)``, it augments real and generated images
    alike, in the updates of both networks: the generator does not learn to generate augmented images. In evaluation
    mode images pass unchanged.

    Every image is changed in its own way. The random numbers come from torch's global generator of the images' device,
    and are the same for every floating-point type.

    Parameters
    ----------
    policy : str, default="color,translation,cutout"
        What to do, in this order, separated by commas. ``"color"`` changes brightness, then saturation, then contrast.
        ``"translation"`` shifts by whole pixels and fills up with zeros. ``"cutout"`` sets a rectangle to zero.
    brightness : float, default=0.5
        Largest number that is added to, or subtracted from, an image.
    saturation : float, default=1.0
        The differences between a pixel's channels are multiplied by a number between 1 − `saturation` and
        1 + `saturation`.
    contrast : float, default=0.5
        The differences to an image's mean are multiplied by a number between 1 − `contrast` and 1 + `contrast`.
    translation : float, default=0.125
        Largest shift in each direction, as a share of height and width.
    cutout : float, default=0.5
        Sides of the rectangle as a share of height and width. Its centre lies anywhere in the image, and what lies
        outside is lost.

    Raises
    ------
    ValueError
        If `policy` names anything else or a strength is out of range; in a call, if the input is not a batch of images.

    References
    ----------
    Zhao, Liu, Lin, Zhu, Han, *Differentiable Augmentation for Data-Efficient GAN Training*, NeurIPS 2020.

    Examples
    --------
    >>> import torch
    >>> from ganclean.augmentation import DiffAugment
    >>> augment, images = DiffAugment(policy="translation,cutout"), torch.ones(2, 3, 8, 8)
    >>> augment(images).shape
    torch.Size([2, 3, 8, 8])
    >>> torch.equal(augment.eval()(images), images)
    True
    """

    def __init__(
        self,
        policy: str = "color,translation,cutout",
        *,
        brightness: float = 0.5,
        saturation: float = 1.0,
        contrast: float = 0.5,
        translation: float = 0.125,
        cutout: float = 0.5,
    ):
        super().__init__()
        _names(policy)
        self.policy = policy
        self.brightness = _strength("brightness", brightness)
        self.saturation = _strength("saturation", saturation)
        self.contrast = _strength("contrast", contrast)
        self.translation = _strength("translation", translation, largest=1.0)
        self.cutout = _strength("cutout", cutout, largest=1.0)

    def forward(self, images: Tensor) -> Tensor:
        """Return augmented images, or the images themselves in evaluation mode.

        Parameters
        ----------
        images : Tensor of shape (n, channels, height, width), floating point

        Returns
        -------
        Tensor of the same shape and dtype
        """
        _check_images(images)
        if not self.training:
            return images
        for name in _names(self.policy):
            if name == "color":
                images = _recolored(images, self.brightness, self.saturation, self.contrast)
            elif name == "translation":
                images = _translated(images, self.translation)
            else:
                images = _cut_out(images, self.cutout)
        return images

    def extra_repr(self) -> str:
        """Return the parameters, which ``print`` shows."""
        return (
            f"policy={self.policy!r}, brightness={self.brightness}, saturation={self.saturation}, "
            f"contrast={self.contrast}, translation={self.translation}, cutout={self.cutout}"
        )


def _recolored(images: Tensor, brightness: float, saturation: float, contrast: float) -> Tensor:
    images = images + _drawn(images, 0.0, brightness)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + _drawn(images, 1.0, saturation) * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + _drawn(images, 1.0, contrast) * (images - mean)


def _translated(images: Tensor, share: float) -> Tensor:
    for dim in (2, 3):
        size = images.shape[dim]
        furthest = _pixels(share, size)
        shift = torch.randint(-furthest, furthest + 1, (images.shape[0], 1), device=images.device)
        source = torch.arange(size, device=images.device) - shift
        index = _along(dim, source.clamp(0, size - 1)).expand(images.shape)
        images = torch.where(_along(dim, (source >= 0) & (source < size)), images.gather(dim, index), 0.0)
    return images


def _cut_out(images: Tensor, share: float) -> Tensor:
    covered = []
    for dim in (2, 3):
        size = images.shape[dim]
        side = _pixels(share, size)
        # An even side is centred between two pixels, for which there is one place more than there are pixels.
        centre = torch.randint(0, size + 1 - side % 2, (images.shape[0], 1), device=images.device)
        distance = torch.arange(size, device=images.device) - (centre - side // 2)
        covered.append(_along(dim, (distance >= 0) & (distance < side)))
    return torch.where(covered[0] & covered[1], 0.0, images)


def _drawn(images: Tensor, middle: float, spread: float) -> Tensor:
    """Return one number per image between middle − spread and middle + spread, shape (n, 1, 1, 1)."""
    # Drawn in one type whatever that of the images, so that a run can be traced in higher precision.
    uniform = torch.rand((images.shape[0], 1, 1, 1), device=images.device, dtype=torch.float32)
    return middle + spread * (2 * uniform - 1).to(images.dtype)


def _pixels(share: float, size: int) -> int:
    """Return a share of a side in pixels, halves rounded up."""
    return math.floor(share * size + 0.5)


def _along(dim: int, rows: Tensor) -> Tensor:
    """Return numbers of shape (n, size) in the shape that varies along height (`dim` 2) or width (`dim` 3)."""
    return rows[:, None, :, None] if dim == 2 else rows[:, None, None, :]


def _names(policy: str) -> list[str]:
    known = ("color", "translation", "cutout")
    names = [name.strip() for name in policy.split(",")] if isinstance(policy, str) else [policy]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"policy must name some of {', '.join(known)}, separated by commas; got {policy!r}. Leave DiffAugment out "
            "for no augmentation."
        )
    return names


def _strength(name: str, value: float, largest: float = math.inf) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= largest:
        span = "a number that is not negative" if largest == math.inf else f"a share between 0 and {largest:g}"
        raise ValueError(f"{name} must be {span}; got {value!r}. 0 turns it off.")
    return float(value)


def _check_images(images: Tensor) -> None:
    shape = "shape (n, channels, height, width)"
    if not isinstance(images, Tensor):
        raise ValueError(f"DiffAugment needs a tensor of images, {shape}; got a {type(images).__name__}.")
    if images.ndim != 4:
        raise ValueError(
            f"DiffAugment needs images, {shape}; got shape {tuple(images.shape)}. Leave it out for other data, or "
            "reshape them first."
        )
    if not images.is_floating_point():
        raise ValueError(f"DiffAugment needs floating-point images; got {images.dtype}. Convert them with .float().")
