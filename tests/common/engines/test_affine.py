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
"""Affine registration: known maps are recovered, whatever the headers; no map mirrors; bad input is named."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch

from common.engines.affine import AffineResult, AffineStage, register_affine
from common.engines.affine_groups import generators, rotation, step_matrix
from common.engines.affine_objective import SIMILARITIES, Objective
from common.engines.affine_pyramid import levels, prepare
from common.engines.mattes import mattes_information
from common.engines.quasi_newton import minimise

# Blobs in mm, of unlike sizes and places, so that nothing looks the same turned or mirrored: centre, width, height.
_BLOBS = [
    ((0.0, 0.0, 0.0), 11.0, 0.6),
    ((14.0, 3.0, 5.0), 5.0, 1.0),
    ((-9.0, 12.0, -4.0), 4.0, 0.9),
    ((3.0, -14.0, 7.0), 5.0, 0.7),
    ((-6.0, -5.0, -12.0), 4.5, 0.8),
    ((5.0, 9.0, 12.0), 3.5, 1.0),
]


def scene(points: np.ndarray) -> np.ndarray:
    """The intensity at points (d, N) of the world, mm."""
    total = np.zeros(points.shape[1])
    for centre, width, height in _BLOBS:
        distance = points - np.array(centre[: len(points)])[:, None]
        total += height * np.exp(-0.5 * (distance**2).sum(0) / width**2)
    return np.where(total > 0.05, total, 0.0)


def image_of(shape: tuple[int, ...], affine: np.ndarray, truth: np.ndarray | None = None) -> torch.Tensor:
    """The scene on a grid: what a map moved, if one is given. No interpolation, so what is recovered is exact."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).reshape(len(shape), -1)
    points = affine[:-1, :-1] @ index + affine[:-1, -1:]
    if truth is not None:
        back = np.linalg.inv(truth)
        points = back[:-1, :-1] @ points + back[:-1, -1:]
    return torch.from_numpy(scene(points).reshape(1, 1, *shape)).float()


