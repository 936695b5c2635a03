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

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from common.handlers.report import ReportInputs
from common.handlers.report.planes import Plane, planes
from common.handlers.report.sheets import Scales, Sheet, outlines, scales, sheets, zoom
from common.handlers.report.volumes import turned_volumes
from common.handlers.views import FOLD_COLOUR, GRID_COLOUR, JACOBIAN_COLOURS, LABEL_COLOURS
from tests.common.handlers.report.example import SHAPE, pair, scaling, scan


def decoded(sheet: Sheet, number: int = 0, mode: str = "RGB") -> np.ndarray:
    """The pixels of one slice."""
    picture = Image.open(io.BytesIO(base64.b64decode(sheet.source.split(",")[1]))).convert(mode)
    top, left = (number // sheet.columns) * sheet.height, (number % sheet.columns) * sheet.width
    return np.asarray(picture)[top : top + sheet.height, left : left + sheet.width]


def drawn(dims: int = 3, **others: object) -> tuple[list[Plane], Scales, list[dict[str, Sheet]]]:
    parts = planes(turned_volumes(pair(dims, **others)))
    scale = scales(parts)
    return parts, scale, [sheets(part, scale) for part in parts]


def rgb(colour: object) -> list[int]:
    return [round(255 * value) for value in to_rgb(colour)]


@pytest.mark.parametrize("dims", [2, 3])
def test_small_images_are_sent_without_loss_slice_by_slice(dims: int) -> None:
    parts, _, given = drawn(dims)
    assert len(parts) == (1 if dims == 2 else 3)
    for part, sheet in zip(parts, given, strict=True):
        assert set(sheet) == {"fixed", "before", "moved", "grid", "jacobian"}
        for number in range(len(part.captions)):
            assert (decoded(sheet["fixed"], number, "L") == part.images["fixed"][number]).all()
        assert all(s.source.startswith("data:image/png;base64,") and s.alt for s in sheet.values())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("by", "end"), [(0.5, 0.0), (2.0, 1.0), (1.0, 0.5)])
def test_the_jacobian_of_a_scaling_has_the_colour_at_the_end_of_the_scale(dims: int, by: float, end: float) -> None:
    _, scale, given = drawn(dims, ddf=scaling(dims, by))
    assert scale.log_determinant == pytest.approx(max(abs(dims * np.log(by)), 0.1), rel=1e-4)
    pixels = decoded(given[0]["jacobian"])
    assert (pixels == rgb(JACOBIAN_COLOURS(end)[:3])).all()


def test_folded_voxels_are_red_and_no_others() -> None:
    ddf = np.zeros((2, *SHAPE[:2]))
    # J is 1 + (u[k+1] - u[k-1]) / 2 along the first axis: -0.5 at voxel 5.
    ddf[0, 4] = 3.0
    _, _, (sheet,) = drawn(2, ddf=ddf)
    red = (decoded(sheet["jacobian"]) == rgb(FOLD_COLOUR)).all(-1)
    assert set(np.argwhere(red)[:, 1]) == {5} and red.sum() == SHAPE[1]


def test_outlines_are_the_rim_of_each_label() -> None:
    labels = np.zeros((1, 5, 6), dtype=int)
    labels[0, 1:4, 1:5] = 1
    labels[0, 1:4, 3:5] = 10
    expected = np.array(
        [[0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 0], [0, 1, 1, 2, 2, 0], [0, 1, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0]]
    )
    # Label 10 has the second of eight colours.
    assert (outlines(labels)[0] == expected).all()
    full = np.full((1, 4, 5), 3)
    assert (outlines(full)[0] == np.pad(np.zeros((2, 3), dtype=int), 1, constant_values=3)).all()
    assert not outlines(np.zeros((2, 3, 3), dtype=int)).any()


def test_dashed_outlines_have_gaps() -> None:
    full = np.ones((1, 40, 40), dtype=int)
    solid, dashed = outlines(full), outlines(full, dashed=True)
    assert 0.4 < dashed.sum() / solid.sum() < 0.6 and not dashed[solid == 0].any()


