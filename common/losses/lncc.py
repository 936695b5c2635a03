# Copyright (c) WarpZoo contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Local normalised cross-correlation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, check_choice, check_images, check_positive, full_precision
from common.losses.gradients import scaled_gradient
from common.losses.windows import Kernel, Moments, window_moments, window_sums

# Voxels worked on at a time. On a CPU the maps of a piece then stay in its cache, which about halves the time; a GPU
# wants few large calls, and the bound only keeps the memory of large scans in check.
_PIECE_CPU = 2**18
_PIECE_GPU = 2**23


class LNCC(nn.Module):
    """Negative mean squared local normalised cross-correlation, in [-1, 0]; -1 is a local affine match everywhere.

    With means over the window around each voxel, c = cov², v = var(moved)·var(fixed), the loss is -mean(c / (v + eps)).

    Published forms differ in where ``eps`` enters, by a factor of 5e5 for a 9³ window: ``form="sum"`` adds it to the
    product of *summed* squares (VoxelMorph, SITReg, TransMorphSPR), ``"mean"`` to the product of variances (AutoPET,
    the Gaussian form of the pretraining code). ``floor="clamp"`` takes the larger of product and eps instead of their
    sum (VFA, with ``eps=1.19e-7``). ``form="mean"`` damps flat regions in which noise would otherwise count in full.

    All of them pad with zeros and count the padding as data (``border="zeros"``). That is harmless in an image with an
    empty rim, but the edge of any other image then looks alike in both, even if both are constant, and more so the
    further the intensities are from 0. ``border="inside"`` counts voxels inside the image only: the loss is then
    unchanged by any affine change of intensities and 0 for constant images.

    Statistics are float32 (float64 for float64 images) whatever autocast says, use no convolution that a GPU might
    run in TF32, and are free of cancellation; see :mod:`common.losses.windows`. The gradient is computed along with
    the value, piece by piece, and only the gradient is kept, so memory stays at a few images. To differentiate it a
    second time is an error.

    Args:
        window: voxels along each side of the window, odd, at least 3. It may exceed the image.
        kernel: "box" or "gaussian".
        form: "mean" or "sum", where ``eps`` enters. A Gaussian's weights add up to 1, so it has but one form.
        sigma: the Gaussian's standard deviation in voxels; ``window / 4.5`` by default, so 2 for the published 9.
        eps: keeps flat regions at 0.
        spatial_dims: 2 or 3 to refuse images of another dimension; None takes any.
        floor: "add" or "clamp", how ``eps`` enters.
        border: "zeros" or "inside", what lies beyond the image.

    Raises:
        ValueError: for an even or too small window, a number that is not positive, an unknown choice, a ``sigma``
            with a box, or ``form="sum"`` with a Gaussian.
    """

    def __init__(
        self,
        window: int = 9,
        kernel: str = "box",
        form: str = "mean",
        sigma: float | None = None,
        eps: float = 1e-5,
        spatial_dims: int | None = None,
        *,
        floor: str = "add",
        border: str = "zeros",
    ) -> None:
        super().__init__()
        if not isinstance(window, int) or isinstance(window, bool) or window < 3 or window % 2 == 0:
            raise ValueError(f"LNCC: window must be an odd whole number of at least 3, got {window}")
        self.window = window
        self.kernel = check_choice("LNCC", "kernel", kernel, ("box", "gaussian"))
        self.form = check_choice("LNCC", "form", form, ("mean", "sum"))
        self.floor = check_choice("LNCC", "floor", floor, ("add", "clamp"))
        self.border = check_choice("LNCC", "border", border, ("zeros", "inside"))
        self.eps = check_positive("LNCC", "eps", eps)
        if spatial_dims not in (None, 1, 2, 3):
            raise ValueError(f"LNCC: spatial_dims must be 1, 2, 3 or None, got {spatial_dims}")
        self.spatial_dims = spatial_dims
        if kernel == "box" and sigma is not None:
            raise ValueError(f"LNCC: sigma {sigma} is for kernel 'gaussian', but the kernel is 'box'")
        if kernel == "gaussian" and form == "sum":
            raise ValueError("LNCC: form 'sum' is for kernel 'box': the weights of a Gaussian add up to 1")
        self.sigma = (
            None if kernel == "box" else check_positive("LNCC", "sigma", window / 4.5 if sigma is None else sigma)
        )

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Minus the mean squared local correlation.

        Args:
            moved: (B, C, *S).
            fixed: (B, C, *S).
            mask: (B or 1, C or 1, *S), how much each voxel counts, in [0, 1]: in the statistics of the windows that
                hold it as well as in the mean, so that values where it is 0 do not matter at all.

        Returns:
            a scalar in [-1, 0], float32 (float64 for float64 images); 0 where the mask is empty.

        Raises:
            TypeError: when an argument is no tensor.
            ValueError: when shapes differ, or the images are not of ``spatial_dims``.
        """
        check_images("LNCC", moved, fixed, mask)
        if self.spatial_dims is not None and moved.ndim != self.spatial_dims + 2:
            raise ValueError(
                f"LNCC: expected {self.spatial_dims} spatial axes, got images of shape {tuple(moved.shape)}"
            )
        settings = _Settings(
            Kernel(self.window, self.sigma), self.form == "sum", self.eps, self.floor == "clamp", self.border == "zeros"
        )
        with full_precision(moved.device):
            first, second = as_float(moved), as_float(fixed)
            dtype = torch.promote_types(first.dtype, second.dtype)
            first, second = first.to(dtype), second.to(dtype)
            if mask is None and self.border == "inside":
                mask = torch.ones((1, 1, *first.shape[2:]), device=first.device)
            if mask is not None:
                mask = as_float(mask.detach()).to(dtype)
            needed = tuple(torch.is_grad_enabled() and image.requires_grad for image in (first, second))
            return _LocalCorrelation.apply(first, second, mask, settings, needed)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        text = f"window={self.window}, kernel={self.kernel!r}, form={self.form!r}, eps={self.eps:g}"
        text += "" if self.sigma is None else f", sigma={self.sigma:g}"
        return f"{text}, floor={self.floor!r}, border={self.border!r}"


class _Settings(NamedTuple):
    """What the loss was built with."""

    kernel: Kernel
    summed: bool
    eps: float
    clamp: bool
    zeros: bool


class _LocalCorrelation(torch.autograd.Function):
    """The loss, with its gradient computed in the forward pass: the loss is a scalar, so backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, fixed: Tensor, mask: Tensor | None, settings: _Settings, needed: tuple[bool, bool]
    ) -> Tensor:
        value, gradients = _value_and_gradients(moved, fixed, mask, settings, needed)
        ctx.needed = needed
        ctx.save_for_backward(moved, fixed, *gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sources, gradients = ctx.saved_tensors[:2], iter(ctx.saved_tensors[2:])
        both = (
            scaled_gradient(upstream, next(gradients), source) if needed else None
            for source, needed in zip(sources, ctx.needed, strict=True)
        )
        return *both, None, None, None


class _Piece(NamedTuple):
    """Some items of the batch and some rows of the first spatial axis; ``rows`` is relative to the image."""

    items: slice
    start: int
    stop: int


def _pieces(shape: torch.Size, device: torch.device, radius: int) -> Iterator[_Piece]:
    """Cut images (N, *S) into pieces that are small enough to be worked on at a time.

    A piece is worked on with ``radius`` rows on either side; it has no fewer rows of its own.
    """
    row = max(1, shape[2:].numel())
    voxels = _PIECE_CPU if device.type == "cpu" else _PIECE_GPU
    rows = min(shape[1], max(2 * radius, voxels // row))
    items = max(1, voxels // (row * shape[1]))
    count = -(-shape[1] // rows)
    rows = -(-shape[1] // count)  # equal pieces rather than a small last one
    for item in range(0, shape[0], items):
        for start in range(0, shape[1], rows):
            yield _Piece(slice(item, item + items), start, min(start + rows, shape[1]))


def _value_and_gradients(
    moved: Tensor, fixed: Tensor, mask: Tensor | None, settings: _Settings, needed: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients to those images that need one, each (B, C, *S).

    With a window's sums A = Σw(a - ā)², B, C = Σw(a - ā)(b - b̄) and c = C²/(AB + e), the derivative by a voxel's a is
    b·F(P) + a·F(Q) - F(P·b̄ + Q·ā), where F sums over the windows that hold the voxel, P = ∂c/∂C and Q = 2 ∂c/∂A.
    """
    shape = moved.shape
    images = [image.detach().flatten(0, 1) for image in (moved, fixed)]
    if mask is not None:
        mask = mask.expand(shape).flatten(0, 1)
        images = [image.where(mask > 0, 0.0) for image in images]
    centres = [_centre(image, mask) for image in images]
    count = float(images[0].numel()) if mask is None else mask.sum().clamp_min(torch.finfo(mask.dtype).tiny)
    total = images[0].new_zeros(())
    maps = images[0].new_empty((1 + 2 * sum(needed), *images[0].shape)) if any(needed) else None
    for piece in _pieces(images[0].shape, images[0].device, settings.kernel.radius):
        here = None if mask is None else mask[piece.items, piece.start : piece.stop]
        moments = _piece_moments(images, centres, mask, piece, settings)
        out = None if maps is None else maps[:, piece.items, piece.start : piece.stop]
        total += _correlate(moments, here, settings, needed, out)
    value = (total / count).neg_().clamp_(-1.0, 0.0)  # the sum of many numbers near 1 may round up
    if maps is None:
        return value, []
    gradients = _gradients(images, centres, maps, settings.kernel, needed)
    for gradient in gradients:
        gradient.mul_(-1.0 / count) if mask is None else gradient.mul_(mask).div_(-count)
    return value, [gradient.view(shape) for gradient in gradients]


def _centre(image: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each image (N, 1, ...). Statistics do not depend on it, but rounding in the gradient does."""
    axes = tuple(range(1, image.ndim))
    if mask is None:
        return image.mean(axes, keepdim=True)
    return (image * mask).sum(axes, keepdim=True) / mask.sum(axes, keepdim=True).clamp_min(torch.finfo(mask.dtype).tiny)


def _padded(piece: _Piece, source: Tensor, into: Tensor, radius: int, offset: Tensor | None = None) -> None:
    """Copy a piece of ``source`` (N, *S), less ``offset``, with what surrounds it into the middle of ``into``."""
    start, stop = max(piece.start - radius, 0), min(piece.stop + radius, source.shape[1])
    inner = into.narrow(1, start - (piece.start - radius), stop - start)
    for axis in range(2, source.ndim):
        inner = inner.narrow(axis, radius, source.shape[axis])
    values = source[piece.items, start:stop]
    if offset is None:
        inner.copy_(values)
    else:
        torch.sub(values, offset[piece.items], out=inner)


def _padded_shape(piece: _Piece, shape: torch.Size, radius: int) -> tuple[int, ...]:
    """The shape (n, *P) of a piece of (N, *S) with ``radius`` voxels around it."""
    items = min(piece.items.stop, shape[0]) - piece.items.start
    return (items, piece.stop - piece.start + 2 * radius, *(size + 2 * radius for size in shape[2:]))


def _piece_moments(
    images: list[Tensor], centres: list[Tensor], mask: Tensor | None, piece: _Piece, settings: _Settings
) -> Moments:
    """Window statistics of the centred images at the voxels of a piece."""
    radius = settings.kernel.radius
    padded_shape = _padded_shape(piece, images[0].shape, radius)
    values = images[0].new_empty((2, *padded_shape))
    for k in range(2):
        values[k] = -centres[k][piece.items]  # the image is padded with 0, hence the centred image with this
        _padded(piece, images[k], values[k], radius, centres[k])
    if mask is None:
        return window_moments(values, 1.0, settings.kernel)
    weight = mask.new_full((1, *padded_shape), 1.0 if settings.zeros else 0.0)
    _padded(piece, mask, weight[0], radius)
    return window_moments(values, weight, settings.kernel)


def _correlate(
    moments: Moments, mask: Tensor | None, settings: _Settings, needed: tuple[bool, bool], out: Tensor | None
) -> Tensor:
    """The sum of a piece's squared correlations; writes P, then Q and P·b̄ + Q·ā for each needed image, to ``out``."""
    assert moments.spread is not None
    spread = moments.spread.unbind()
    weight = moments.weight if not isinstance(moments.weight, Tensor) else moments.weight[0]
    product = spread[0] * spread[1]
    floor = settings.eps if settings.summed else settings.eps * weight * weight
    flat = None
    if settings.clamp:
        flat = product < floor
        bottom = torch.clamp_min(product, floor)
    else:
        bottom = product.add_(floor)
    if mask is not None:
        bottom.clamp_min_(torch.finfo(bottom.dtype).tiny)  # windows without any weight
    slope = spread[2] / bottom
    correlation = slope * spread[2]
    if out is not None:
        _write_maps(out, slope, correlation / bottom, moments, mask, flat, needed)
    correlation.clamp_max_(1.0)
    return correlation.sum() if mask is None else correlation.mul_(mask).sum()


def _write_maps(
    out: Tensor,
    slope: Tensor,
    steepness: Tensor,
    moments: Moments,
    mask: Tensor | None,
    flat: Tensor | None,
    needed: tuple[bool, bool],
) -> None:
    """Derivatives of the correlation by the window's sums; ``steepness`` is the correlation over its denominator."""
    assert moments.spread is not None
    if mask is not None:
        slope, steepness = slope * mask, steepness * mask
    if flat is not None:
        steepness = steepness.masked_fill(flat, 0.0)  # there the denominator is constant
    torch.mul(slope, 2.0, out=out[0])
    place = 1
    for k in range(2):
        if needed[k]:
            quotient, mixed = out[place], out[place + 1]
            torch.mul(steepness, moments.spread[1 - k], out=quotient).mul_(-2.0)
            torch.mul(out[0], moments.mean[1 - k], out=mixed).addcmul_(quotient, moments.mean[k])
            place += 2


def _gradients(
    images: list[Tensor], centres: list[Tensor], maps: Tensor, kernel: Kernel, needed: tuple[bool, bool]
) -> list[Tensor]:
    """The gradients of the summed correlation, from the maps that ``_write_maps`` wrote, each (N, *S)."""
    gradients = [torch.empty_like(image) if need else None for image, need in zip(images, needed, strict=True)]
    for piece in _pieces(images[0].shape, images[0].device, kernel.radius):
        values = maps.new_zeros((maps.shape[0], *_padded_shape(piece, images[0].shape, kernel.radius)))
        for k in range(maps.shape[0]):
            _padded(piece, maps[k], values[k], kernel.radius)
        sums = window_sums(values, kernel)
        here = (piece.items, slice(piece.start, piece.stop))
        centred = [image[here] - centre[piece.items] for image, centre in zip(images, centres, strict=True)]
        place = 1
        for k, gradient in enumerate(gradients):
            if gradient is not None:
                torch.mul(sums[0], centred[1 - k], out=gradient[here])
                gradient[here].addcmul_(sums[place], centred[k]).sub_(sums[place + 1])
                place += 2
    return [gradient for gradient in gradients if gradient is not None]
