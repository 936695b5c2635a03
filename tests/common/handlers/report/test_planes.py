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

import numpy as np
import pytest

from common.handlers.report import ReportInputs
from common.handlers.report.planes import MAX_PIXELS, MAX_SLICES, planes
from common.handlers.report.volumes import turned_volumes
from tests.common.handlers.report.example import SHAPE, pair, scan

# Where a bright voxel at the far right, front or top is seen: (row, column) as 0 for the first and -1 for the last.
CORNERS = [
    ("axial", "front", (0, None)),
    ("axial", "right", (None, 0)),
    ("coronal", "top", (0, None)),
    ("coronal", "right", (None, 0)),
    ("sagittal", "top", (0, None)),
    ("sagittal", "front", (None, 0)),
]


@pytest.mark.parametrize(("plane", "end", "seen"), CORNERS)
@pytest.mark.parametrize("flipped", [False, True])
def test_planes_are_seen_as_radiologists_do(plane: str, end: str, seen: tuple, flipped: bool) -> None:
    axis = {"right": 0, "front": 1, "top": 2}[end]
    image = np.zeros(SHAPE)
    # In a flipped file the far end has index 0.
    np.moveaxis(image, axis, 0)[0 if flipped else -1] = 1.0
    affine = np.diag([-1.0, -1.0, -1.0, 1.0]) if flipped else np.eye(4)
    part = next(p for p in planes(turned_volumes(pair(affine=affine, before=image))) if p.name == plane)
    where = np.argwhere(part.images["before"] > 128)[:, 1:]
    for k, place in enumerate(seen):
        if place is not None:
            assert set(where[:, k]) == {place}
    assert (
        part.sides
        == {"axial": ("R", "L", "P", "A"), "coronal": ("R", "L", "I", "S"), "sagittal": ("A", "P", "I", "S")}[plane]
    )


@pytest.mark.parametrize(
    ("signs", "sides"),
    [((1, 1), ("L", "R", "P", "A")), ((-1, 1), ("R", "L", "P", "A")), ((-1, -1), ("R", "L", "A", "P"))],
)
def test_a_2d_image_is_not_turned_and_its_sides_are_named(signs: tuple[int, int], sides: tuple[str, ...]) -> None:
    image = np.zeros(SHAPE[:2])
    image[0, 10] = 1.0
    (part,) = planes(turned_volumes(pair(2, np.diag([*signs, 1.0, 1.0]), before=image)))
    # The first axis runs right, the second up.
    assert np.argwhere(part.images["before"][0] > 128).tolist() == [[0, 0]]
    assert part.sides == sides and part.size == (11, 13) and part.captions == [""]


def test_captions_say_where_a_slice_is_in_mm_and_in_the_file() -> None:
    affine = np.array([[0, -2.0, 0, 10], [0, 0, 3.0, -9], [1.0, 0, 0, 0], [0, 0, 0, 1]])
    axial, coronal, sagittal = planes(turned_volumes(pair(affine=affine)))
    assert axial.captions[0] == "0.0 mm S, voxel 0 of axis 0" and len(axial.captions) == 13
    assert coronal.captions[0] == "9.0 mm P, voxel 0 of axis 2" and coronal.captions[6] == "9.0 mm A, voxel 6 of axis 2"
    assert (
        sagittal.captions[0] == "10.0 mm L, voxel 10 of axis 1"
        and sagittal.captions[-1] == "10.0 mm R, voxel 0 of axis 1"
    )


def large(shape: tuple[int, ...], affine: np.ndarray | None = None, **others: object) -> ReportInputs:
    image = np.random.default_rng(0).random(shape).astype("float32")
    given = scan(image, affine)
    return ReportInputs(given, given, image, image, np.zeros((len(shape), *shape), "float32"), **others)


def test_slices_are_bounded_in_number_and_size() -> None:
    labels = np.zeros((601, 3, 103), dtype=int)
    labels[:, :, 90] = 5
    axial, coronal, sagittal = planes(turned_volumes(large((601, 3, 103), fixed_label=labels)))
    # 601 voxels need 3 to a pixel.
    assert axial.size == (3, 201) and coronal.size == (103, 201) and sagittal.size == (103, 3)
    assert [len(part.captions) for part in (axial, coronal, sagittal)] == [MAX_SLICES, 3, MAX_SLICES]
    assert max(axial.size) <= MAX_PIXELS and axial.millimetres == (603.0, 3.0)
    # The first slice shown goes through the labels.
    assert abs(int(axial.captions[axial.start].split("voxel ")[1].split()[0]) - 90) <= 2


def test_a_pixel_is_the_mean_of_its_voxels_and_folded_if_any_of_them_is() -> None:
    image = np.zeros((512, 4))
    image[0:2, 0] = (0.0, 1.0)
    image[511] = 1.0
    ddf = np.zeros((2, 512, 4))
    ddf[0, 100] = 3.0
    (part,) = planes(turned_volumes(ReportInputs(scan(image), scan(image), image, image, ddf)))
    assert part.size == (4, 256)
    assert part.images["fixed"][0, -1, 0] == 128 and part.images["fixed"][0, -1, 255] == 128
    # J is 1 + (u[k+1] - u[k-1]) / 2: -0.5 at voxel 101 alone.
    assert np.argwhere(part.folded[0]).tolist() == [[row, 50] for row in range(4)]


@pytest.mark.parametrize("shape", [(13, 11, 7), (300, 11, 7), (15, 530, 9)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_landmarks_lie_on_their_voxels(shape: tuple[int, ...], signs: tuple[int, ...]) -> None:
    voxel = tuple(n // 3 for n in shape)
    spot = np.zeros(shape)
    spot[voxel] = 1.0
    points = np.array([voxel, tuple(10 * n for n in shape)])
    affine = np.diag([*signs, 1.0])
    for part in planes(turned_volumes(large(shape, affine=affine, maps={"spot": spot}, fixed_points=points))):
        # The second one lies outside.
        ((number, row, column),) = part.points["fixed"]
        stack = part.maps["spot"]
        # Not every slice of a long axis is shown.
        if len(stack) < MAX_SLICES:
            peak = np.unravel_index(stack.argmax(), stack.shape)
            np.testing.assert_allclose(peak, (number, row, column), atol=0.5)
