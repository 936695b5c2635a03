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
"""Inverse fields."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from common.spatial import affine_to_ddf, compose, integrate, invert, warp


@pytest.mark.parametrize("shape", [(21, 18), (14, 17, 13)])
def test_inverse_leads_home_within_the_tolerance(shape, smooth_field, device):
    ddf = smooth_field(shape, 1.2).to(device)
    found = invert(ddf, tolerance=1e-4)
    assert found.ddf.shape == ddf.shape and found.ddf.dtype == torch.float32
    assert found.converged.all() and 0 < found.iterations <= 50
    cycle = compose(ddf, found.ddf).square().sum(1).sqrt().flatten(1).amax(1)
    assert (cycle <= 1.1e-4).all()
    torch.testing.assert_close(found.residual, cycle, atol=2e-5, rtol=0)


def test_residual_is_that_of_the_field_returned(smooth_field):
    """Also when stopped early: the residual is not that of the iteration before or after."""
    ddf = smooth_field((20, 20), 2.0)
    with pytest.warns(UserWarning, match="no inverse within"):
        found = invert(ddf, max_iterations=2, tolerance=1e-6)
    assert found.iterations == 2 and not found.converged.any()
    cycle = compose(ddf, found.ddf).square().sum(1).sqrt().max()
    assert cycle > 1e-3
    torch.testing.assert_close(found.residual[0], cycle, rtol=1e-3, atol=0)


def test_inverse_of_a_translation_and_of_a_scaling():
    shift = torch.tensor([1.5, -2.0]).view(1, 2, 1, 1).expand(1, 2, 7, 8)
    torch.testing.assert_close(invert(shift).ddf, -shift.contiguous())
    matrix = torch.diag(torch.tensor([1.25, 0.8, 1.0]))
    found = invert(affine_to_ddf(matrix, (9, 9)), tolerance=1e-5)
    expected = affine_to_ddf(torch.linalg.inv(matrix), (9, 9))
    torch.testing.assert_close(found.ddf[..., :7], expected[..., :7], atol=1e-4, rtol=0)


def test_every_item_has_its_own_report(smooth_field):
    good = smooth_field((16, 16), 0.5)
    folding = smooth_field((16, 16), 12.0)
    with pytest.warns(UserWarning):
        found = invert(torch.cat([good, folding]), max_iterations=30)
    assert found.converged.tolist() == [True, False]
    assert found.residual[0] <= 1e-3 < found.residual[1]


def test_an_item_does_not_depend_on_its_neighbours(smooth_field):
    easy, hard = smooth_field((16, 16), 0.2), smooth_field((16, 16), 2.0)
    together = invert(torch.cat([easy, hard]))
    torch.testing.assert_close(together.ddf[:1], invert(easy).ddf, rtol=0, atol=0)
    torch.testing.assert_close(together.ddf[1:], invert(hard).ddf, rtol=0, atol=0)


def test_the_last_voxel_of_many_is_as_exact_as_the_first():
    """A hundred thousand voxels go to Newton's method, whose points must not be counted in single precision."""
    waves = torch.linspace(0, 40 * torch.pi, 400)
    ddf = torch.zeros(1, 2, 400, 300)
    ddf[0, 0] = (3.0 * waves.sin()).view(-1, 1)
    found = invert(ddf)
    assert found.converged.all() and found.iterations < 20


def test_slow_is_not_stalled():
    """Derivatives of 0.8: the residual falls by a fifth an iteration, for as long as it takes."""
    waves = torch.linspace(0, 4 * torch.pi, 64)
    ddf = torch.zeros(1, 2, 64, 8)
    ddf[0, 0] = (4.0 * waves.sin()).view(-1, 1)
    found = invert(ddf, tolerance=1e-4)
    assert found.converged.all() and found.iterations > 10


def test_agrees_with_the_negative_velocity(smooth_field):
    velocity = smooth_field((24, 24), 2.0)
    found = invert(integrate(velocity)).ddf
    apart = (found - integrate(-velocity))[..., 5:-5, 5:-5].abs()
    assert apart.max() < 0.1


def test_not_a_number_does_not_converge():
    ddf = torch.zeros(1, 2, 5, 5)
    ddf[0, 0, 2, 2] = float("nan")
    with pytest.warns(UserWarning, match="nan"):
        assert not invert(ddf, max_iterations=3).converged.any()


@pytest.mark.parametrize("shape", [(40, 33), (16, 21, 18)])
def test_a_map_that_stretches_more_than_twice_has_an_inverse_too(shape, device):
    """Along the first axis the map rises by 0.3, then by 2.4, then by 0.3 a voxel: no contraction, and no fold."""
    third = (shape[0] - 1) // 3
    rises = torch.tensor([0.3] * third + [2.4] * third + [0.3] * third, dtype=torch.float64)
    values = torch.cat([torch.zeros(1, dtype=torch.float64), rises.cumsum(0)])
    position = torch.arange(shape[0], dtype=torch.float64)
    ddf = torch.zeros(1, len(shape), *shape, device=device)
    ddf[0, 0] = (values - position).float().view(-1, *[1] * (len(shape) - 1)).to(device)
    found = invert(ddf)
    assert found.converged.all()
    expected = np.interp(position.numpy(), values.numpy(), position.numpy()) - position.numpy()
    line = found.ddf[0, 0].flatten(1)[:, 0].cpu().double().numpy()
    np.testing.assert_allclose(line, expected, atol=4e-3)  # the tolerance, where the map rises by 0.3


def test_folds_cost_few_iterations_and_do_not_spoil_the_rest(smooth_field):
    ddf = smooth_field((16, 40), 12.0)
    ddf[..., 14:] = 0
    ddf[..., 24:30] = 0.25
    with pytest.warns(UserWarning, match="no inverse within"):
        found = invert(ddf)
    assert found.residual > 0.1 and found.iterations < 50
    torch.testing.assert_close(found.ddf[..., 26:28], torch.full((1, 2, 16, 2), -0.25), atol=1e-3, rtol=0)
    assert not found.ddf[..., 34:].any()


def test_zero_field_needs_no_iteration(smooth_image):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = invert(torch.zeros(1, 2, 8, 8))
    assert found.iterations == 0 and found.residual.item() == 0
    image = smooth_image((8, 8))
    torch.testing.assert_close(warp(image, found.ddf), image)


def test_parity_with_a_published_solver(shared):
    arrays = np.load(shared / "parity" / "dual_stream_pyramid" / "inversion_tight.npz")
    found = invert(torch.tensor(arrays["u"]), tolerance=1e-5, max_iterations=100)
    assert found.converged.all()
    torch.testing.assert_close(found.ddf, torch.tensor(arrays["inv"]), atol=1e-4, rtol=0)
