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
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader

from common.data import PairDataset, ScanPairs
from common.io import PairFolders, save_image
from common.transforms import LoadScanPaird, scan_transforms


def make_pair(folder: Path, name: str, sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, Any]:
    random = np.random.default_rng(len(name))
    pair: dict[str, Any] = {"id": name, "moving_id": f"m{name}", "fixed_id": "f"}
    for role, size in zip(("moving", "fixed"), sizes, strict=True):
        image = random.random(size).astype(np.float32)
        affine = np.diag([-1.0, 1, 2, 1])
        pair[role] = str(save_image(folder / f"{name}_{role}.nii", image, affine))
        pair[f"{role}_label"] = str(save_image(folder / f"{name}_{role}_l.nii", (image > 0.5).astype("uint8"), affine))
    return pair


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, Any]]:
    return [make_pair(tmp_path, "a", ((4, 5, 6), (6, 5, 3))), make_pair(tmp_path, "bb", ((7, 8, 9), (7, 8, 9)))]


def test_items_are_those_of_the_pairs_own_grid(pairs: list[dict[str, Any]]) -> None:
    dataset = ScanPairs(pairs, LoadScanPaird())
    for index, size in enumerate(((6, 5, 6), (7, 8, 9))):
        single = PairDataset([pairs[index]], strategy="listed", transform=scan_transforms(spatial_size=size))[0]
        item = dataset[index]
        assert item.pop("id") == pairs[index]["id"] and list(item.pop("timings")) == ["load"]
        assert item.pop("alignment").startswith("frames: ") and "fewer than 16 voxels" in item.pop("warnings")
        assert set(item) == set(single)
        for key, value in single.items():
            assert torch.equal(item[key], value) if isinstance(value, torch.Tensor) else item[key] == value, key
            assert type(item[key]) is type(value)
    sizes = [tuple(batch["fixed"].shape) for batch in DataLoader(dataset, batch_size=1)]
    assert sizes == [(1, 1, 6, 5, 6), (1, 1, 7, 8, 9)]


def test_a_pair_that_cannot_be_loaded_is_an_item_where_there_are_folders(
    pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    Path(pairs[0]["moving"]).unlink()
    (item,) = DataLoader(ScanPairs(pairs[:1], LoadScanPaird(), PairFolders(tmp_path / "out")))
    assert set(item) == {"id", "moving_id", "fixed_id", "error"}
    assert item["error"][0].startswith("no image at") and "a_moving.nii" in item["error"][0]
    with pytest.raises(RuntimeError, match=r"a_moving.nii and .*a_fixed.nii cannot be registered: no image at"):
        ScanPairs(pairs[:1], LoadScanPaird())[0]


def test_the_reason_is_not_the_transform_it_happened_in(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    values = np.full((4, 5, 6), 2.0)
    values[0, 0, 0] = np.nan
    save_image(pairs[0]["moving"], values, np.diag([-1.0, 1, 2, 1]))
    error = ScanPairs(pairs, LoadScanPaird(), PairFolders(tmp_path))[0]["error"]
    assert "1 values that are not finite" in error and "a_moving.nii" in error and "Compose" not in error


def test_complete_pairs_are_not_loaded(pairs: list[dict[str, Any]], tmp_path: Path, caplog: Any) -> None:
    folders = PairFolders(tmp_path / "out")
    folders.finish(pairs[1], {"dice": [0.5]})
    with caplog.at_level("INFO"):
        dataset = ScanPairs(pairs, LoadScanPaird(), folders)
    assert "1 of 2 pairs are complete and skipped (--overwrite True does them again): bb" in caplog.text
    folders.finish(pairs[0], {"dice": [0.5]})  # by another process, meanwhile
    assert "moving" in dataset[0] and set(dataset[1]) == {"id", "moving_id", "fixed_id"}
    again = ScanPairs(pairs, LoadScanPaird(), PairFolders(tmp_path / "out", overwrite=True))
    assert "moving" in again[1]


def test_what_a_transform_says_of_a_pair_is_in_the_batch(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "a", ((16, 17, 18), (18, 17, 16)))
    (batch,) = DataLoader(ScanPairs([{**pair, "moving_frame": 0}], LoadScanPaird(affine="none", spacing=1.5)))
    assert batch["affine_matrix"].dtype == torch.float64 and torch.equal(
        batch["affine_matrix"][0], torch.eye(4).double()
    )
    assert set(batch["timings"]) == {"load", "affine"} and batch["timings"]["load"].shape == (1,)
    assert batch["moving_frame"].tolist() == [0] and "fixed_frame" not in batch and "warnings" not in batch
    assert torch.equal(batch["moving_affine"], batch["fixed_affine"])
    (small,) = DataLoader(ScanPairs([make_pair(tmp_path, "b", ((4, 5, 6), (6, 5, 3)))], LoadScanPaird()))
    assert len(small["warnings"]) == 1 and small["warnings"][0].count("\n") == 1


def test_pairs_that_were_registered_otherwise_are_done_again(
    pairs: list[dict[str, Any]], tmp_path: Path, caplog: Any
) -> None:
    for pair, refine in zip(pairs, (0, 50), strict=True):
        PairFolders(tmp_path / "out", settings={"refine": refine}).finish(pair, {"dice": [0.5]})
    with caplog.at_level("INFO"):
        dataset = ScanPairs(pairs, LoadScanPaird(), PairFolders(tmp_path / "out", settings={"refine": 50}))
    assert "1 of 2 pairs were registered before with refine 0, now 50: done again: a" in caplog.text
    assert "1 of 2 pairs are complete and skipped (--overwrite True does them again): bb" in caplog.text
    assert "moving" in dataset[0] and "moving" not in dataset[1]
    caplog.clear()
    ScanPairs(pairs, LoadScanPaird(), PairFolders(tmp_path / "out", overwrite=True, settings={"refine": 50}))
    assert not caplog.text
