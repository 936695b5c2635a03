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

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from common.handlers.figures import (
    FOLD_COLOUR,
    GRID_COLOUR,
    LABEL_COLOURS,
    figure_to_array,
    registration_figure,
)
from common.spatial import warp


def example(dims: int, shift: float = 2.0) -> dict[str, torch.Tensor]:
    shape = (21, 18, 15)[:dims]
    moving = torch.zeros(1, *shape)
    moving[(0, *(slice(6, 11),) * dims)] = 1.0
    ddf = torch.zeros(dims, *shape)
    ddf[0] = shift
    moved = warp(moving[None], ddf[None])[0]
    return {"moving": moving, "fixed": moving.clone(), "moved": moved, "ddf": ddf}


def panel(figure: Figure, name: str, row: int = 0) -> np.ndarray:
    """The pixels of one panel."""
    pixels = figure_to_array(figure)
    axis = next(a for a in figure.axes if a.get_label() == f"{name}_{row}")
    (x0, y0), (x1, y1) = axis.get_window_extent().get_points()
    height = pixels.shape[0]
    return pixels[height - int(y1) + 1 : height - int(y0) - 1, int(x0) + 1 : int(x1) - 1]


def has_colour(pixels: np.ndarray, colour: str, tolerance: int = 12) -> bool:
    wanted = 255 * np.array(to_rgb(colour))
    return bool((np.abs(pixels.astype(float) - wanted).max(-1) < tolerance).any())


@pytest.mark.parametrize(("dims", "rows"), [(2, 1), (3, 3)])
def test_rows_and_columns(dims: int, rows: int) -> None:
    figure = registration_figure(**example(dims), title="a to b")
    names = [a.get_label() for a in figure.axes if a.get_label()[-1].isdigit()]
    assert len(names) == rows * 7 and len(set(names)) == len(names)
    titles = [a.get_title() for a in figure.axes if a.get_title()]
    assert titles == ["moving", "fixed", "moved", "|moving − fixed|", "|moved − fixed|", "warped grid", "log det J"]
    assert figure_to_array(figure).std() > 10


@pytest.mark.parametrize(("dims", "rows"), [(2, 1), (3, 3)])
def test_a_weight_map_has_a_panel_of_its_own(dims: int, rows: int) -> None:
    given = example(dims)
    weight = torch.ones_like(given["fixed"])
    weight[0, 10:] = 0.0
    figure = registration_figure(**given, weight_map=weight)
    names = [a.get_label() for a in figure.axes if a.get_label()[-1].isdigit()]
    assert len(names) == rows * 8 and [a.get_title() for a in figure.axes if a.get_title()][-1] == "weight map"
    assert next(a for a in figure.axes if a.get_label() == "weight_scale").get_xlim() == (0.0, 1.0)
    shown = panel(figure, "weight", rows - 1)
    # The ends of viridis, where the map is 1 and where it is 0.
    assert has_colour(shown[:, 5:6], "#fde725") and has_colour(shown[:, -6:-5], "#440154")
    assert not has_colour(shown[:, 5:6], "#440154")


@pytest.mark.parametrize(("dims", "rows"), [(2, 1), (3, 3)])
def test_an_uncertainty_has_a_panel_and_a_scale_from_0_in_its_unit(dims: int, rows: int) -> None:
    given = example(dims)
    spread = torch.full_like(given["fixed"], 2.5)
    spread[0, 10:] = 0.0
    figure = registration_figure(**given, uncertainty=spread, uncertainty_unit="mm", weight_map=spread / 2.5)
    titles = [a.get_title() for a in figure.axes if a.get_title()]
    assert titles[-2:] == ["weight map", "uncertainty"]
    scale = next(a for a in figure.axes if a.get_label() == "uncertainty_scale")
    assert scale.get_xlim() == (0.0, 2.5) and scale.get_xlabel() == "standard deviation, mm"
    shown = panel(figure, "uncertainty", rows - 1)
    # The ends of inferno: the largest value on the left, 0 on the right.
    assert has_colour(shown[:, 5:6], "#fcffa4") and has_colour(shown[:, -6:-5], "#000004")
    none = registration_figure(**given, uncertainty=torch.zeros_like(spread))
    assert next(a for a in none.axes if a.get_label() == "uncertainty_scale").get_xlim() == (0.0, 1.0)


