"""Random views of images in plain torch, one batched call on the images' own device."""

import math

import torch
import torch.nn.functional as F


def augment(
    images: torch.Tensor,
    *,
    rotation: float = 10.0,
    shift: float = 0.1,
    scale: float = 0.1,
    noise: float = 0.05,
    flip: bool = False,
    crop: float | None = None,
    color: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return one random view of each image.

    First one affine map (crop, flip, rotation, zoom, shift; bilinear, zeros outside the image), then color, then noise.
    Each image draws its own parameters, uniform over the ranges below. With every range at zero the view is the image.

    Args:
        images: floating ``(N, C, H, W)``, values in [0, 1].
        rotation: largest angle in degrees.
        shift: largest shift along each axis, as a fraction of half the image's side.
        scale: the zoom lies in [1 - scale, 1 + scale]; in [0, 1).
        noise: standard deviation of Gaussian noise, added last; the result is not clipped.
        flip: mirror left and right with probability one half.
        crop: smallest share of the area kept by a random crop that is resized to the full image, in (0, 1];
            ``None`` for no crop.
        color: factors in [1 - color, 1 + color] multiply brightness, contrast (about the image's mean) and saturation
            (about the mean of the channels), then the result is clipped to [0, 1]; in [0, 1].
        generator: source of randomness, on the images' device.

    Returns:
        ``(N, C, H, W)``, dtype and device of ``images``.

    Raises:
        TypeError: ``images`` is not a floating tensor.
        ValueError: ``images`` has another shape, or a range is outside its limits.

    Time and memory are O(N C H W).

    Example:
        >>> augment(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a floating tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"images must be (N, C, H, W) and not empty, got shape {tuple(images.shape)}")
    for name, value, limit in (("rotation", rotation, 180), ("shift", shift, 2), ("noise", noise, math.inf)):
        if not 0 <= value <= limit:
            raise ValueError(f"{name} must lie in [0, {limit}], got {value}")
    if not 0 <= scale < 1:
        raise ValueError(f"scale must lie in [0, 1), got {scale}")
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop must lie in (0, 1] or be None, got {crop}")
    if not 0 <= color <= 1:
        raise ValueError(f"color must lie in [0, 1], got {color}")

    def uniform(*shape: int) -> torch.Tensor:  # on [-1, 1]
        draw = torch.rand(len(images), *shape, generator=generator, dtype=images.dtype, device=images.device)
        return 2 * draw - 1

    if rotation or shift or scale or flip or crop:
        height, width = images.shape[-2:]
        angle = math.radians(rotation) * uniform()
        zoom = 1 + scale * uniform()
        offset = shift * uniform(2)
        if crop is not None:
            side = (crop + (1 - crop) * (uniform() + 1) / 2).sqrt()  # the area is uniform on [crop, 1]
            zoom = zoom / side
            offset = offset + (1 - side).unsqueeze(1) * uniform(2)
        cosine, sine = angle.cos() / zoom, angle.sin() / zoom
        mirror = torch.where(uniform() < 0, -1.0, 1.0).to(images.dtype) if flip else 1.0
        # output to input coordinates; the ratios of the sides keep a rotation rigid on an image that is not square
        first = torch.stack([mirror * cosine, -sine * height / width, offset[:, 0]], dim=1)
        second = torch.stack([mirror * sine * width / height, cosine, offset[:, 1]], dim=1)
        grid = F.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
    if color:
        brightness, contrast, saturation = (1 + color * uniform(3)).unbind(1)
        images = images * brightness.view(-1, 1, 1, 1)
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast.view(-1, 1, 1, 1))
        images = torch.lerp(images.mean(1, keepdim=True), images, saturation.view(-1, 1, 1, 1)).clamp(0, 1)
    if noise:
        images = images + noise * torch.randn(
            images.shape, generator=generator, dtype=images.dtype, device=images.device
        )
    return images


def two_views(
    images: torch.Tensor,
    *,
    rotation: float = 10.0,
    shift: float = 0.1,
    scale: float = 0.1,
    noise: float = 0.05,
    flip: bool = False,
    crop: float | None = None,
    color: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two independent random views of each image, drawn in one batched call of :func:`augment`.

    Args:
        images: floating ``(N, C, H, W)``, values in [0, 1].
        rotation, shift, scale, noise, flip, crop, color, generator: as in :func:`augment`.

    Returns:
        Two tensors ``(N, C, H, W)``; row i of each is a view of image i.

    Raises:
        TypeError, ValueError: as in :func:`augment`.

    Example:
        >>> first, second = two_views(torch.rand(5, 1, 8, 8))
        >>> first.shape == second.shape
        True
    """
    views = augment(
        torch.cat([images, images]),
        rotation=rotation,
        shift=shift,
        scale=scale,
        noise=noise,
        flip=flip,
        crop=crop,
        color=color,
        generator=generator,
    )
    first, second = views.chunk(2)
    return first, second
