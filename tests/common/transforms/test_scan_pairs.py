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

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

import common.spatial.warping as warping
from common.engines import register_affine
from common.io import GridError, PairError, load_image, save_image, save_transform
from common.spatial import Affine, SpatialTransform, warp
from common.spatial.world import field_on_grid
from common.transforms import LoadScanPaird


def scan(path: Path, shape: tuple[int, ...], spacing: float = 1.0, label: bool = False) -> str:
    array = np.random.default_rng(sum(shape)).random(shape).astype(np.float32)
    return str(save_image(path, (array * 3).astype(np.uint8) if label else array, np.diag([spacing, 1, 1, 1])))


@pytest.mark.parametrize("dims", [2, 3])
def test_each_pair_has_a_grid_of_its_own(tmp_path: Path, dims: int) -> None:
    load = LoadScanPaird()
    first = {"moving": scan(tmp_path / "a.nii", (7, 5, 6)[:dims]), "fixed": scan(tmp_path / "b.nii", (5, 6, 6)[:dims])}
    second = {"moving": scan(tmp_path / "c.nii", (4, 5, 9)[:dims]), "fixed": scan(tmp_path / "d.nii", (3, 3, 3)[:dims])}
    for pair, size in ((first, (7, 6, 6)), (second, (4, 5, 9)), (first, (7, 6, 6))):
        loaded = load(pair)
        assert loaded["moving"].shape == loaded["fixed"].shape == (1, *size[:dims])
        assert loaded["moving"].dtype == torch.float32 and 0 <= loaded["moving"].min() < loaded["moving"].max() <= 1


def test_other_voxels_are_brought_to_those_of_the_fixed_scan(tmp_path: Path) -> None:
    pair = {"moving": scan(tmp_path / "a.nii", (8, 5, 6), 2.0), "fixed": scan(tmp_path / "b.nii", (9, 5, 6))}
    loaded = LoadScanPaird(padding="border")(pair)
    assert loaded["moving"].shape == loaded["fixed"].shape == (1, 16, 5, 6)
    assert loaded["moving"].affine[0, 0] == 1


def test_labels_are_loaded_where_both_are_there_and_merged(tmp_path: Path) -> None:
    pair = {key: scan(tmp_path / f"{key}.nii", (6, 7)) for key in ("moving", "fixed")}
    moving_label = scan(tmp_path / "ml.nii", (6, 7), label=True)
    one = LoadScanPaird()({**pair, "moving_label": moving_label, "id": "x"})
    assert one["moving_label"] == moving_label and one["id"] == "x"
    labels = {"moving_label": moving_label, "fixed_label": moving_label}
    both = LoadScanPaird(label_map={2: 1})({**pair, **labels})
    assert both["fixed_label"].dtype == torch.int32 and both["fixed_label"].shape == (1, 6, 7)
    plain = LoadScanPaird()({**pair, **labels})
    assert torch.equal(both["moving_label"] == 1, plain["moving_label"] == 2)


def test_a_label_map_elsewhere_or_with_too_many_values_is_refused(tmp_path: Path) -> None:
    pair = {key: scan(tmp_path / f"{key}.nii", (6, 7)) for key in ("moving", "fixed")}
    with pytest.raises(GridError, match=r"moving.nii and .*l.nii"):
        LoadScanPaird()({**pair, "moving_label": scan(tmp_path / "l.nii", (6, 6), label=True)})
    large = {key: scan(tmp_path / f"large_{key}.nii", (40, 50)) for key in ("moving", "fixed")}
    values = str(save_image(tmp_path / "v.nii", np.arange(2000).reshape(40, 50), np.eye(4)))
    with pytest.raises(ValueError, match=r"v.nii has 2000 different values"):
        LoadScanPaird()({**large, "moving_label": values, "fixed_label": values})


def test_stacks_keep_their_slices(tmp_path: Path) -> None:
    pair = {"moving": scan(tmp_path / "a.nii", (7, 5, 4)), "fixed": scan(tmp_path / "b.nii", (5, 6, 4))}
    assert LoadScanPaird(stacks=True)(pair)["fixed"].shape == (1, 7, 6, 4)


def test_wrong_options_are_refused_before_the_first_pair() -> None:
    with pytest.raises(ValueError, match="intensity must be one of"):
        LoadScanPaird(intensity="percent")
    with pytest.raises(ValueError, match="padding must be"):
        LoadScanPaird(padding="edge", stacks=True)