def test_pyplot_knows_nothing_of_it() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), matplotlib.get_backend()
    figure_to_array(registration_figure(**example(2)))
    assert (plt.get_fignums(), matplotlib.get_backend()) == before


def test_identical_images_have_no_difference() -> None:
    given = example(2)
    before = panel(registration_figure(**given), "before")
    after = panel(registration_figure(**given), "after")
    assert before.max() < 10  # magma starts at (0, 0, 4)
    assert after.max() > 200  # the moved image differs


def test_differences_share_one_scale() -> None:
    given = example(2)
    given["fixed"] = given["moving"] * 0.5
    given["moved"] = given["moving"] * 0.75
    figure = registration_figure(**given)
    scales = {a.get_label(): a.images[0].get_clim() for a in figure.axes if a.get_label() in ("before_0", "after_0")}
    assert scales["before_0"] == scales["after_0"] == (0.0, 0.5)


@pytest.mark.parametrize("dims", [2, 3])
def test_label_outlines(dims: int) -> None:
    given = example(dims)
    label = given["moving"].to(torch.uint8)
    plain, outlined = registration_figure(**given), registration_figure(**given, moving_label=label, fixed_label=label)
    for name in ("moving", "fixed"):
        assert has_colour(panel(outlined, name), LABEL_COLOURS[0]) and not has_colour(
            panel(plain, name), LABEL_COLOURS[0]
        )
    assert not has_colour(panel(outlined, "moved"), LABEL_COLOURS[0])
    assert has_colour(panel(registration_figure(**given, moved_label=2 * label), "moved"), LABEL_COLOURS[1])


def test_folded_voxels_are_red() -> None:
    given = example(2, shift=0.0)
    smooth = registration_figure(**given)
    assert not has_colour(panel(smooth, "jacobian"), FOLD_COLOUR)
    given["ddf"][0] = -2.0 * torch.arange(21.0)[:, None]
    assert has_colour(panel(registration_figure(**given), "jacobian"), FOLD_COLOUR)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_determinant_that_is_given_is_drawn_instead_of_the_fields(dims: int) -> None:
    drawn = example(dims)
    shape = drawn["fixed"].shape[1:]
    given = torch.ones(shape)
    given[tuple(slice(2, n - 2) for n in shape)] = -1.0
    assert has_colour(panel(registration_figure(**drawn, determinant=given), "jacobian"), FOLD_COLOUR)
    assert not has_colour(panel(registration_figure(**drawn), "jacobian"), FOLD_COLOUR)


