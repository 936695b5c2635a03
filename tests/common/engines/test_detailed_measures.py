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

import math

import pytest
import torch

from common.engines import PairValues, detailed_measures
from common.metrics import DiceScore


def stack(shift: int, slices: int = 3) -> dict[str, torch.Tensor]:
    """Squares of labels 1 and 2, the moving ones ``shift`` voxels down axis 0; 2 is missing from the last slice."""
    fixed = torch.zeros(1, 1, 20, 16, slices, dtype=torch.int32)
    fixed[:, :, 6:12, 3:7], fixed[:, :, 6:12, 9:13] = 1, 2
    fixed[..., -1][fixed[..., -1] == 2] = 0
    moving = fixed.roll(shift, 2)
    affine = torch.diag(torch.tensor([2.0, 1.0, 8.0, 1.0], dtype=torch.float64))[None]
    images = {"moving": moving.float() / 2, "fixed": fixed.float() / 2}
    return {**images, "moving_label": moving, "fixed_label": fixed, "fixed_affine": affine}


def test_a_stack_is_measured_slice_by_slice_and_as_a_whole() -> None:
    batch = stack(2)
    ddf = torch.zeros(1, 3, 20, 16, 3)
    ddf[:, 0] = 2.0
    metrics = detailed_measures([1, 2], "fixed_spacing", surface=True, stacks=True)
    found = metrics(PairValues(batch, {"ddf": ddf}, [1, 2]))
    # Two voxels of 2 mm; the slice without label 2 has no distance to average.
    assert found["hd_before"].tolist() == [[4.0, 4.0]] and found["hd"].tolist() == [[0.0, 0.0]]
    assert found["hd95"].tolist() == [[0.0, 0.0]] and found["asd"].tolist() == [[0.0, 0.0]]
    assert torch.allclose(found["dice_before"], torch.full((1, 2), 2 / 3))
    assert found["rmse"].item() == 0.0 and found["rmse_before"].item() > 0.1
    assert found["mean_jacobian"].item() == 1.0 and found["folds"].item() == 0.0 and found["sdlogj"].item() == 0.0
    assert metrics.columns["hd"] == ("1", "2")


def test_a_stack_of_one_slice_and_its_plane_agree() -> None:
    batch = stack(3, slices=1)
    batch["moving_label"], batch["fixed_label"] = batch["moving_label"].clamp_max(1), batch["fixed_label"].clamp_max(1)
    torch.manual_seed(1)
    field = torch.nn.functional.interpolate(torch.randn(1, 2, 4, 4), size=(20, 16), mode="bicubic")
    plane = {key: value[..., 0] if value.ndim == 5 else value for key, value in batch.items()}
    plane["fixed_affine"] = torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))[None]
    whole = torch.cat([field, torch.zeros_like(field[:, :1])], 1)[..., None]
    options = {"labels": [1], "spacing": "fixed_spacing", "surface": True}
    one = detailed_measures(**options, stacks=True)(PairValues(batch, {"ddf": whole}))  # type: ignore[arg-type]
    two = detailed_measures(**options)(PairValues(plane, {"ddf": field}))  # type: ignore[arg-type]
    assert set(one) == set(two)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("dims", [2, 3])
def test_images_without_labels_have_intensities_and_regularity(dims: int) -> None:
    size = (12, 11, 13)[:dims]
    values = PairValues(
        {"moving": torch.rand(2, 1, *size), "fixed": torch.rand(2, 1, *size)}, {"ddf": torch.zeros(2, dims, *size)}
    )
    found = detailed_measures(stacks=False)(values)
    assert not any(name.startswith(("dice", "hd", "asd")) for name in found)
    assert found["rmse"].shape == (2, 1) and torch.allclose(found["rmse"], found["rmse_before"])
    assert all(math.isfinite(float(value.sum())) for value in found.values())


def test_spacing_may_be_given_as_numbers() -> None:
    batch = stack(2)
    plane = {key: value[..., 0] if value.ndim == 5 else value for key, value in batch.items()}
    found = detailed_measures([1], (3.0, 1.0), surface=True)(PairValues(plane, {"ddf": torch.zeros(1, 2, 20, 16)}))
    assert found["hd"].item() == 6.0
    assert isinstance(detailed_measures([1], stacks=True).metrics["dice"], DiceScore)


def test_landmarks_of_a_stack_are_those_of_all_its_slices() -> None:
    batch = stack(2)
    batch |= {"fixed_points": torch.tensor([[[6.0, 4, 0], [7.0, 4, 2]]]), "moving_affine": batch["fixed_affine"]}
    batch["moving_points"] = batch["fixed_points"] + torch.tensor([2.0, 0, 0])
    ddf = torch.zeros(1, 3, 20, 16, 3)
    ddf[:, 0] = 1.0
    found = detailed_measures([1, 2], stacks=True, landmarks=True, some_labels=True)(PairValues(batch, {"ddf": ddf}))
    assert found["tre_before"].item() == 4.0 and found["tre"].item() == 2.0
