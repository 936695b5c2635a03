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
"""Landmarks of a pair, and what is known of it before an affine alignment."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader
from torch import Tensor

from common.data import ScanPairs
from common.engines import PairValues, register_affine, standard_measures
from common.handlers.registered import RegisteredPair
from common.io import load_image, save_image, save_transform
from common.io.points import PointsError
from common.metrics import TargetRegistrationError
from common.spatial import Affine, SpatialTransform
from common.transforms import LoadScanPaird

# From the fixed scan's world to the moving one's: turned, sheared, shifted.
MAP = {
    2: np.array([[0.9, -0.5, 3.0], [0.4, 1.1, -2.0], [0, 0, 1]]),
    3: np.array([[0.9, -0.5, 0, 3.0], [0.4, 1.1, 0.1, -2.0], [0.2, 0, 1.25, 3.0], [0, 0, 0, 1]]),
}
OBLIQUE = {
    2: np.array([[1.1, 0.3, -10.0], [-0.3, 0.9, 4.0], [0, 0, 1]]),
    3: np.array([[0.2, -1.4, 0.1, 10.0], [-0.1, 0.2, 1.9, 4.0], [1.2, 0.1, 0, -7.0], [0, 0, 0, 1]]),
}
SHAPE = {2: (20, 23), 3: (17, 20, 18)}


def carried(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def files(folder: Path, dims: int, offset: np.ndarray, space: str = "ras") -> dict[str, Any]:
    """Two scans, the moving one an image moved by MAP, landmarks that lie ``offset`` mm beside their partners."""
    random = np.random.default_rng(dims)
    moving_affine = MAP[dims] @ OBLIQUE[dims] @ np.diag([*[0.9, 1.2, 0.8][:dims], 1.0])
    pair: dict[str, Any] = {"points_space": space, "moving_id": "m", "fixed_id": "f"}
    affines = {"moving": moving_affine, "fixed": OBLIQUE[dims]}
    for role, affine in affines.items():
        image = random.random(SHAPE[dims]).astype(np.float32)
        pair[role] = str(save_image(folder / f"{role}.nii", image, affine))
        pair[f"{role}_label"] = str(save_image(folder / f"{role}_l.nii", (image * 3).astype(np.uint8), affine))
    fixed = carried(OBLIQUE[dims], random.uniform(2, 15, (30, dims)))
    worlds = {"moving": carried(MAP[dims], fixed) + offset, "fixed": fixed}
    for role, points in worlds.items():
        to_voxels = np.linalg.inv(load_image(pair[role]).affine)
        signs = np.array([-1, -1, 1])[:dims]
        points = {"ras": points, "lps": points * signs, "voxel": carried(to_voxels, points)}[space]
        path = folder / f"{role}.csv"
        np.savetxt(path, points, delimiter=",", header=",".join("xyz"[:dims]), comments="", fmt="%.8f")
        pair[f"{role}_points"] = str(path)
    return pair


def map_file(folder: Path, pair: dict[str, Any], matrix: np.ndarray) -> str:
    transform = SpatialTransform((Affine(torch.from_numpy(matrix)),))
    both = load_image(pair["fixed"]), load_image(pair["moving"])
    return str(save_transform(folder / "map.tfm", transform, *both))


def measured(pair: dict[str, Any], load: LoadScanPaird, ddf: Tensor | float = 0.0) -> dict[str, float]:
    """What an evaluator would measure of a network that gives this field."""
    (batch,) = DataLoader(ScanPairs([pair], load), batch_size=1)
    still = torch.zeros(1, batch["fixed"].ndim - 2, *batch["fixed"].shape[2:])
    measures = standard_measures([1, 2], landmarks=True, some_labels=True, stages=True)
    found = measures(PairValues(batch, {"ddf": still + ddf}))
    return {name: float(value.nanmean()) for name, value in found.items()}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("space", ["ras", "lps", "voxel"])
@pytest.mark.parametrize("spacing", [None, 1.3])
def test_points_moved_by_a_known_map_are_at_their_partners(
    tmp_path: Path, dims: int, space: str, spacing: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    pair = files(tmp_path, dims, np.zeros(dims), space)
    load = LoadScanPaird(affine=map_file(tmp_path, pair, MAP[dims]), spacing=spacing)
    with caplog.at_level(logging.WARNING):
        found = measured(pair, load)
    assert "points" not in caplog.text
    assert found["tre"] < 1e-4 and found["tre_before"] < 1e-4
    worlds = {role: np.loadtxt(tmp_path / f"{role}.csv", delimiter=",", skiprows=1) for role in ("moving", "fixed")}
    if space == "voxel":
        worlds = {role: carried(load_image(pair[role]).affine, points) for role, points in worlds.items()}
    # As the headers place them, worlds being one.
    away = np.linalg.norm(worlds["fixed"] - worlds["moving"], axis=1).mean()
    assert found["tre_initial"] == pytest.approx(away, rel=1e-4) and away > 1
    assert "tre_network" not in found


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_missing_is_measured_in_the_moving_files_millimetres(tmp_path: Path, dims: int) -> None:
    offset = np.array([3.0, -4.0, 12.0])[:dims]
    pair = files(tmp_path, dims, offset)
    path = map_file(tmp_path, pair, MAP[dims])
    length = float(np.linalg.norm(offset))  # 5 or 13
    assert measured(pair, LoadScanPaird(affine=path))["tre"] == pytest.approx(length, rel=1e-5)
    # The field that brings all points to their partners, in voxels of what the network sees.
    loaded = LoadScanPaird(affine=path, spacing=1.4)(pair)
    keep = [*range(dims), -1]
    seen = np.asarray(loaded["moving"].affine)[np.ix_(keep, keep)]
    ddf = torch.from_numpy(np.linalg.solve(seen[:-1, :-1], offset)).float().view(1, dims, *[1] * dims)
    found = measured(pair, LoadScanPaird(affine=path, spacing=1.4), ddf)
    assert found["tre"] < 1e-4 and found["tre_before"] == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", ["map", "none", "frames"])
def test_the_files_that_are_written_carry_points_as_far(tmp_path: Path, dims: int, affine: str) -> None:
    """Of a smooth field: the transform that the writer makes, on the fixed file's grid and in mm."""
    pair = files(tmp_path, dims, np.zeros(dims))
    load = LoadScanPaird(affine=map_file(tmp_path, pair, MAP[dims]) if affine == "map" else affine)
    (batch,) = DataLoader(ScanPairs([pair], load), batch_size=1)
    coarse = torch.randn(1, dims, *[3] * dims, generator=torch.Generator().manual_seed(0))
    size, mode = tuple(batch["fixed"].shape[2:]), "bilinear" if dims == 2 else "trilinear"
    ddf = 2 * torch.nn.functional.interpolate(coarse, size=size, mode=mode, align_corners=True)
    metric = TargetRegistrationError()
    found = metric(batch["fixed_points"], batch["moving_points"], ddf=ddf, affine=batch["moving_affine"])
    pair_on_files = RegisteredPair(pair, {**batch, "ddf": ddf}, 0)
    worlds = [np.loadtxt(pair[f"{role}_points"], delimiter=",", skiprows=1) for role in ("moving", "fixed")]
    carried_there = pair_on_files.transform().points(torch.from_numpy(worlds[1])).numpy()
    expected = np.linalg.norm(carried_there - worlds[0], axis=1).mean()
    # On the fixed file's grid the same field is interpolated in other cells where grids differ.
    assert float(found) == pytest.approx(expected, abs=2e-3 if affine != "frames" else 0.02)
    assert ("initial_points" in batch) == ("initial_label" in batch) == (affine == "map")