def grid_columns(figure: Figure) -> np.ndarray:
    """Where vertical grid lines cross the middle of the panel, as a share of its width."""
    pixels = panel(figure, "grid")
    middle = pixels[pixels.shape[0] // 2 - 3 : pixels.shape[0] // 2 + 3].astype(float)
    blue = (middle[..., 2] - middle[..., 0]).min(0)
    peaks = [k for k in range(1, len(blue) - 1) if blue[k] > 60 and blue[k] >= blue[k - 1] and blue[k] > blue[k + 1]]
    return np.array(peaks) / pixels.shape[1]


def test_the_grid_is_carried_along_with_the_image() -> None:
    """A field of +1 samples one voxel ahead, so what is painted on moving appears one voxel lower along that axis."""
    given = example(2, shift=0.0)
    given["moved"] = torch.zeros_like(given["moved"])
    still = grid_columns(registration_figure(**given))
    given["ddf"][0] = 0.8
    carried = grid_columns(registration_figure(**given))
    assert len(still) > 5 and has_colour(panel(registration_figure(**given), "grid"), GRID_COLOUR, 40)
    steps = (carried[1:6, None] - still[None]) * 21
    nearest = steps[np.arange(5), np.abs(steps + 0.8).argmin(1)]
    assert np.allclose(nearest, -0.8, atol=0.15)


def test_panels_have_the_shape_of_the_anatomy() -> None:
    given = example(3)
    figure = registration_figure(**given, spacing=(1.0, 2.0, 3.0))
    height, width = panel(figure, "moving", 1).shape[:2]  # across axis 1: axis 0 to the right, axis 2 up
    assert height / width == pytest.approx(15 * 3 / 21, rel=0.03)


def test_anatomical_views() -> None:
    """An image stored left, inferior, anterior is shown with the patient's right on the left and head up."""
    moving = torch.zeros(1, 20, 18, 16)
    moving[0, 15:, :5, 12:] = 1.0  # left (axis 0 to L), superior (axis 1 to I), anterior (axis 2 to A)
    ddf = torch.zeros(3, 20, 18, 16)
    label = moving.to(torch.uint8)
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    figure = registration_figure(moving, moving, moving, ddf, fixed_label=label, affine=affine)
    names = [a.get_ylabel() for a in figure.axes if a.get_ylabel()]
    assert names == ["axial", "coronal", "sagittal"]
    for row, (bright_right, bright_top) in enumerate([(True, True), (True, True), (False, True)]):
        pixels = panel(figure, "fixed", row).mean(-1)
        middle_y, middle_x = (n // 2 for n in pixels.shape)
        right = pixels[:, middle_x:].sum() > pixels[:, :middle_x].sum()
        assert right == bright_right and (pixels[:middle_y].sum() > pixels[middle_y:].sum()) == bright_top
    letters = [text.get_text() for a in figure.axes if a.get_label() == "moving_0" for text in a.texts]
    assert letters == ["R", "L", "P", "A"]


def test_the_field_turns_with_the_axes() -> None:
    """Turning array axes must leave the determinant as it was."""
    torch.manual_seed(3)
    given = {"moving": torch.rand(1, 9, 7, 11)}
    ddf = 0.8 * torch.randn(3, 9, 7, 11)
    affine = np.array([[0, 0, -2.0, 0], [1.0, 0, 0, 0], [0, -1.5, 0, 0], [0, 0, 0, 1]])
    plain = registration_figure(given["moving"], given["moving"], given["moving"], ddf)
    turned = registration_figure(given["moving"], given["moving"], given["moving"], ddf, affine=affine)

    def fold_share(figure: Figure, row: int) -> float:
        pixels = panel(figure, "jacobian", row).astype(float)
        red = np.abs(pixels - 255 * np.array(to_rgb(FOLD_COLOUR))).max(-1) < 5
        return float(red.mean())

    # Array axis 0 runs anterior, 1 inferior, 2 left: the coronal slice is across axis 0, and so on.
    for row, plane in ((1, 0), (0, 1), (2, 2)):
        assert fold_share(turned, row) == pytest.approx(fold_share(plain, plane), abs=0.03)
    assert fold_share(plain, 0) > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_other_types_and_a_moving_image_of_another_size(dtype: torch.dtype) -> None:
    given = example(3)
    given["moving"] = (100 * torch.rand(1, 25, 16, 15)).to(dtype)
    batched = {name: value[None] for name, value in given.items()}
    assert figure_to_array(registration_figure(**batched)).std() > 10


def test_constant_images_and_small_ones() -> None:
    flat = torch.full((1, 3, 2), 0.5)
    figure_to_array(registration_figure(flat, flat, flat, torch.zeros(2, 3, 2)))


def test_a_field_of_another_form_is_refused() -> None:
    image = torch.zeros(1, 8, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 8\)"):
        registration_figure(image, image, image, torch.zeros(2, 8, 8, 8))
