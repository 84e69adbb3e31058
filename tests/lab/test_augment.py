import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossbook import lab

STILL = {"rotation": 0, "shift": 0, "scale": 0, "noise": 0}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def blob(height=33, width=33, row=0.0, column=0.5, radius=0.15):
    """A smooth spot at (row, column), in units of half the shorter side from the center."""
    half = min(height, width) / 2
    rows = (torch.arange(height) + 0.5 - height / 2) / half
    columns = (torch.arange(width) + 0.5 - width / 2) / half
    distance = (rows[:, None] - row) ** 2 + (columns[None] - column) ** 2
    return torch.exp(-distance / (2 * radius**2)).double().view(1, 1, height, width)


def center(images):
    """The center of mass (N, 2) as row and column in pixels from the image's center."""
    height, width = images.shape[-2:]
    weight = images.sum(1) / images.sum((1, 2, 3)).view(-1, 1, 1)
    rows = torch.arange(height, dtype=images.dtype) + 0.5 - height / 2
    columns = torch.arange(width, dtype=images.dtype) + 0.5 - width / 2
    return torch.stack([(weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)], dim=1)


images_and_options = st.fixed_dictionaries(
    {
        "rotation": st.floats(0, 180),
        "shift": st.floats(0, 0.5),
        "scale": st.floats(0, 0.5),
        "noise": st.floats(0, 0.2),
        "flip": st.booleans(),
        "crop": st.none() | st.floats(0.1, 1),
        "color": st.floats(0, 1),
    }
)


@given(
    images_and_options, st.integers(0, 2**31), st.sampled_from([1, 3]), st.sampled_from([torch.float32, torch.float64])
)
@settings(max_examples=25, deadline=None)
def test_a_generator_makes_views_repeatable(options, seed, channels, dtype):
    images = torch.rand(3, channels, 6, 5, generator=rng(), dtype=dtype)
    state = torch.get_rng_state()
    first = lab.two_views(images, generator=rng(seed), **options)
    again = lab.two_views(images, generator=rng(seed), **options)
    for view, repeated in zip(first, again, strict=True):
        assert view.shape == images.shape and view.dtype == dtype and view.isfinite().all()
        assert torch.equal(view, repeated)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (2, 3, 5, 9)])
def test_ranges_of_zero_give_the_image_back(shape):
    images = torch.rand(shape)
    for view in lab.two_views(images, **STILL):
        assert torch.equal(view, images)
    # through the affine map, too: a crop that keeps everything
    torch.testing.assert_close(lab.augment(images, **STILL, crop=1.0), images, rtol=0, atol=1e-5)


def test_views_are_independent_and_keep_their_rows():
    images = torch.cat([torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8)])
    first, second = lab.two_views(images, generator=rng())
    assert not torch.equal(first, second)
    for view in (first, second):
        assert view[:4].mean() < 0.1 and view[4:].mean() > 0.7
    assert len(first.flatten(1).unique(dim=0)) == 8


def test_one_view_is_the_first_half_of_one_batched_call():
    images = torch.rand(3, 1, 8, 8)
    both = lab.augment(torch.cat([images, images]), generator=rng(5))
    assert torch.equal(torch.cat(lab.two_views(images, generator=rng(5))), both)


@pytest.mark.parametrize(("height", "width"), [(33, 33), (33, 55)])
def test_rotation_is_rigid_and_within_its_range(height, width):
    spots = blob(height, width).expand(200, -1, -1, -1)
    views = lab.augment(spots, **STILL | {"rotation": 30}, generator=rng())
    row, column = center(views).unbind(1)
    torch.testing.assert_close(torch.hypot(row, column), torch.full_like(row, 0.5 * 33 / 2), rtol=0.02, atol=0)
    angle = torch.rad2deg(torch.atan2(row, column))
    assert 27 < angle.max() < 30.5 and -30.5 < angle.min() < -27
    assert abs(angle.mean()) < 4


def test_shift_is_a_fraction_of_half_the_side():
    views = lab.augment(blob(column=0.0).expand(200, -1, -1, -1), **STILL | {"shift": 0.2}, generator=rng())
    moved = center(views) / (33 / 2)
    assert 0.18 < moved.max() < 0.205 and -0.205 < moved.min() < -0.18
    assert abs(torch.corrcoef(moved.T)[0, 1]) < 0.3


