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
from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.networks.fixed_point import anderson, invert_implicit
from common.spatial import affine_to_ddf, compose


def smooth_field(*shape: int, amplitude: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, d, *shape): one sine wave a component, along the diagonal; its slopes are below ``amplitude``."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=dtype) for n in shape), indexing="ij")
    phase = sum(axes) / 3
    return torch.stack([amplitude * 3 / len(shape) * torch.sin(phase + k) for k in range(len(shape))])[None]


def test_published_inverse(shared: Path, device: torch.device) -> None:
    arrays = np.load(shared / "parity/dual_stream_pyramid/inversion_tight.npz")
    field = torch.from_numpy(arrays["u"]).to(device)
    found = invert_implicit(field, 1e-5)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value.cpu(), torch.from_numpy(arrays["inv"]), rtol=0, atol=1e-4)


def test_inverse_of_a_known_map() -> None:
    """x -> 0.8 x + 1 has the inverse x -> 1.25 x - 1.25, which linear interpolation of both gives exactly."""
    shrink = torch.diag(torch.tensor([0.8, 0.8, 1.0]))
    shrink[:2, 2] = 1.0
    found = invert_implicit(affine_to_ddf(shrink, (12, 14)), 1e-6)
    expected = affine_to_ddf(torch.linalg.inv(shrink), (12, 14))
    inner = (slice(None), slice(None), slice(2, 9), slice(2, 11))  # where the inverse stays within the grid
    torch.testing.assert_close(found.value[inner], expected[inner], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(11, 14), (9, 12, 7)])
def test_inverse_leads_back(shape: tuple[int, ...], device: torch.device) -> None:
    field = smooth_field(*shape, amplitude=0.6).to(device)
    found = invert_implicit(field, 1e-4)
    assert float(compose(field, found.value).abs().max()) <= 1e-4
    assert float(found.residual) <= 1e-4 and found.value.dtype == torch.float32


def test_acceleration_saves_evaluations() -> None:
    field = smooth_field(10, 12, 9, amplitude=0.9)
    plain, mixed = (invert_implicit(field, 1e-4, memory=memory) for memory in (1, 4))
    torch.testing.assert_close(plain.value, mixed.value, rtol=0, atol=2e-3)
    assert int(mixed.iterations) < int(plain.iterations)


def test_linear_equations_are_solved_in_as_many_steps_as_they_have_dimensions() -> None:
    """Anderson acceleration is GMRES there: x = A x + b in three dimensions, by at most four residuals."""
    matrix = torch.tensor([[0.9, 0.2, 0.0], [-0.1, 0.7, 0.3], [0.0, 0.2, -0.8]], dtype=torch.float64)
    constant = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = anderson(lambda x, items: x @ matrix.T + constant, torch.zeros(1, 3, dtype=torch.float64), tolerance=1e-3)
    expected = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - matrix, constant)
    assert int(found.iterations) <= 6
    torch.testing.assert_close(found.value[0], expected, rtol=0, atol=1e-3)


def test_items_are_solved_for_themselves() -> None:
    fields = [smooth_field(8, 9, 10, amplitude=amplitude) for amplitude in (0.05, 0.9, 0.5, 0.0)]
    together = invert_implicit(torch.cat(fields), 1e-3)
    alone = [invert_implicit(field, 1e-3) for field in fields]
    assert together.iterations.tolist() == [int(found.iterations) for found in alone]
    assert together.iterations.tolist()[3] == 1 < together.iterations.tolist()[0] < together.iterations.tolist()[1]
    for index, found in enumerate(alone):
        torch.testing.assert_close(together.value[index], found.value[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.residual[index], found.residual[0], rtol=0, atol=1e-6)


def test_items_that_are_done_are_not_evaluated_again() -> None:
    asked: list[list[int]] = []

    def halve(x: Tensor, items: Tensor) -> Tensor:
        asked.append(items.tolist())
        return 0.5 * x

    anderson(halve, torch.tensor([[0.1], [10.0], [0.1]]), tolerance=0.1, memory=1)
    assert asked[0] == [0, 1, 2] and asked[1:] == [[1]] * 6


@pytest.mark.parametrize("start", [4.0, 1e30])
def test_what_does_not_converge_is_reported(start: float) -> None:
    found = anderson(lambda x, items: -3 * x * x.abs(), torch.tensor([[0.0], [start]]), tolerance=1e-3, memory=1)
    assert found.converged.tolist() == [True, False]
    assert found.iterations.tolist()[1] <= 50 and not float(found.residual[1]) <= 1e-3


def test_a_field_without_inverse_is_reported() -> None:
    fold = 5 * torch.randn(1, 2, 9, 9)
    fields = torch.cat((fold, smooth_field(9, 9, amplitude=0.3)))
    with pytest.warns(UserWarning, match=r"no inverse within 0.001 voxels.*\[7, \d\]"):
        found = invert_implicit(fields, 1e-3, max_iterations=7)
    assert found.converged.tolist() == [False, True] and int(found.iterations[0]) == 7


def test_convergence_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        invert_implicit(smooth_field(6, 7, amplitude=0.3))


@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 3)])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_implicit_gradient_is_that_of_finite_differences(shape: tuple[int, ...], padding: str) -> None:
    noise = 0.25 * (torch.rand(1, len(shape), *shape, dtype=torch.float64) - 0.5)
    field = noise.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u: invert_implicit(u, 1e-13, max_iterations=100, padding=padding).value, field, atol=1e-6
    )


def test_gradient_needs_no_tight_solution() -> None:
    field = smooth_field(9, 8, 7, amplitude=0.4).requires_grad_()
    weight = torch.randn_like(field)
    loose, tight = (
        torch.autograd.grad((invert_implicit(field, tolerance).value * weight).sum(), field)[0]
        for tolerance in (1e-2, 1e-6)
    )
    # Places that the error carries over the face of a voxel have another slope, so not everywhere.
    assert float((loose - tight).abs().median()) < 1e-2 * float(tight.abs().mean())


def test_half_precision_is_raised_and_float32_kept_under_autocast() -> None:
    field = smooth_field(6, 7, amplitude=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = invert_implicit(field.requires_grad_())
        assert invert_implicit(field.detach().bfloat16()).value.dtype == torch.float32
    torch.testing.assert_close(found.value, invert_implicit(field).value, rtol=0, atol=0)
    found.value.sum().backward()
    assert field.grad is not None and field.grad.dtype == torch.float32


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="displacement"):
        invert_implicit(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="padding"):
        invert_implicit(torch.zeros(1, 2, 4, 4), padding="reflect")
    with pytest.raises(ValueError, match="at least 1"):
        invert_implicit(torch.zeros(1, 2, 4, 4), max_iterations=0)