@pytest.mark.parametrize("dims", [2, 3])
def test_labels_where_the_headers_place_them(tmp_path: Path, dims: int) -> None:
    pair = files(tmp_path, dims, np.zeros(dims))
    still = LoadScanPaird(affine="none", spacing=1.3)(pair)
    moved = LoadScanPaird(affine=map_file(tmp_path, pair, MAP[dims]), spacing=1.3)(pair)
    assert "initial_label" not in still and "initial_points" not in still
    assert torch.equal(moved["initial_label"], still["moving_label"]) and moved["initial_label"].dtype == torch.int32
    assert not torch.equal(moved["initial_label"], moved["moving_label"])
    before = measured(pair, LoadScanPaird(affine="none", spacing=1.3))
    after = measured(pair, LoadScanPaird(affine=map_file(tmp_path, pair, MAP[dims]), spacing=1.3))
    assert after["dice_initial"] == before["dice_before"] and "dice_initial" not in before
    assert after["tre_initial"] == pytest.approx(before["tre_before"], rel=1e-5) and "tre_initial" not in before


@pytest.mark.parametrize("dims", [2, 3])
def test_an_alignment_that_is_found_brings_points_back(tmp_path: Path, dims: int) -> None:
    """Bright spots, and landmarks between them, moved by a map that nobody tells."""
    matrix = np.eye(dims + 1)
    matrix[:2, :2] = [[0.96, -0.3], [0.28, 1.02]]
    matrix[:-1, -1] = (12.0, -4.0, 6.0)[:dims]
    random = np.random.default_rng(5)
    spots, widths = random.uniform(-14, 14, (7, dims)), random.uniform(3, 8, 7)
    affine = np.diag([*[2.0] * dims, 1.0])
    affine[:-1, -1] = -26.0
    pair: dict[str, Any] = {"points_space": "ras", "moving_id": "m", "fixed_id": "f"}
    for role, place in (("fixed", affine), ("moving", matrix @ affine @ np.diag([*[1.1, 0.9, 1.0][:dims], 1.0]))):
        world = carried(place, np.indices([28] * dims).reshape(dims, -1).T)
        world = world if role == "fixed" else carried(np.linalg.inv(matrix), world)
        values = sum(np.exp(-0.5 * ((world - s) ** 2).sum(1) / w**2) for s, w in zip(spots, widths, strict=True))
        pair[role] = str(save_image(tmp_path / f"{role}.nii", values.reshape([28] * dims).astype(np.float32), place))
    points = random.uniform(-12, 12, (20, dims))
    for role, rows in (("fixed", points), ("moving", carried(matrix, points))):
        np.savetxt(tmp_path / f"{role}.csv", rows, delimiter=",", fmt="%.6f")
        pair[f"{role}_points"] = str(tmp_path / f"{role}.csv")
    found = measured(pair, LoadScanPaird(affine="affine", aligner=register_affine))
    assert found["tre_initial"] > 8 and found["tre"] < 0.5


