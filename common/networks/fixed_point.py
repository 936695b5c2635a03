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
"""Fixed points by Anderson acceleration, and the inverse of a field as a layer that gradients pass through.

Every item of a batch is solved for itself: it has its own mixture of iterates, stops when it has converged and is then
no longer evaluated. So nothing depends on what an item shares its batch with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.networks.recorded_inversion import recorded_inversion
from common.spatial.exporting import exporting
from common.spatial.grid import as_field
from common.spatial.sampling import padding_code, sample_backward, sample_forward

__all__ = ["FixedPoint", "anderson", "invert_implicit"]

# Added to the Gram matrix of the residuals, relative to its diagonal: single precision tells no smaller angles apart.
_RIDGE = 1e-6
# The least determinant that the implicit gradient divides by; that of a contraction is positive.
_LEAST_DETERMINANT = 1e-6
# Numbers in a field, from which on the items of a batch are inverted one after the other.
_LARGE = 2**21


class FixedPoint(NamedTuple):
    """What a solver found, item by item.

    Attributes:
        value: the last ``function(x)``, (B, ...).
        residual: (B,) the greatest ``|function(x) - x|`` at that ``x``.
        converged: (B,) whether the residual is within the tolerance.
        iterations: (B,) how often the function was evaluated, int64.
    """

    value: Tensor
    residual: Tensor
    converged: Tensor
    iterations: Tensor


@torch.no_grad()
def anderson(
    function: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float,
    max_iterations: int = 50,
    memory: int = 4,
) -> FixedPoint:
    """Solve ``x = function(x)`` for every item of a batch.

    The next iterate is the affine combination of the last ``memory`` values whose combined residual is least.
    Source: Walker and Ni, Anderson acceleration for fixed-point iterations (SIAM J. Numer. Anal. 2011).

    Args:
        function: called as ``function(x, items)`` with the iterates (b, ...) of the items (b,) that have not converged;
            returns a new tensor of the shape of x.
        start: (B, ...) the first iterates.
        tolerance: greatest ``|function(x) - x|`` to stop at.
        max_iterations: at most so many evaluations.
        memory: how many values to combine; 1 is the plain iteration.

    Returns:
        a :class:`FixedPoint`. An item that becomes NaN is given up.

    Raises:
        ValueError: when ``max_iterations`` or ``memory`` is below 1.
    """
    if max_iterations < 1 or memory < 1:
        raise ValueError(f"max_iterations and memory must be at least 1, got {max_iterations} and {memory}")
    solved = torch.empty_like(start)
    residuals = start.new_zeros(len(start))
    iterations = torch.zeros(len(start), dtype=torch.int64, device=start.device)
    items, x = torch.arange(len(start), device=start.device), start
    history = _History(memory)
    for iteration in range(1, max_iterations + 1):
        value = function(x, items)
        difference = value - x
        error = _greatest(difference)
        going = error > tolerance
        count = 0 if iteration == max_iterations else int(going.sum())
        if count < len(items):
            left = items if count == 0 else items[~going]
            iterations[left] = iteration
            residuals[left] = error if count == 0 else error[~going]
            if len(left) == len(start):
                solved = value
                break
            solved[left] = value if count == 0 else value[~going]
            if count == 0:
                break
            items, value, difference = items[going], value[going], difference[going]
            history.keep(going)
        history.add(value, difference)
        x = history.mixture()
    return FixedPoint(solved, residuals, residuals <= tolerance, iterations)


def invert_implicit(
    displacement: Tensor,
    tolerance: float = 1e-2,
    *,
    max_iterations: int = 50,
    memory: int = 4,
    padding: str = "border",
) -> FixedPoint:
    """The inverse ``v(x) = -u(x + v(x))`` of a field u, with its exact gradient, whatever way it was found.

    Differentiating the equation gives the gradient without any of the solver's steps. As u is looked up linearly at one
    place a voxel, the linear system to solve for it is one of d equations in every voxel, so it is solved directly.
    Only u and v are kept for it.
    Source of the layer: Honkamaa and Marttinen, SITReg (2023), who solve the backward system by iteration.

    Args:
        displacement: u, (B, d, *S), voxels; a contraction (no two points move towards each other by their distance).
        tolerance: greatest ``|u(x + v(x)) + v(x)|`` to stop at, voxels.
        max_iterations: at most so many evaluations of the right-hand side.
        memory: of the Anderson acceleration.
        padding: of u outside its grid, ``"border"`` or ``"zeros"``.

    Returns:
        a :class:`FixedPoint`; ``value`` is v (B, d, *S), float32 (float64 if u is), differentiable once in u.

    Raises:
        ValueError: when ``displacement`` is no field, or an option is unknown or too small.

    Warns:
        UserWarning: when an item did not converge; it says how far it came.
    """
    displacement, code = as_field(displacement, "displacement"), padding_code(padding)
    if exporting():
        return FixedPoint(*recorded_inversion(displacement, tolerance, max_iterations, padding))
    field = displacement.detach()

    def right_hand_side(inverse: Tensor, items: Tensor) -> Tensor:
        active = field if len(items) == len(field) else field[items]
        return sample_forward(active, inverse, code).neg_()

    options: dict[str, Any] = {"tolerance": tolerance, "max_iterations": max_iterations, "memory": memory}
    if len(field) > 1 and field[0].numel() > _LARGE:
        found = _one_by_one(right_hand_side, field, options)
    else:
        found = anderson(right_hand_side, -field, **options)
    if not bool(found.converged.all()):
        warnings.warn(
            f"no inverse within {tolerance} voxels: residuals {found.residual.tolist()} "
            f"after {found.iterations.tolist()} iterations; is the field a contraction?",
            stacklevel=2,
        )
    if torch.is_grad_enabled() and displacement.requires_grad:
        return found._replace(value=_ImplicitInverse.apply(displacement, found.value, code))
    return found


def _one_by_one(
    right_hand_side: Callable[[Tensor, Tensor], Tensor], field: Tensor, options: dict[str, Any]
) -> FixedPoint:
    """The solution for every item of a batch in turn: one history of iterates at a time."""
    found: list[FixedPoint] = []
    for item in range(len(field)):

        def of_item(x: Tensor, items: Tensor, item: int = item) -> Tensor:
            return right_hand_side(x, items + item)

        found.append(anderson(of_item, -field[item : item + 1], **options))
    return FixedPoint(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _ImplicitInverse(torch.autograd.Function):
    """Passes the solution on, and solves ``w + Du(x + v)^T w = gradient`` in every voxel backwards."""

    @staticmethod
    def forward(ctx: Any, displacement: Tensor, inverse: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(displacement, inverse)
        ctx.code = code
        return inverse.view_as(inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        displacement, inverse = ctx.saved_tensors
        result = torch.empty_like(displacement, memory_format=torch.contiguous_format)
        for item in range(len(result)):  # one by one: the system takes twelve numbers a voxel
            field, place = displacement[item : item + 1], inverse[item : item + 1]
            solution = _solve(_transposed_jacobian(field, place, ctx.code), gradient[item : item + 1]).neg_()
            for_field, _ = sample_backward(solution, field, place, ctx.code, (True, False))
            result[item : item + 1] = for_field
        return result, None, None


class _History:
    """The last values and residuals of the items being solved, and the inner products of the residuals."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.values: list[Tensor] = []
        self.differences: list[Tensor] = []
        self.gram = torch.zeros(0)

    def keep(self, going: Tensor) -> None:
        """Forget the items that are done."""
        self.values = [value[going] for value in self.values]
        self.differences = [difference[going] for difference in self.differences]
        self.gram = self.gram[going] if self.values else self.gram

    def add(self, value: Tensor, difference: Tensor) -> None:
        """Take the newest in, and drop the oldest if there are too many."""
        first = max(0, len(self.values) + 1 - self.memory)
        self.values = self.values[first:] + [value]
        self.differences = self.differences[first:] + [difference]
        row = difference.flatten(1).unsqueeze(1)
        with torch.autocast(row.device.type, enabled=False):
            products = [torch.bmm(row, other.flatten(1).unsqueeze(2))[:, 0] for other in self.differences]
        newest = torch.cat(products, dim=1).double()  # (b, n)
        count = newest.shape[1]
        gram = newest.new_empty(len(newest), count, count)
        if count > 1:
            gram[:, :-1, :-1] = self.gram[:, first:, first:]
        gram[:, -1], gram[:, :, -1] = newest, newest
        self.gram = gram

    def mixture(self) -> Tensor:
        """``sum a_i value_i`` with ``sum a_i = 1`` and the least ``|sum a_i residual_i|``."""
        if len(self.values) == 1:
            return self.values[0]
        # Residuals shrink by orders of magnitude, so they are first brought to length 1.
        length = self.gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-30)
        scale = length / length.amin(1, keepdim=True)
        cosines = self.gram / (length[:, :, None] * length[:, None, :])
        cosines.diagonal(dim1=1, dim2=2).add_(_RIDGE)
        weights = torch.linalg.solve(cosines, 1 / scale) / scale
        weights = (weights / weights.sum(1, keepdim=True)).to(self.values[0].dtype)
        shape = (-1,) + (1,) * (self.values[0].dim() - 1)
        mixed = self.values[0] * weights[:, 0].view(shape)
        for index, value in enumerate(self.values[1:], start=1):
            mixed.addcmul_(value, weights[:, index].view(shape))
        return mixed