# From the fixed scan's world to the moving one's: turned by 73.7 degrees about the last axis, scaled, shifted.
TURN = {
    2: np.array([[0.28, -0.96, 5.0], [0.96, 0.28, -8.0], [0, 0, 1]]),
    3: np.array([[0.28, -0.96, 0, 5.0], [0.96, 0.28, 0.1, -8.0], [0, 0, 1.25, 3.0], [0, 0, 0, 1]]),
}
# Slices are not turned, so that their affines are oblique without a flip; the volume's axes are S, L and A.
OBLIQUE = {
    2: np.array([[1.1, 0.3, -10.0], [-0.3, 0.9, 4.0], [0, 0, 1]]),
    3: np.array([[0.2, -1.4, 0.1, 10.0], [-0.1, 0.2, 1.9, 4.0], [1.2, 0.1, 0, -7.0], [0, 0, 0, 1]]),
}
SHAPES = {2: (20, 23), 3: (17, 20, 18)}
# Voxels of the moving file to voxels of the fixed file, whole steps: flipped, its axes exchanged, and cut off.
STEPS = {
    2: np.array([[0, 1.0, 1], [-1, 0, 21], [0, 0, 1]]),
    3: np.array([[0, -1.0, 0, 16], [1, 0, 0, 2], [0, 0, -1, 17], [0, 0, 0, 1]]),
}


def moved_copy(folder: Path, dims: int, label: bool = False) -> tuple[dict[str, Any], np.ndarray]:
    """A fixed scan and its very voxels in a file that lies elsewhere and turned; and which of them that file has."""
    array = np.random.default_rng(dims).random(SHAPES[dims]).astype(np.float32)
    array = (array * 4).astype(np.int16) if label else array
    rows = np.indices((16, 17, 18)[:dims]).reshape(dims, -1)
    places = np.rint(STEPS[dims][:-1, :-1] @ rows + STEPS[dims][:-1, -1:]).astype(int)
    assert (places >= 0).all() and (places < np.array(SHAPES[dims])[:, None]).all()
    copy = array[tuple(places)].reshape((16, 17, 18)[:dims])
    there = np.zeros(SHAPES[dims], bool)
    there[tuple(places)] = True
    suffix = "_label" if label else ""
    affine = TURN[dims] @ OBLIQUE[dims] @ STEPS[dims]
    files = {"moving": (copy, affine), "fixed": (array, OBLIQUE[dims])}
    paths = {f"{role}{suffix}": str(save_image(folder / f"{role}{suffix}.nii", *one)) for role, one in files.items()}
    return paths, there


def map_file(folder: Path, matrix: np.ndarray, pair: dict[str, Any]) -> Path:
    transform = SpatialTransform((Affine(torch.from_numpy(matrix)),))
    return save_transform(folder / "map.tfm", transform, load_image(pair["fixed"]), load_image(pair["moving"]))