def test_a_pair_may_have_an_affine_of_its_own(tmp_path: Path) -> None:
    pair = files(tmp_path, 3, np.zeros(3))
    path = map_file(tmp_path, pair, MAP[3])
    load = LoadScanPaird()
    assert "affine_matrix" not in load(pair)
    own = load({**pair, "affine": path})
    np.testing.assert_allclose(own["affine_matrix"], MAP[3], atol=1e-6)
    inverse = map_file(tmp_path, pair, np.linalg.inv(MAP[3]))
    np.testing.assert_allclose(load({**pair, "affine": f"{inverse}:inverse"})["affine_matrix"], MAP[3], atol=1e-6)
    assert measured({**pair, "affine": f"{inverse}:inverse"}, load)["tre"] < 1e-4
    with pytest.raises(FileNotFoundError, match=r"gone.mat"):
        load({**pair, "affine": str(tmp_path / "gone.mat")})
    with pytest.raises(ValueError, match=r"slices of stacks .*map.tfm cannot align them"):
        LoadScanPaird(stacks=True)({**pair, "affine": path})


def test_landmarks_that_are_none_and_those_of_the_wrong_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair = files(tmp_path, 3, np.zeros(3), "voxel")
    with caplog.at_level(logging.WARNING):
        loaded = LoadScanPaird(affine="none")({**pair, "points_space": "lps"})
    assert "moving.csv lie outside of" in caplog.text and "is --points_space voxel meant?" in caplog.text
    assert "fixed.csv lie outside of" in loaded["warnings"]
    (tmp_path / "moving.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(PointsError, match=r"moving.csv has 1 points but .*fixed.csv has 30 points"):
        LoadScanPaird()(pair)
    without = {key: value for key, value in pair.items() if key != "moving_points"}
    with pytest.raises(PointsError, match=r"fixed.csv has no partner"):
        LoadScanPaird()(without)


def test_points_of_stacks_lie_in_their_volume(tmp_path: Path) -> None:
    affine = np.diag([1.5, 1, 8, 1])
    pair = {}
    for role, shape in (("moving", (17, 20, 4)), ("fixed", (20, 16, 4))):
        pair[role] = str(save_image(tmp_path / f"{role}.nii", np.random.default_rng(0).random(shape), affine))
        pair[f"{role}_points"] = str(tmp_path / f"{role}.csv")
    (tmp_path / "moving.csv").write_text("3,5,2\n")
    (tmp_path / "fixed.csv").write_text("5,5,2\n")
    loaded = LoadScanPaird(stacks=True)({**pair, "points_space": "voxel"})
    # Padded about their middles: 17 to 20 columns, one and a half on either side, and 16 to 20 rows.
    keep = np.asarray(loaded["moving"].affine), np.asarray(loaded["fixed"].affine)
    worlds = [carried(a, loaded[f"{r}_points"].numpy()) for a, r in zip(keep, ("moving", "fixed"), strict=True)]
    np.testing.assert_allclose(worlds, [[[4.5, 5, 16]], [[7.5, 5, 16]]], atol=1e-5)