def _greatest(x: Tensor) -> Tensor:
    """The greatest absolute value of every item of (B, ...), without writing the absolute values down."""
    flat = x.flatten(1)
    return torch.maximum(flat.amax(1), flat.amin(1).neg())


def _transposed_jacobian(field: Tensor, place: Tensor, code: int) -> list[list[Tensor]]:
    """Entry [k][c], (B, *S): the derivative along axis k of component c of ``x + u(x)`` at ``x + place(x)``."""
    jacobian: list[list[Tensor]] = [[] for _ in range(field.shape[1])]
    ones = field.new_ones((len(field), 1, *place.shape[2:]))
    for c in range(field.shape[1]):
        _, slope = sample_backward(ones, field[:, c : c + 1], place, code, (False, True))
        assert slope is not None
        slope[:, c] += 1
        for k, row in enumerate(jacobian):
            row.append(slope[:, k])
    return jacobian


def _solve(matrix: list[list[Tensor]], right: Tensor) -> Tensor:
    """Cramer's rule in every voxel: w (B, d, *S) with ``sum_c matrix[k][c] w_c = right_k``."""
    dims = len(matrix)
    others = [[axis for axis in range(dims) if axis != k] for k in range(dims)]
    solution = torch.zeros_like(right)
    determinant = torch.zeros_like(right[:, 0])
    for c in range(dims):
        for k in range(dims):
            cofactor = _minor([[matrix[row][column] for column in others[c]] for row in others[k]])
            sign = -1 if (c + k) % 2 else 1
            solution[:, c].addcmul_(cofactor, right[:, k], value=sign)
            if c == 0:
                determinant.addcmul_(cofactor, matrix[k][0], value=sign)
    determinant.masked_fill_(determinant.abs() < _LEAST_DETERMINANT, _LEAST_DETERMINANT)
    return solution.div_(determinant.unsqueeze(1))


def _minor(matrix: list[list[Tensor]]) -> Tensor:
    """The determinant of a 1 x 1 or a 2 x 2 matrix."""
    if len(matrix) == 1:
        return matrix[0][0]
    return (matrix[0][0] * matrix[1][1]).addcmul_(matrix[0][1], matrix[1][0], value=-1)
