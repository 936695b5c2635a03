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

from common.io import GridError, label_values, load_label_map, require_label_map, save_image, save_series


def test_labels_in_order_without_background(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.nii", np.array([[7, 0, 3], [3, 3, 0]], np.uint8), np.eye(4))
    assert label_values(path) == [3, 7]


def test_an_image_is_no_label_map(tmp_path: Path) -> None:
    image = save_image(tmp_path / "image.nii", np.arange(1100, dtype=np.int16).reshape(11, 100), np.eye(4))
    with pytest.raises(ValueError, match=r"image.nii has 1100 different values"):
        label_values(image)
    half = save_image(tmp_path / "half.nii", np.full((11, 100), 0.5), np.eye(4))
    with pytest.raises(ValueError, match=r"half.nii must hold whole numbers"):
        require_label_map(image, half)


def test_a_label_map_lies_on_the_grid_of_its_scan(tmp_path: Path) -> None:
    image = save_image(tmp_path / "image.nii", np.zeros((3, 4)), np.eye(4))
    require_label_map(image, save_image(tmp_path / "good.nii", np.ones((3, 4), np.uint8), np.eye(4)))
    with pytest.raises(GridError, match=r"image.nii and .*moved.nii"):
        require_label_map(image, save_image(tmp_path / "moved.nii", np.ones((3, 4)), np.diag([1, 2, 1, 1])))


def test_a_map_with_frames_is_read_at_one_and_a_single_map_as_it_is(tmp_path: Path) -> None:
    save_series(tmp_path / "series.nii", [np.full((3, 4, 2), k, np.uint8) for k in (5, 6)], np.eye(4))
    save_image(tmp_path / "single.nii", np.full((3, 4, 2), 7, np.uint8), np.eye(4))
    assert label_values(load_label_map(tmp_path / "series.nii", 1)) == [6]
    assert label_values(load_label_map(tmp_path / "single.nii", 1)) == [7]