def grid(shape: tuple[int, ...], axes: np.ndarray, middle: tuple[float, ...] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """The affine of a grid with these axes (columns, mm) about a middle."""
    affine = np.eye(len(shape) + 1)
    affine[:-1, :-1] = axes
    affine[:-1, -1] = np.array(middle[: len(shape)]) - axes @ ((np.array(shape) - 1) / 2)
    return affine


def world_map(linear: np.ndarray, shift: tuple[float, ...]) -> np.ndarray:
    matrix = np.eye(len(linear) + 1)
    matrix[:-1, :-1], matrix[:-1, -1] = linear, shift[: len(linear)]
    return matrix


def error(found: np.ndarray, truth: np.ndarray, extent: float = 25.0) -> float:
    """The farthest that the two maps take a corner of a box about the scene apart, mm."""
    dims = len(found) - 1
    corners = np.array(list(itertools.product((-extent, extent), repeat=dims)) + [(0.0,) * dims])
    corners = np.concatenate([corners, np.ones((len(corners), 1))], axis=1)
    return float(np.linalg.norm(corners @ (found - truth).T, axis=1).max())


FIXED = {2: ((56, 60), grid((56, 60), np.diag([1.2, 1.1]))), 3: ((36, 32, 38), grid((36, 32, 38), np.diag([1.8] * 3)))}
SHEAR = {2: np.array([[1.1, 0.08], [0.0, 0.9]]), 3: np.array([[1.1, 0.08, 0.0], [0.0, 0.9, 0.05], [0.0, 0.0, 1.05]])}


def pair(dims: int, truth: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> tuple:
    fixed_shape, fixed_affine = FIXED[dims]
    return image_of(shape, affine, truth), image_of(fixed_shape, fixed_affine), affine, fixed_affine


@pytest.fixture(scope="module")
def turned() -> tuple:
    """A 3-D pair that an affine map with a turn of 29 degrees sets apart, and the map."""
    truth = world_map(rotation(np.array([0.3, -0.35, 0.2]), 3) @ SHEAR[3], (6.0, -9.0, 5.0))
    axes = rotation(np.array([0.1, 0.05, -0.12]), 3) @ np.diag([-1.6, 1.9, 2.4])
    return *pair(3, truth, (50, 44, 34), grid((50, 44, 34), axes, (6.0, -9.0, 5.0))), truth


ORIENTATIONS = {
    "RAS": np.diag([1.7, 1.7, 1.7]),
    "LAS": np.diag([-1.7, 1.7, 1.7]),
    "LPS": np.diag([-1.7, -1.7, 1.7]),
    "PSR": np.array([[0.0, 0.0, 1.9], [-1.7, 0.0, 0.0], [0.0, 1.5, 0.0]]),
    "thick slices": np.diag([1.2, 1.2, 4.0]),
    "oblique": rotation(np.array([0.3, 0.2, -0.4]), 3) @ np.diag([1.5, 2.2, 1.8]),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_known_map_is_recovered_whatever_the_header_3d(orientation: str) -> None:
    truth = world_map(rotation(np.array([0.25, 0.2, -0.3]), 3) @ SHEAR[3], (8.0, -5.0, 12.0))
    axes = ORIENTATIONS[orientation]
    shape = tuple(int(n) for n in np.ceil(80 / np.linalg.norm(axes, axis=0)))
    moving, fixed, moving_affine, fixed_affine = pair(3, truth, shape, grid(shape, axes, (8.0, -5.0, 12.0)))
    result = register_affine(moving, fixed, moving_affine, fixed_affine)
    assert error(result.matrix, truth) < 0.6
    assert result.after > result.before


@pytest.mark.parametrize("angle", [-45, -20, 0, 30, 45])
@pytest.mark.parametrize("axes", [np.diag([1.0, 1.3]), np.array([[0.0, -1.2], [1.1, 0.2]])], ids=["LR", "oblique"])
def test_a_known_map_is_recovered_2d(angle: int, axes: np.ndarray, device: torch.device) -> None:
    truth = world_map(rotation(np.array([np.radians(angle)]), 2) @ SHEAR[2], (15.0, -11.0))
    moving, fixed, moving_affine, fixed_affine = pair(2, truth, (75, 66), grid((75, 66), axes, (15.0, -11.0)))
    result = register_affine(moving.to(device), fixed.to(device), moving_affine, fixed_affine)
    assert error(result.matrix, truth) < 0.5


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity_recovers_an_affine_map(turned: tuple, similarity: str) -> None:
    *scans, truth = turned
    result = register_affine(*scans, similarity=similarity)
    # Small windows and histograms see less of a scale that is near 1, above all in a scene as smooth as this.
    assert error(result.matrix, truth) < {"lncc": 4.0, "mi": 2.0}.get(similarity, 0.8)
    assert result.after > result.before and result.overlap == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("kind", ["rigid", "similarity"])
def test_kinds_recover_their_own_maps_and_stay_within(turned: tuple, kind: str) -> None:
    scale = 1.2 if kind == "similarity" else 1.0
    truth = world_map(scale * rotation(np.array([0.3, 0.3, -0.3]), 3), (6.0, -9.0, 5.0))
    result = register_affine(*pair(3, truth, (50, 44, 40), turned[2]), kind=kind, similarity="ncc")
    linear = result.matrix[:3, :3]
    assert error(result.matrix, truth) < 0.5
    assert np.allclose(linear @ linear.T, np.eye(3) * (linear @ linear.T)[0, 0], atol=1e-9)
    if kind == "rigid":
        assert np.linalg.det(linear) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_identity_stays_identity(dims: int, similarity: str) -> None:
    shape, affine = FIXED[dims]
    image = image_of(shape, affine)
    result = register_affine(image, image, affine, affine, similarity=similarity)
    assert error(result.matrix, np.eye(dims + 1)) < (2.0 if similarity == "mi" else 0.05)
    assert result.after >= result.before


def test_other_contrast_by_mutual_information(turned: tuple) -> None:
    moving, fixed, *affines, truth = turned
    # Bright becomes dark and the middle brightest: no straight line leads from one to the other.
    other = torch.where(moving > 0.05, 0.2 + torch.sin(4.0 * moving).abs(), moving)
    assert error(register_affine(other, fixed, *affines, similarity="mi").matrix, truth) < 2.5


@pytest.mark.parametrize("dims", [2, 3])
def test_centre_is_exact_for_a_moved_blob(dims: int) -> None:
    shape, affine = FIXED[dims]
    fixed = torch.zeros(1, 1, *shape)
    fixed[(0, 0, *(slice(10, 18),) * dims)] = 1.0
    moving = fixed.roll((5, -3), (2, 3))
    result = register_affine(moving, fixed, affine, affine, kind="centre")
    shift = affine[:-1, :-1] @ np.array([5, -3, 0][:dims])
    assert np.allclose(result.matrix, world_map(np.eye(dims), tuple(shift)), atol=1e-6)
    assert [stage.kind for stage in result.stages] == ["centre"]


def test_the_same_input_gives_the_same_matrix(turned: tuple) -> None:
    for kind, similarity in (("rigid", "ncc"), ("rigid", "mi")):
        first, second = (register_affine(*turned[:4], kind=kind, similarity=similarity).matrix for _ in range(2))
        assert np.array_equal(first, second)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_flipped_header_is_not_answered_by_a_mirror(dims: int) -> None:
    shape, affine = FIXED[dims]
    image, flipped = image_of(shape, affine), affine.copy()
    flipped[0] *= -1
    result = register_affine(image, image, flipped, affine)
    assert np.linalg.det(result.matrix) > 0
    assert result.after >= result.before


def test_scans_that_do_not_meet_are_brought_together(caplog: pytest.LogCaptureFixture) -> None:
    shape, affine = FIXED[3]
    far = affine.copy()
    far[:3, 3] += (900.0, -400.0, 300.0)
    with caplog.at_level(logging.WARNING):
        image = image_of(shape, affine)
        result = register_affine(image, image, far, affine)
    assert "do not meet in the world" in caplog.text
    assert result.before == 0.0
    assert error(result.matrix, world_map(np.eye(3), (900.0, -400.0, 300.0))) < 0.05


def test_what_is_masked_does_not_matter(turned: tuple) -> None:
    moving, fixed, moving_affine, fixed_affine, truth = turned
    spoilt_fixed, spoilt_moving = fixed.clone(), moving.clone()
    spoilt_fixed[..., :10, :12, :] = 3.0
    spoilt_moving[..., -9:, -20:, :] = 3.0
    masks = {"fixed_mask": (spoilt_fixed < 2.5).float(), "moving_mask": spoilt_moving < 2.5}
    result = register_affine(spoilt_moving, spoilt_fixed, moving_affine, fixed_affine, similarity="ncc", **masks)
    assert error(result.matrix, truth) < 1.0
    without = register_affine(spoilt_moving, spoilt_fixed, moving_affine, fixed_affine, similarity="ncc")
    assert error(without.matrix, truth) > 3.0


def test_half_a_scan_is_found_in_the_whole(turned: tuple) -> None:
    moving, fixed, moving_affine, fixed_affine, truth = turned
    result = register_affine(moving[..., 9:], fixed, _shifted(moving_affine, 9), fixed_affine)
    assert error(result.matrix, truth) < 1.5
    assert result.overlap < 0.97


def _shifted(affine: np.ndarray, slices: int) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += slices * affine[:3, 2]
    return moved


def test_itk_moves_the_image_alike(turned: tuple) -> None:
    """The direction, and RAS against LPS: ITK resamples with the matrix from physical points of fixed to moving."""
    itk = pytest.importorskip("itk")
    moving, fixed, moving_affine, fixed_affine, _ = turned
    matrix = register_affine(moving, fixed, moving_affine, fixed_affine, similarity="ncc").matrix
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    transform = itk.AffineTransform[itk.D, 3].New()
    flipped = lps @ matrix @ lps
    transform.SetMatrix(itk.matrix_from_array(flipped[:3, :3].copy()))
    transform.SetTranslation(flipped[:3, 3].tolist())

    def as_itk(image: torch.Tensor, affine: np.ndarray) -> object:
        made = itk.image_from_array(np.ascontiguousarray(image[0, 0].numpy().transpose(2, 1, 0)))
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        made.SetSpacing(spacing.tolist())
        made.SetOrigin((lps @ affine)[:3, 3].tolist())
        made.SetDirection(itk.matrix_from_array((lps @ affine)[:3, :3] / spacing))
        return made

    resample = itk.ResampleImageFilter.New(
        Input=as_itk(moving, moving_affine),
        Transform=transform,
        ReferenceImage=as_itk(fixed, fixed_affine),
        UseReferenceImage=True,
    )
    resample.Update()
    moved = itk.array_from_image(resample.GetOutput()).transpose(2, 1, 0)
    target = fixed[0, 0].numpy()
    assert np.corrcoef(moved.ravel(), target.ravel())[0, 1] > 0.99
    assert np.abs(moved - target).mean() < 0.02


def test_stages_are_reported_as_they_end(turned: tuple) -> None:
    seen: list[AffineStage] = []
    result = register_affine(*turned[:4], finest=0.9, progress=seen.append)
    assert tuple(seen) == result.stages
    assert [stage.kind for stage in seen][:4] == ["start", "rigid", "similarity", "affine"]
    assert seen[-1].size < seen[0].size
    assert np.array_equal(seen[-1].matrix, result.matrix)
    assert isinstance(result, AffineResult) and result.matrix.dtype == np.float64


def test_a_failed_stage_is_told_of_and_left_out(turned: tuple) -> None:
    with pytest.warns(UserWarning, match="affine stage .* failed: it scales by .*expected between"):
        result = register_affine(*turned[:4], similarity="ncc", max_scale=1.09)
    assert [stage.kind for stage in result.stages][-1] in ("start", "rigid", "similarity")
    with pytest.warns(UserWarning, match="of the fixed foreground lies in the moving scan, expected at least 200"):
        register_affine(*turned[:4], similarity="ncc", min_overlap=2.0)


def test_losing_overlap_is_never_rewarded() -> None:
    shape, affine = FIXED[3]
    side = prepare(image_of(shape, affine), affine, None, "fixed")
    level = levels(side, side)[-1]
    for similarity in SIMILARITIES:
        objective = Objective(level, similarity)
        values = [objective(world_map(np.eye(3), (shift, 0.0, 0.0))) for shift in (0.0, 8.0, 16.0, 64.0)]
        assert values[0] > values[1] > values[2] and abs(values[3]) < 0.02, similarity


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_perfect_match_on_less_overlap_is_worth_less(similarity: str) -> None:
    stripes = (1 + torch.sin(torch.arange(64.0) * torch.pi / 8)).view(1, 1, 64, 1).expand(1, 1, 64, 40)
    side = prepare(stripes, np.eye(3), None, "fixed")
    objective = Objective(levels(side, side)[-1], similarity)
    whole, part = objective(np.eye(3)), objective(world_map(np.eye(2), (16.0, 0.0)))
    assert part == pytest.approx(0.75 * whole, rel=0.1)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("dims", [2, 3])
def test_slopes_are_those_of_the_loss(dims: int, similarity: str) -> None:
    shape, affine = FIXED[dims]
    moved = world_map(rotation(np.array([0.1] * (1 if dims == 2 else 3)), dims), (2.0, 1.0, -1.0))
    fixed = prepare(image_of(shape, affine), affine, None, "fixed")
    # A wider grid, so that nothing leaves it: the mask of what does has no slope.
    wide = tuple(2 * n for n in shape)
    around = grid(wide, affine[:-1, :-1])
    moving = prepare(image_of(wide, around, moved), around, None, "moving")
    objective = Objective(levels(fixed, moving)[0], similarity)
    basis = generators("affine", dims)
    start = np.full(len(basis), 0.01)
    _, slope = objective.loss_and_slope(np.eye(dims + 1), start, basis)
    for k in range(len(basis)):
        step = np.zeros(len(basis))
        step[k] = 2e-3
        ahead, behind = (objective.loss_and_slope(np.eye(dims + 1), start + s, basis)[0] for s in (step, -step))
        assert slope[k] == pytest.approx((ahead - behind) / 4e-3, rel=0.1, abs=0.03 * np.abs(slope).max())


def test_mutual_information_of_known_histograms() -> None:
    half = torch.cat([torch.zeros(500), torch.ones(500)]).view(1, 1, 25, 40)
    unrelated = torch.tensor([0.0, 1.0]).repeat(500).view(1, 1, 25, 40)
    own = float(mattes_information(half, half))
    assert own == pytest.approx(float(np.log(2)), abs=1e-3)
    assert float(mattes_information(unrelated, half)) == pytest.approx(0.0, abs=1e-6)
    assert float(mattes_information(1 - half, half)) == pytest.approx(own, abs=1e-6)
    mask = (unrelated > 0).float()
    assert float(mattes_information(half * mask, half, mask)) == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_generators_are_a_basis_and_steps_keep_their_group(dims: int) -> None:
    assert len(generators("affine", dims)) == dims * (dims + 1)
    assert np.linalg.matrix_rank(generators("affine", dims).reshape(dims * (dims + 1), -1)) == dims * (dims + 1)
    basis = torch.from_numpy(generators("rigid", dims))
    step = step_matrix(torch.full((len(basis),), 0.4, dtype=torch.float64), basis, torch.ones(dims).double(), 30.0)
    linear = step[:dims, :dims]
    assert torch.allclose(linear @ linear.T, torch.eye(dims).double(), atol=1e-12)
    assert torch.allclose(torch.linalg.det(linear), torch.tensor(1.0).double())


def test_the_minimiser_finds_the_bottom_of_a_bent_valley() -> None:
    def rosenbrock(p: np.ndarray) -> tuple[float, np.ndarray]:
        a, b = 1 - p[0], p[1] - p[0] ** 2
        return float(a * a + 20 * b * b), np.array([-2 * a - 80 * b * p[0], 40 * b])

    end = minimise(
        rosenbrock, np.diag([2.0, 40.0]), lambda p: float(np.abs(p).max()), longest=0.5, shortest=1e-8, max_steps=100
    )
    assert np.allclose(end.parameters, 1.0, atol=1e-4)


FLAT = torch.full((1, 1, 12, 12, 12), 7.0)
RAMP = torch.arange(12.0**3).view(1, 1, 12, 12, 12)
NAN = RAMP.clone()
NAN[0, 0, 0, 0, :3] = float("nan")
EYE = np.eye(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((RAMP, FLAT, EYE, EYE), {}, "fixed is constant: every voxel is 7"),
        ((FLAT, RAMP, EYE, EYE), {}, "moving is constant: every voxel is 7"),
        ((NAN, RAMP, EYE, EYE), {}, "moving has 3 values of 1728 that are not finite"),
        ((RAMP[0], RAMP[0], EYE, EYE), {}, r"fixed must be \(1, 1, H, W\) or .*found"),
        ((RAMP, RAMP[:, :, 0], EYE, np.eye(3)), {}, "must have as many axes"),
        ((RAMP, RAMP, np.eye(3), EYE), {}, "moving_affine must be an invertible 4x4 matrix"),
        ((RAMP, RAMP, EYE, np.zeros((4, 4))), {}, "fixed_affine must be an invertible 4x4 matrix"),
        ((RAMP, RAMP, EYE, EYE), {"fixed_mask": RAMP * 0}, "fixed_mask is empty: not one of its 1728 voxels"),
        ((RAMP, RAMP, EYE, EYE), {"moving_mask": RAMP[..., 1:]}, "moving_mask must be as moving"),
        ((RAMP, RAMP, EYE, EYE), {"kind": "elastic"}, "kind must be one of .*got 'elastic'"),
        ((RAMP, RAMP, EYE, EYE), {"similarity": "ssd"}, "similarity must be one of .*got 'ssd'"),
        ((RAMP, RAMP, EYE, EYE), {"finest": 0.0}, "finest must be a positive"),
        ((RAMP, RAMP, EYE, EYE), {"max_scale": 0.5}, "max_scale must be above 1"),
    ],
)
def test_bad_input_is_named(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_affine(*arguments, **options)