def test_outlines_are_transparent_between_lines_and_finer_than_small_images() -> None:
    labels = np.zeros(SHAPE[:2], dtype=int)
    labels[3:8, 4:9] = 1
    (part,), _, (sheet,) = drawn(2, fixed_label=labels)
    pixels = decoded(sheet["outline_fixed"], mode="RGBA")
    fine = zoom(part)
    assert fine == 8 and pixels.shape[:2] == (11 * fine, 13 * fine)
    seen = np.argwhere(pixels[..., 3] > 0)
    # Rows count from the top: voxels 4 to 8 of 11 are rows 2 to 6.
    assert seen.min(0).tolist() == [2 * fine, 3 * fine] and seen.max(0).tolist() == [7 * fine - 1, 8 * fine - 1]
    assert (pixels[pixels[..., 3] > 0][:, :3] == rgb(LABEL_COLOURS[0])).all()


def grid_columns(shift: float) -> list[int]:
    ddf = np.zeros((2, *SHAPE[:2]))
    ddf[0] = shift
    (part,), scale, (sheet,) = drawn(2, ddf=ddf)
    assert scale.line_step == 13 / 24
    alpha = decoded(sheet["grid"], mode="RGBA")[..., 3]
    assert (decoded(sheet["grid"], mode="RGBA")[..., :3] == rgb(GRID_COLOUR)).all()
    full = (alpha > 128).all(0)
    # In voxels of the image, at the left edge of each line.
    return [round((k + 0.5) / zoom(part) - 0.5) for k in np.flatnonzero(full & ~np.roll(full, 1))]


def test_lines_of_the_grid_are_where_the_source_is_on_them() -> None:
    # Every second voxel, the least distance: levels 1, 3, 5, ...
    assert grid_columns(0.0) == [1, 3, 5, 7, 9, 11]
    # moved(x) = moving(x + 1): what lay at 1 is seen at 0.
    assert grid_columns(1.0) == [0, 2, 4, 6, 8, 10]


def test_maps_go_from_0_to_their_largest_value() -> None:
    ramp = np.broadcast_to(np.arange(13.0)[:, None], SHAPE[:2]).copy()
    _, scale, (sheet,) = drawn(2, maps={"ramp": ramp, "nothing": np.full(SHAPE[:2], np.nan)})
    assert scale.maps == {"ramp": (0.0, 12.0), "nothing": (0.0, 1.0)}
    pixels = decoded(sheet["map_0"])
    # The ends of viridis.
    assert pixels[0, 0].tolist() == rgb("#440154") and pixels[0, -1].tolist() == rgb("#fde725")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 1, 3), (1, 1, 1)])
def test_axes_of_one_voxel_and_flat_images_are_drawn(shape: tuple[int, ...]) -> None:
    flat = np.zeros(shape, dtype="float32")
    parts = planes(turned_volumes(ReportInputs(scan(flat), scan(flat), flat, flat, np.zeros((len(shape), *shape)))))
    for part in parts:
        assert not decoded(sheets(part, scales(parts))["fixed"], mode="L").any()


def test_noise_is_sent_smaller() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(250, 250, 12, generator=generator).numpy()
    ddf = 0.3 * torch.randn(3, *noise.shape, generator=generator).numpy()
    parts = planes(turned_volumes(ReportInputs(scan(noise), scan(noise), noise, noise, ddf, maps={"noise": noise})))
    given = sheets(parts[0], scales(parts))
    assert parts[0].size == (250, 250) and given["jacobian"].width < 250 and given["map_0"].width < 250
    assert given["fixed"].source.startswith("data:image/webp;base64,") and given["fixed"].width == 250
    error = np.abs(decoded(given["fixed"], 3, "L").astype(int) - parts[0].images["fixed"][3])
    assert error.mean() < 40
    # Folds are not lost where pixels are put together.
    red = (decoded(given["jacobian"], 3) == rgb(FOLD_COLOUR)).all(-1)
    assert red.mean() >= parts[0].folded[3].mean() > 0
    assert max(len(given[name].source) for name in ("jacobian", "map_0")) < 450_000
