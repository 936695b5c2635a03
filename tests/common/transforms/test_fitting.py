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
"""Scans of any size come whole onto one grid, and their label maps and millimetres with them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.ndimage import map_coordinates

from common.metrics import AverageSurfaceDistance
from common.transforms import FitWholed, scan_transforms
from common.transforms.fitting import padded_size


def scan(values: np.ndarray | torch.Tensor, affine: np.ndarray | None = None) -> MetaTensor:
    tensor = torch.as_tensor(np.ascontiguousarray(values))[None]
    return MetaTensor(tensor, affine=torch.from_numpy(np.eye(4) if affine is None else affine))


def test_the_published_image(shared: Path) -> None:
    reference = np.load(shared / "parity" / "similarity_learning" / "preprocess.npz")
    image = reference["im"][::-1, ::-1, ::-1]
    fitted = FitWholed(["image"], (16, 16, 16))({"image": scan(image)})["image"].as_tensor()
    scaled = (fitted - fitted.min()) / (fitted.max() - fitted.min())
    assert np.allclose(scaled.numpy(), reference["im_out"], atol=1e-5)


def test_the_published_image_from_a_file(shared: Path, tmp_path: Path) -> None:
    reference = np.load(shared / "parity" / "similarity_learning" / "preprocess.npz")
    nib.save(nib.Nifti1Image(reference["im"], np.diag([-1.0, -1.0, -1.0, 1.0])), tmp_path / "i.nii.gz")
    nib.save(nib.Nifti1Image(reference["seg"], np.diag([-1.0, -1.0, -1.0, 1.0])), tmp_path / "l.nii.gz")
    transform = scan_transforms(spatial_size=(16, 16, 16), intensity="minmax", fit="resize")
    item = transform({"image": str(tmp_path / "i.nii.gz"), "label": str(tmp_path / "l.nii.gz")})
    assert np.allclose(item["image"].numpy(), reference["im_out"], atol=1e-5)
    # The reference's own labels lie beside its image: a listed defect. Ours are those where the image is sampled.
    assert item["label"].dtype == torch.int32 and set(item["label"].unique().tolist()) <= set(reference["seg"].flat)
    places = np.floor(np.arange(16) * 21 / 15 + 0.5).astype(int)
    padded = np.pad(reference["seg"][::-1, ::-1, ::-1], ((2, 2), (0, 0), (1, 1)))
    assert np.array_equal(item["label"][0].numpy(), padded[np.ix_(places, places, places)])


@pytest.mark.parametrize(
    ("size", "new"), [((18, 22, 20), (16, 16, 16)), ((9, 14, 11), (21, 21, 21)), ((13, 8), (10, 10)), ((7, 12), (9, 5))]
)
@pytest.mark.parametrize("padding", ["constant", "edge"])
def test_every_voxel_shows_what_its_affine_says(size: tuple[int, ...], new: tuple[int, ...], padding: str) -> None:
    """Image, label and affine agree: the oracle samples the scan where the affines say that the new voxels lie."""
    dims = len(size)
    rng = np.random.default_rng(0)
    image, label = rng.random(size).astype(np.float32), rng.integers(1, 9, size).astype(np.int16)
    affine = np.diag([1.5, -2.0, 0.8, 1.0])
    affine[:3, 3] = 4, -7, 2
    fit = FitWholed(["image", "label"], new, ["label"], padding)
    item = fit({"image": scan(image, affine), "label": scan(label, affine)})
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in new], indexing="ij")).reshape(dims, -1)
    lifted = np.concatenate([grid, np.zeros((3 - dims, grid.shape[1])), np.ones((1, grid.shape[1]))])
    places = (np.linalg.inv(affine) @ item["image"].affine.numpy() @ lifted)[:dims]
    mode = {"constant": "grid-constant", "edge": "nearest"}[padding]
    expected = map_coordinates(image.astype(np.float64), places, order=1, mode=mode)
    assert np.allclose(item["image"].numpy().ravel(), expected, atol=1e-5)
    nearest = np.floor(places + 0.5 + 1e-9).astype(int)
    inside = ((nearest >= 0) & (nearest < np.array(size)[:, None])).all(0)
    found = item["label"].numpy().ravel()
    assert np.array_equal(found[inside], label[tuple(nearest[:, inside])]) and not found[~inside].any()
    assert item["label"].dtype == torch.int16 and np.allclose(item["label"].affine, item["image"].affine)


def test_sizes_by_hand() -> None:
    assert padded_size((18, 22, 20), (16, 16, 16)) == (22, 22, 22)
    assert padded_size((17, 22), (8, 8)) == (22, 22), "an odd gap leaves a square all the same"
    assert padded_size((5, 9), (5, 9)) == (5, 9)
    assert padded_size((9, 9), (5, 9)) == (9, 17)
    one = scan(np.ones((3, 6), dtype=np.float32))
    fitted = FitWholed(["image"], (6, 6))({"image": one})["image"]
    assert fitted[0, :, 0].tolist() == [0, 1, 1, 1, 0, 0]


def test_surface_distances_stay_in_millimetres() -> None:
    """A box 10 mm long and its copy 4 mm off are as far apart after the resize as before it."""
    first, second = (torch.zeros(40, 36, 38, dtype=torch.int32) for _ in range(2))
    first[10:20, 8:28, 8:28], second[14:24, 8:28, 8:28] = 1, 1
    fit = FitWholed(["first", "second"], (66, 66, 66), ["first", "second"])
    item = fit({"first": scan(first), "second": scan(second)})
    spacing = np.linalg.norm(item["first"].affine.numpy()[:3, :3], axis=0)
    assert np.allclose(spacing, 39 / 65)
    before, after = (
        AverageSurfaceDistance([1], spacing=mm)(a[None].as_tensor(), b[None].as_tensor()).item()
        for mm, a, b in ((1.0, scan(first), scan(second)), (spacing.tolist(), item["first"], item["second"]))
    )
    assert after == pytest.approx(before, rel=0.1)
    assert item["first"].sum().item() * float(spacing.prod()) == pytest.approx(float(first.sum()), rel=0.1)


def test_impossible_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FitWholed(["image"], (1, 8))
    with pytest.raises(ValueError, match=r"size \(4, 4\) cannot be resized to \(4, 4, 4\)"):
        FitWholed(["image"], (4, 4, 4))({"image": scan(np.zeros((4, 4), dtype=np.float32))})
    with pytest.raises(ValueError, match="'resize' needs a spatial_size"):
        scan_transforms(fit="resize")
    with pytest.raises(ValueError, match="fit must be one of"):
        scan_transforms(spatial_size=(4, 4), fit="crop")
