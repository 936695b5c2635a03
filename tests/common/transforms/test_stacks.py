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

from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import PairDataset
from common.io import save_image
from common.transforms import CompleteSlices, LoadScanPaird, RandSlice, cohort_transforms, stack_transforms

AFFINE = np.diag([1.5, 2.0, 8.0, 1.0])


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, str]:
    """Stacks of 7 slices of 20 x 26; slice z of an image is z + 1 times a ramp, of a label map z % 3."""
    ramp = np.arange(20.0)[:, None, None] + np.zeros((20, 26, 1))
    heights = np.arange(1.0, 8.0)
    for role in ("moving", "fixed"):
        save_image(tmp_path / f"{role}.nii.gz", (ramp * heights).astype(np.float32), AFFINE)
        label = np.broadcast_to(np.arange(7) % 3, (20, 26, 7)).astype(np.uint8)
        save_image(tmp_path / f"{role}_label.nii.gz", label, AFFINE)
    return {key: str(tmp_path / f"{key}.nii.gz") for key in ("moving", "fixed", "moving_label", "fixed_label")}


def item(pair: dict[str, str], **options: object) -> dict[str, torch.Tensor]:
    transform = stack_transforms(["image", "label"], **{"spatial_size": (16, 32), **options})  # type: ignore[arg-type]
    return PairDataset([pair], strategy="listed", transform=transform)[0]


def test_every_slice_is_windowed_cropped_and_padded_by_itself(pair: dict[str, str]) -> None:
    result = item(pair)
    assert result["fixed"].shape == (1, 16, 32, 7) and result["fixed_label"].dtype == torch.int32
    inside = result["fixed"][0, :, 3:29]
    # The crop keeps rows 2 to 17 of the ramp; whatever a slice's scale, they run from 0 to 1.
    assert torch.allclose(inside, (torch.arange(16.0) / 15)[:, None, None].expand_as(inside), atol=1e-6)
    assert not result["fixed"][0, :, :3].any() and not result["fixed"][0, :, 29:].any()
    assert result["fixed_label"][0, 5, 10].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert result["fixed_affine"].diagonal().tolist() == [1.5, 2.0, 8.0, 1.0]


def test_slices_are_taken_at_parts_of_the_height(pair: dict[str, str]) -> None:
    result = item(pair, slices=[0.75, 0.25, 0.5])
    assert result["fixed_label"][0, 5, 10].tolist() == [1, 0, 2]  # slices int(7 * 0.25) = 1, 3 and 5
    affine = result["fixed_affine"]
    assert affine[2, 3] == 8.0 and affine[2, 2] == 16.0
    with pytest.raises(ValueError, match=r"parts of the height in \[0, 1\)"):
        stack_transforms(["image"], (16, 16), slices=[1.0])


def test_resampling_is_in_plane_only(pair: dict[str, str]) -> None:
    result = item(pair, spacing=(3.0, 2.0), spatial_size=(10, 26))
    assert result["fixed"].shape == (1, 10, 26, 7)
    assert torch.allclose(result["fixed_affine"][:3, :3].norm(dim=0), torch.tensor([3.0, 2.0, 8.0]).double())
    assert set(result["fixed_label"].unique().tolist()) == {0, 1, 2}


def test_a_random_slice_is_the_same_of_everything_and_another_each_epoch(pair: dict[str, str]) -> None:
    transform = stack_transforms(["image", "label"], (16, 26))
    pairs = PairDataset([pair], strategy="listed", transform=transform, augment=RandSlice(), cache=True, length=9)
    whole = PairDataset([pair], strategy="listed", transform=transform)[0]
    seen = []
    for epoch in range(3):
        pairs.set_epoch(epoch)
        for index in range(9):
            result = pairs[index]
            assert result["moving"].shape == (1, 16, 26) and result["fixed_affine"].shape == (3, 3)
            assert result["fixed_affine"].diagonal().tolist() == [1.5, 2.0, 1.0]
            label = int(result["fixed_label"][0, 3, 3])
            assert torch.equal(result["moving_label"], result["fixed_label"]) and label in (0, 1, 2)
            seen.append(label)
            assert any(torch.equal(result["fixed"], whole["fixed"][..., z]) for z in range(7) if z % 3 == label)
    assert set(seen) == {0, 1, 2}
    pairs.set_epoch(0)
    assert [int(pairs[index]["fixed_label"][0, 3, 3]) for index in range(9)] == seen[:9]


def test_stacks_of_different_height_are_named() -> None:
    stack = {"moving": torch.zeros(1, 4, 4, 3), "fixed": torch.zeros(1, 4, 4, 5), "moving_id": "a", "fixed_id": "b"}
    with pytest.raises(ValueError, match=r"a and b must have as many slices: \{'moving': 3, 'fixed': 5\}"):
        RandSlice()(stack)


def test_what_is_no_stack_is_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "volume.nii.gz", np.random.default_rng(0).random((8, 8)).astype(np.float32), np.eye(4))
    loaded = stack_transforms(["image"], (8, 8))({"image": str(tmp_path / "volume.nii.gz")})
    assert loaded["image"].shape == (1, 8, 8, 1), "a single slice is a low stack"
    for options in ({"spatial_size": (8, 8, 8)}, {"spatial_size": (8, 8), "spacing": (1, 1, 1)}):
        with pytest.raises(ValueError, match="two numbers each"):
            stack_transforms(["image"], **options)
    with pytest.raises(ValueError, match="'zeros' or 'border'"):
        stack_transforms(["image"], (8, 8), padding="mirror")
    with pytest.raises(ValueError, match="from stacks only"):
        cohort_transforms(["image"], (8, 8, 8), slices=[0.5])


def test_the_cohort_decides_which_transform_it_is(pair: dict[str, str]) -> None:
    subject = {"image": pair["fixed"], "label": pair["fixed_label"]}
    stack = cohort_transforms(["image", "label"], (16, 16), stacks=True)(subject)
    volume = cohort_transforms(["image", "label"], (16, 16, 8), spacing=(3, 4, 8))(subject)
    assert stack["image"].shape == (1, 16, 16, 7) and volume["image"].shape == (1, 16, 16, 8)


def test_only_slices_with_all_structures_in_both_phases_count() -> None:
    moving, fixed = torch.zeros(2, 1, 3, 3, 4, dtype=torch.int32).unbind(0)
    for slices, value in (([0, 1, 2], 1), ([1, 2, 3], 2)):
        moving[0, value, 0, slices] = value
    for slices, value in (([0, 1, 2], 1), ([2, 3], 2)):
        fixed[0, value, 1, slices] = value
    item = {"moving_label": moving, "fixed_label": fixed}
    kept = CompleteSlices([1, 2])(item)
    for key in item:
        assert kept[key].any(dim=0).any(dim=0).any(dim=0).tolist() == [False, False, True, False]
        assert torch.equal(kept[key][..., 2], item[key][..., 2])
    assert CompleteSlices([1, 2], enabled=False)(item) == item and CompleteSlices([])(item) == item
    assert CompleteSlices([1])({"moving": moving}) == {"moving": moving}


def test_a_pair_of_stacks_is_what_two_subjects_are(pair: dict[str, str]) -> None:
    loaded = LoadScanPaird(stacks=True, padding="border")(pair)
    single = stack_transforms(list(pair), (20, 26), padding="border")(pair)
    for key in pair:
        assert torch.equal(loaded[key], single[key]) and loaded[key].dtype == single[key].dtype
        assert torch.equal(loaded[key].affine, single[key].affine)