def test_scale_zooms_about_the_center():
    views = lab.augment(blob(column=0.4).expand(200, -1, -1, -1), **STILL | {"scale": 0.3}, generator=rng())
    row, column = center(views).unbind(1)
    zoom = column / (0.4 * 33 / 2)
    assert 1.25 < zoom.max() < 1.31 and 0.69 < zoom.min() < 0.75
    assert row.abs().max() < 0.05


def test_flip_mirrors_half_of_the_images():
    images = torch.rand(1, 3, 6, 7).expand(400, -1, -1, -1)
    views = lab.augment(images, **STILL, flip=True, generator=rng())
    mirrored = torch.isclose(views, images.flip(3), atol=1e-5).flatten(1).all(1)
    kept = torch.isclose(views, images, atol=1e-5).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 150 < mirrored.sum() < 250


def test_crop_shows_a_window_of_the_image():
    height = width = 64
    ramp = torch.linspace(0.5, 63.5, 64).expand(height, width) / 64  # value = column
    images = torch.stack([ramp, ramp.T]).expand(300, -1, -1, -1).double()
    views = lab.augment(images, **STILL, crop=0.25, generator=rng())
    inner = views[..., 2:-2, 2:-2]
    columns, rows = inner[:, 0], inner[:, 1]
    sides = (columns[:, 0, -1] - columns[:, 0, 0]) / (59 / 64)
    torch.testing.assert_close(sides, (rows[:, -1, 0] - rows[:, 0, 0]) / (59 / 64), rtol=1e-3, atol=1e-3)
    areas = sides**2
    assert 0.24 < areas.min() < 0.27 and 0.95 < areas.max() < 1.01
    assert abs(areas.mean() - 0.625) < 0.05  # uniform on [0.25, 1]
    assert views.min() > 0  # no window reaches outside


def test_noise_has_its_standard_deviation():
    images = torch.full((20, 1, 32, 32), 0.5)
    noise = lab.augment(images, **STILL | {"noise": 0.2}, generator=rng()) - images
    assert abs(noise.std() - 0.2) < 0.005 and abs(noise.mean()) < 0.01


def test_color_changes_brightness_contrast_and_saturation():
    images = 0.3 + 0.2 * torch.rand(200, 3, 8, 8, generator=rng())
    views = lab.augment(images, **STILL, color=0.4, generator=rng())

    def statistics(batch):
        gray = batch.mean(1, keepdim=True)
        return batch.mean((1, 2, 3)), gray.std((1, 2, 3)), (batch - gray).std((1, 2, 3))

    (mean, contrast, saturation), (mean0, contrast0, saturation0) = statistics(views), statistics(images)
    brightness = mean / mean0
    assert brightness.min() > 0.59 and brightness.max() < 1.41 and brightness.std() > 0.15
    ratio = contrast / contrast0 / brightness
    assert ratio.min() > 0.58 and ratio.max() < 1.42 and ratio.std() > 0.15
    ratio = saturation / saturation0 / (contrast / contrast0)
    assert ratio.min() > 0.58 and ratio.max() < 1.42 and ratio.std() > 0.15
    extreme = lab.augment(torch.rand(50, 3, 8, 8), **STILL, color=1.0)
    assert extreme.min() >= 0 and extreme.max() <= 1


def test_gradients_pass_through():
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    lab.augment(images).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("argument", "value"),
    [("rotation", -1), ("rotation", 181), ("shift", -0.1), ("noise", -0.1), ("noise", float("nan")), ("scale", 1.0)]
    + [("crop", 0.0), ("crop", 1.5), ("color", 1.5)],
)
@pytest.mark.parametrize("function", [lab.augment, lab.two_views])
def test_bad_ranges_are_named(function, argument, value):
    with pytest.raises(ValueError, match=f"^{argument} must"):
        function(torch.rand(2, 1, 8, 8), **{argument: value})


@pytest.mark.parametrize(
    ("images", "error"),
    [(torch.rand(8, 8), ValueError), (torch.rand(0, 1, 8, 8), ValueError), (torch.zeros(2, 1, 8, 8).int(), TypeError)],
)
def test_bad_images_are_named(images, error):
    with pytest.raises(error, match="^images must"):
        lab.augment(images)
