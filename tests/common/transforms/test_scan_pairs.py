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

from common.io import GridError, save_image
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