def to_files(loaded: dict[str, Any], pair: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What a writer makes of a network that moves nothing: the moving file on the grid of the fixed one."""
    moving, fixed = load_image(pair["moving"]), load_image(pair["fixed"])
    dims = fixed.spatial_dims
    keep = [*range(dims), -1]
    seen = [torch.as_tensor(np.asarray(loaded[role].affine)[np.ix_(keep, keep)]) for role in ("fixed", "moving")]
    grids = torch.from_numpy(fixed.affine), torch.from_numpy(moving.affine)
    still = torch.zeros(1, dims, *loaded["fixed"].shape[1:])
    field = field_on_grid(still, *seen, fixed.array.shape, *grids)
    return warp(torch.from_numpy(moving.array)[None, None], field, padding="zeros")[0, 0], torch.from_numpy(fixed.array)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_turned_copy_is_seen_as_the_fixed_scan_is(tmp_path: Path, dims: int) -> None:
    pair, there = moved_copy(tmp_path, dims)
    pair |= moved_copy(tmp_path, dims, label=True)[0]
    loaded = LoadScanPaird(intensity="none", affine=map_file(tmp_path, TURN[dims], pair))(pair)
    fixed, moving = loaded["fixed"].as_tensor(), loaded["moving"].as_tensor()
    # What the fixed file holds, its axes turned to R, A and S, and nothing else.
    canonical = nib.as_closest_canonical(nib.load(pair["fixed"])) if dims == 3 else nib.load(pair["fixed"])
    np.testing.assert_array_equal(fixed[0].numpy(), np.squeeze(canonical.get_fdata(dtype=np.float32)))
    if dims == 3:
        np.testing.assert_allclose(loaded["fixed"].affine, canonical.affine, atol=1e-6)
        shown = nib.as_closest_canonical(nib.Nifti1Image(there.astype(np.uint8), OBLIQUE[3])).get_fdata() > 0
    else:
        shown = there
    torch.testing.assert_close(moving[0][shown], fixed[0][shown], atol=1e-4, rtol=0)
    assert float(moving[0][~shown].abs().max()) < 1e-4
    assert torch.equal(loaded["moving_label"][0][shown], loaded["fixed_label"][0][shown])
    assert loaded["moving_label"].dtype == torch.int32
    np.testing.assert_allclose(loaded["affine_matrix"], TURN[dims], atol=1e-6)
    assert list(loaded["timings"]) == ["load", "affine"] and min(loaded["timings"].values()) >= 0
    moved, target = to_files(loaded, pair)
    torch.testing.assert_close(moved[there], target[there], atol=1e-4, rtol=0)


def test_a_file_that_leads_the_wrong_way_is_turned_round(tmp_path: Path) -> None:
    pair, there = moved_copy(tmp_path, 3)
    path = map_file(tmp_path, np.linalg.inv(TURN[3]), pair)
    with pytest.raises(PairError, match=r"do not meet in the world under .*map.tfm .*Try ':inverse'"):
        LoadScanPaird(intensity="none", affine=path)(pair)
    again, target = to_files(LoadScanPaird(intensity="none", affine=[f"{path}:inverse"])(pair), pair)
    torch.testing.assert_close(again[there], target[there], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [None, 1.3])
def test_an_image_is_resampled_once(
    tmp_path: Path, dims: int, spacing: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, _ = moved_copy(tmp_path, dims)
    sizes = []
    sample = warping.sample_linear

    def counted(image: Tensor, *arguments: Any) -> Tensor:
        sizes.append(tuple(image.shape[2:]))
        return sample(image, *arguments)

    def refused(*arguments: Any, **options: Any) -> None:
        raise AssertionError("resampled by other means")

    monkeypatch.setattr(warping, "sample_linear", counted)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", refused)
    monkeypatch.setattr(torch.nn.functional, "interpolate", refused)
    path = map_file(tmp_path, TURN[dims], pair)
    LoadScanPaird(affine=path, spacing=spacing)(pair)
    fixed = {2: [(20, 23)], 3: [(20, 18, 17)]}[dims] if spacing else []
    assert len(sizes) == 1 + len(fixed) and set(fixed) < set(sizes)


def test_both_are_seen_at_a_spacing(tmp_path: Path) -> None:
    pair, _ = moved_copy(tmp_path, 3)
    loaded = LoadScanPaird(affine="none", spacing=[2, 1.5, 1])({**pair, "moving": pair["fixed"]})
    for role in ("moving", "fixed"):
        np.testing.assert_allclose(np.linalg.norm(loaded[role].affine[:3, :3], axis=0), [2, 1.5, 1], atol=1e-6)
    # 20 voxels of 1.4283 mm (R), 18 of 1.9026 (A) and 17 of 1.2207 (S)
    assert loaded["moving"].shape == loaded["fixed"].shape == (1, 14, 23, 21)
    # To the fixed scan's own grid there is nothing to do but turn axes.
    moved, target = to_files(loaded, {**pair, "moving": pair["fixed"]})
    torch.testing.assert_close(moved, target, atol=1e-4, rtol=0)
    framed = LoadScanPaird(spacing=[2, 1.5, 1])(pair)
    np.testing.assert_allclose(np.linalg.norm(framed["moving"].affine[:3, :3], axis=0), [2, 1.5, 1], atol=1e-5)
    for wrong in (0, -1.0, [1, 0, 1], "1", [1, 1, 1, 1]):
        with pytest.raises(ValueError, match="spacing must be one number or one along each axis"):
            LoadScanPaird(spacing=wrong)  # type: ignore[arg-type]


def blobs(points: np.ndarray) -> np.ndarray:
    """Some bright spots of unlike size, of points (d, N) in mm."""
    spots = [((0, 0, 0), 9.0), ((12, 3, 5), 4.0), ((-9, 10, -4), 4.0), ((3, -12, 8), 5.0), ((-5, -5, -12), 4.0)]
    total = np.zeros(points.shape[1])
    for place, width in spots:
        away = points - np.array(place[: len(points)], dtype=float)[:, None]
        total += np.exp(-0.5 * (away**2).sum(0) / width**2)
    return 1000 * np.where(total > 0.05, total, 0)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_turned_scan_is_found_and_brought_back(tmp_path: Path, dims: int) -> None:
    matrix = np.eye(dims + 1)
    matrix[:2, :2] = [[0.94, -0.34], [0.34, 0.94]]
    matrix[:-1, -1] = (30.0, -4.0, 6.0)[:dims]
    shapes, grids = {"fixed": (24, 26, 25)[:dims], "moving": (28, 24, 26)[:dims]}, {}
    pair: dict[str, Any] = {}
    for role, shape in shapes.items():
        affine = np.eye(dims + 1) * 2.0
        affine[:-1, -1] = -np.array(shape) + 1
        affine[-1, -1] = 1
        affine = matrix @ affine if role == "moving" else affine
        index = np.indices(shape).reshape(dims, -1)
        world = np.linalg.inv(matrix) @ affine if role == "moving" else affine
        values = blobs(world[:-1, :-1] @ index + world[:-1, -1:]).reshape(shape)
        grids[role] = np.eye(dims + 1) * [*np.linalg.norm(affine[:-1, :-1], axis=0), 1]
        pair[role] = str(save_image(tmp_path / f"{role}.nii", values.astype(np.float32), affine))

    def distance(affine: str) -> float:
        loaded = LoadScanPaird(affine=affine, aligner=register_affine)(pair)
        return float((loaded["moving"] - loaded["fixed"]).abs().mean())

    headers, centre, found = (distance(kind) for kind in ("none", "centre", "affine"))
    assert found < 0.01 < centre < headers


def test_scans_apart_are_refused_or_brought_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pair, _ = moved_copy(tmp_path, 2)
    far = np.eye(3)
    far[0, 2] = 500
    moving = load_image(pair["moving"])
    pair["moving"] = str(save_image(tmp_path / "far.nii", moving.array, far @ moving.affine))
    with pytest.raises(PairError, match=r"far.nii and .*fixed.nii do not meet in the world as their headers place"):
        LoadScanPaird(affine="none")(pair)
    with caplog.at_level(logging.WARNING):
        loaded = LoadScanPaird(affine="centre", aligner=register_affine)(pair)
    assert "far.nii" in loaded["warnings"] and "brought together by their centres of mass" in loaded["warnings"]
    assert loaded["warnings"] in caplog.text
    assert float(loaded["moving"].std()) > 0.1
    # Laid frame on frame, headers do not count.
    assert "warnings" not in LoadScanPaird()(pair)


def test_frames_of_series(tmp_path: Path) -> None:
    series = np.random.default_rng(0).random((17, 16, 18, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(series, np.eye(4)), tmp_path / "series.nii")
    nib.save(nib.Nifti1Image((series * 3).astype(np.uint8), np.eye(4)), tmp_path / "labels.nii")
    save_image(tmp_path / "label.nii", (series[..., 0] * 3).astype(np.uint8), np.eye(4))
    pair = {"moving": str(tmp_path / "series.nii"), "fixed": str(tmp_path / "series.nii")}
    pair |= {"moving_label": str(tmp_path / "labels.nii"), "fixed_label": str(tmp_path / "label.nii")}
    for affine in ("none", "frames"):
        load = LoadScanPaird(intensity="none", affine=affine)
        loaded = load({**pair, "moving_frame": 2, "fixed_frame": 0})
        assert torch.equal(loaded["moving"][0].as_tensor(), torch.from_numpy(series[..., 2]))
        assert torch.equal(loaded["fixed"][0].as_tensor(), torch.from_numpy(series[..., 0]))
        assert np.array_equal(loaded["moving_label"][0], (series[..., 2] * 3).astype(np.uint8))
        assert np.array_equal(loaded["fixed_label"][0], (series[..., 0] * 3).astype(np.uint8))
        assert loaded["moving_frame"] == 2 and loaded["fixed_frame"] == 0
        with pytest.raises(ValueError, match=r"series.nii has shape .* frame from 0 to 2 \(--frame\)"):
            load(pair)


def test_presets_scale_each_scan_by_itself(tmp_path: Path) -> None:
    pair, _ = moved_copy(tmp_path, 3)
    other = load_image(pair["moving"])
    brighter = {**pair, "moving": str(save_image(tmp_path / "b.nii", other.array * 700 + 30, other.affine))}
    path = map_file(tmp_path, TURN[3], pair)
    one, two = (LoadScanPaird("mri", affine=path)(each) for each in (pair, brighter))
    torch.testing.assert_close(two["moving"].as_tensor(), one["moving"].as_tensor(), atol=1e-4, rtol=0)
    with pytest.raises(PairError, match=r"outside of the window \(-160.0, 240.0\) of `intensity`"):
        LoadScanPaird("ct_abdomen")(
            {**pair, "moving": str(save_image(tmp_path / "c.nii", other.array + 900, np.eye(4)))}
        )


def test_slices_of_stacks_are_not_aligned(tmp_path: Path) -> None:
    pair = {"moving": scan(tmp_path / "a.nii", (17, 20, 4)), "fixed": scan(tmp_path / "b.nii", (20, 16, 4))}
    one, two = (LoadScanPaird(stacks=True, affine=affine)(pair) for affine in ("none", "frames"))
    assert torch.equal(one["moving"], two["moving"]) and "affine_matrix" not in one
    with pytest.raises(ValueError, match="`affine` must be 'none' and `spacing` None, got 'affine' and None"):
        LoadScanPaird(stacks=True, affine="affine", aligner=register_affine)
    with pytest.raises(ValueError, match="got 'none' and 2"):
        LoadScanPaird(stacks=True, affine="none", spacing=2)
