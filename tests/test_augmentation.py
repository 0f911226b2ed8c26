import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from ganclean.augmentation import DiffAugment

sides = st.integers(1, 13)
shapes = st.tuples(st.integers(0, 4), st.integers(1, 5), sides, sides)
POLICIES = ["color", "translation", "cutout", "color,translation,cutout", "cutout, color"]


def images_of(shape, seed=0, dtype=torch.float64):
    """Random images without zeros."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def augmented(images, seed=0, **parameters):
    torch.manual_seed(seed)
    return DiffAugment(**parameters)(images)


def shifted(image, down, right):
    """A reference: roll, then zero what came around."""
    moved = torch.roll(image, (down, right), dims=(1, 2))
    height, width = image.shape[1:]
    for row in range(height):
        for column in range(width):
            if not (0 <= row - down < height and 0 <= column - right < width):
                moved[:, row, column] = 0
    return moved


def cut(image, centre, sides):
    """A reference: zero pixel by pixel around the centre, as far as the pixels exist."""
    image = image.clone()
    for row in range(centre[0] - sides[0] // 2, centre[0] - sides[0] // 2 + sides[0]):
        for column in range(centre[1] - sides[1] // 2, centre[1] - sides[1] // 2 + sides[1]):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                image[:, row, column] = 0
    return image


@given(shape=shapes, seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.125, 0.4, 1.0]))
def test_a_translation_is_one_of_the_allowed_shifts(shape, seed, share):
    images = images_of(shape, seed)
    down, right = (int(share * side + 0.5) for side in shape[2:])
    for image, moved in zip(images, augmented(images, seed, policy="translation", translation=share)):
        candidates = (shifted(image, d, r) for d in range(-down, down + 1) for r in range(-right, right + 1))
        assert any(torch.equal(moved, candidate) for candidate in candidates)


@given(shape=shapes, seed=st.integers(0, 1000), share=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_cutout_is_one_of_the_allowed_rectangles(shape, seed, share):
    images = images_of(shape, seed)
    sides = [int(share * side + 0.5) for side in shape[2:]]
    centres = [range(side + 1 - cutout % 2) for side, cutout in zip(shape[2:], sides)]
    for image, cropped in zip(images, augmented(images, seed, policy="cutout", cutout=share)):
        candidates = (cut(image, (row, column), sides) for row in centres[0] for column in centres[1])
        assert any(torch.equal(cropped, candidate) for candidate in candidates)


def test_every_shift_is_as_likely_as_any_other():
    image = torch.zeros(1, 1, 9, 8)
    image[0, 0, 4, 4] = 1
    moved = augmented(image.expand(6000, 1, 9, 8), policy="translation")
    frequencies = moved.mean(dim=(0, 1))
    expected = torch.zeros(9, 8)
    expected[3:6, 3:6] = 1 / 9
    torch.testing.assert_close(frequencies, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("size", "side"), [(8, 4), (9, 5), (6, 3), (5, 3)])
def test_every_place_of_a_cutout_is_as_likely_as_any_other(size, side):
    hidden = augmented(torch.ones(6000, 1, size, size), policy="cutout")[:, 0] == 0
    assert hidden.flatten(1).sum(1).max() == side**2
    places = size + 1 - side % 2
    covered = torch.zeros(size)
    for centre in range(places):
        covered[max(0, centre - side // 2) : centre - side // 2 + side] += 1 / places
    torch.testing.assert_close(hidden.float().mean(0), covered[:, None] * covered[None], atol=0.03, rtol=0)


@given(shape=shapes, seed=st.integers(0, 1000))
def test_brightness_adds_one_number_to_an_image(shape, seed):
    images = images_of(shape, seed)
    added = augmented(images, seed, policy="color", saturation=0.0, contrast=0.0) - images
    for difference in added:
        torch.testing.assert_close(difference, difference[0, 0, 0].expand(shape[1:]))
        assert -0.5 - 1e-12 <= difference[0, 0, 0] <= 0.5 + 1e-12


@given(shape=shapes, seed=st.integers(0, 1000))
def test_saturation_scales_the_differences_between_channels_and_keeps_their_mean(shape, seed):
    images = images_of(shape, seed)
    changed = augmented(images, seed, policy="color", brightness=0.0, contrast=0.0)
    torch.testing.assert_close(changed.mean(1), images.mean(1))
    for image, new in zip(images, changed):
        difference, scaled = image - image.mean(0), new - new.mean(0)
        factor = (scaled * difference).sum() / difference.square().sum().clamp(min=1e-30)
        torch.testing.assert_close(scaled, factor * difference)
        assert -1e-9 <= factor <= 2 + 1e-9


@given(shape=shapes, seed=st.integers(0, 1000))
def test_contrast_scales_the_differences_within_an_image_and_keeps_its_mean(shape, seed):
    images = images_of(shape, seed)
    changed = augmented(images, seed, policy="color", brightness=0.0, saturation=0.0)
    for image, new in zip(images, changed):
        torch.testing.assert_close(new.mean(), image.mean())
        difference, scaled = image - image.mean(), new - new.mean()
        factor = (scaled * difference).sum() / difference.square().sum().clamp(min=1e-30)
        torch.testing.assert_close(scaled, factor * difference)
        assert image.numel() == 1 or 0.5 - 1e-9 <= factor <= 1.5 + 1e-9


def test_colours_fill_their_ranges_evenly():
    images = images_of((4000, 3, 2, 2))
    added = (augmented(images, policy="color", saturation=0.0, contrast=0.0) - images)[:, 0, 0, 0]
    spread = images.std(dim=(1, 2, 3))
    contrast = augmented(images, policy="color", brightness=0.0, saturation=0.0).std(dim=(1, 2, 3)) / spread
    channels = images.std(dim=1)[:, 0, 0]
    saturation = augmented(images, policy="color", brightness=0.0, contrast=0.0).std(dim=1)[:, 0, 0] / channels
    for values, low, high in ((added, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)):
        quantiles = torch.quantile(values, torch.linspace(0, 1, 5, dtype=values.dtype))
        torch.testing.assert_close(quantiles, torch.linspace(low, high, 5, dtype=values.dtype), atol=0.06, rtol=0)


@given(shape=shapes, policy=st.sampled_from(POLICIES), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_shape_and_type_stay(shape, policy, dtype):
    for kind in (dtype, torch.float32, torch.float64):
        out = augmented(images_of(shape).to(kind), policy=policy)
        assert out.shape == shape and out.dtype == kind


@given(shape=shapes, seed=st.integers(0, 1000), policy=st.sampled_from(POLICIES))
def test_the_seed_decides_whatever_the_precision(shape, seed, policy):
    images = images_of(shape)
    first = augmented(images, seed, policy=policy)
    assert torch.equal(augmented(images, seed, policy=policy), first)
    single = augmented(images.float(), seed, policy=policy)
    torch.testing.assert_close(single.double(), first, rtol=1e-4, atol=1e-5)


def test_other_seeds_and_other_images_of_a_batch_are_augmented_differently():
    images = torch.ones(50, 3, 16, 16)
    first, second = augmented(images, 0), augmented(images, 1)
    assert not torch.equal(first, second)
    assert len({tuple(image.flatten().tolist()) for image in first}) == 50


@pytest.mark.parametrize("policy", POLICIES)
def test_in_evaluation_mode_images_pass_and_no_number_is_drawn(policy):
    images, augment = images_of((3, 3, 6, 5)), DiffAugment(policy=policy).eval()
    state = torch.get_rng_state()
    assert torch.equal(augment(images), images)
    assert torch.equal(torch.get_rng_state(), state)


def test_strengths_of_zero_change_nothing():
    images = images_of((3, 3, 6, 5))
    off = dict.fromkeys(["brightness", "saturation", "contrast", "translation", "cutout"], 0)
    torch.testing.assert_close(augmented(images, **off), images)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 1, 3, 3), (1, 3, 1, 5)])
def test_gradients_are_exact(policy, shape):
    images = images_of(shape).requires_grad_()

    def augment(x):
        return augmented(x, 3, policy=policy)

    assert gradcheck(augment, images, check_forward_ad=True)
    assert gradgradcheck(lambda x: augment(x).pow(3), images)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_transforms_of_torch_apply(policy):
    augment, stacked = DiffAugment(policy=policy), images_of((3, 2, 3, 6, 5))

    def penalty(x):
        return torch.func.grad(lambda y: augment(y).pow(3).sum())(x).square().sum()

    for function in (augment, torch.func.grad(lambda x: augment(x).pow(3).sum()), torch.func.grad(penalty)):
        torch.manual_seed(0)
        together = torch.func.vmap(function, randomness="same")(stacked)
        for images, found in zip(stacked, together):
            torch.manual_seed(0)
            torch.testing.assert_close(found, function(images))


def test_it_goes_in_front_of_a_discriminator():
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 1)).double()
    model = nn.Sequential(DiffAugment(), discriminator)
    images = images_of((4, 3, 6, 6)).requires_grad_()
    torch.manual_seed(0)
    output = model(images)
    torch.testing.assert_close(output, discriminator(augmented(images, 0)))
    assert not list(DiffAugment().parameters()) and not list(DiffAugment().buffers())
    (gradient,) = torch.autograd.grad(output.sum(), images)
    assert gradient.isfinite().all() and gradient.any()
    torch.testing.assert_close(model.eval()(images), discriminator(images))


def test_it_can_be_copied_and_shown():
    augment = copy.deepcopy(DiffAugment("cutout", cutout=0.25))
    assert "policy='cutout'" in repr(augment) and "cutout=0.25" in repr(augment)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"policy": "color,flip"}, r"policy must name some of color, translation, cutout.*got 'color,flip'\. Leave"),
        ({"policy": ""}, "policy must name some of"),
        ({"policy": None}, "policy must name some of .*got None"),
        ({"brightness": -1}, r"brightness must be a number that is not negative; got -1\. 0 turns it off"),
        ({"saturation": "2"}, "saturation must be a number"),
        ({"contrast": True}, "contrast must be a number"),
        ({"translation": 1.5}, "translation must be a share between 0 and 1; got 1.5"),
        ({"cutout": float("nan")}, "cutout must be a share between 0 and 1; got nan"),
    ],
)
def test_a_wrong_parameter_is_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        DiffAugment(**parameters)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(3, 2),
            r"DiffAugment needs images, shape \(n, channels, height, width\); got shape \(3, 2\)\. Leave",
        ),
        (torch.zeros(3, 8, 8), r"got shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"needs floating-point images; got torch\.uint8\. Convert"),
        ([[1.0]], "needs a tensor of images.*got a list"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, message, training):
    with pytest.raises(ValueError, match=message):
        DiffAugment().train(training)(images)
