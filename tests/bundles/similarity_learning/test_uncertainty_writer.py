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
"""The spread of samples on the grids of the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine

from bundles.similarity_learning.scripts.uncertainty_writer import UncertaintyWriter
from common.io import load_field, load_image


def register(
    folder: Path, pair: dict[str, Any], size: tuple[int, ...], steps: tuple[float, ...] | None = (1.0, -1.0, 3.0, -3.0)
) -> None:
    """Samples that move along the first axis of a grid of ``size`` voxels of 1 mm; None has no samples."""

    def step(engine: Engine, batch: Any) -> dict[str, Any]:
        dims = len(size)
        ddf = torch.zeros(1, dims, *size)
        fields = {"ddf": ddf}
        if steps is not None:
            samples = torch.zeros(1, len(steps), dims, *size)
            for k, along in enumerate(steps):
                samples[:, k, 0] = along
            std = samples.std(1, correction=0)
            fields |= {"ddf_samples": samples, "ddf_std": std, "uncertainty": std.norm(dim=1, keepdim=True)}
        grids = {name: torch.eye(dims + 1, dtype=torch.float64)[None] for name in ("fixed_affine", "moving_affine")}
        return {"moving_id": ["moving"], "fixed_id": ["fixed"], "metrics": {}, **fields, **grids}

    engine = Engine(step)
    UncertaintyWriter(folder, [pair]).attach(engine)
    engine.run([0])


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def files(folder: Path, shape: tuple[int, ...], affine: np.ndarray) -> dict[str, Any]:
    moving = np.random.default_rng(0).random((9, 8, 7)[: len(shape)]).astype(np.float32)
    label = np.zeros(moving.shape, np.uint8)
    label[4:] = 3
    stored = moving, label, np.random.default_rng(1).random(shape).astype(np.float32)
    if len(shape) == 2:
        stored = tuple(x[..., None] for x in stored)
    return {
        "moving": save(folder / "moving.nii.gz", stored[0], np.eye(4)),
        "moving_label": save(folder / "label.nii.gz", stored[1], np.eye(4)),
        "fixed": save(folder / "fixed.nii.gz", stored[2], affine),
    }


def test_the_spread_is_in_mm_on_the_grid_of_the_fixed_file(tmp_path: Path) -> None:
    # The fixed file has its second axis along the first of the network's grid, backwards, and finer voxels.
    affine = np.array([[0, -0.5, 0, 8], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    register(tmp_path / "out", files(tmp_path, (8, 17, 7), affine), (9, 8, 7))
    total = load_image(tmp_path / "out/uncertainty.nii.gz")
    assert total.array.shape == (8, 17, 7) and np.allclose(total.affine, affine)
    assert np.allclose(total.array, np.sqrt(5), atol=1e-5)  # of 1, 1, 3, 3 mm
    std = load_field(tmp_path / "out/std_ddf.nii.gz", fmt="l2r")[0]
    assert torch.allclose(std[0], torch.tensor(5.0).sqrt(), atol=1e-5) and std[1:].abs().max() < 1e-5
    mean = load_field(tmp_path / "out/mean_ddf.nii.gz", affine, np.eye(4))
    found = load_field(tmp_path / "out/ddf.nii.gz", affine, np.eye(4))
    assert torch.allclose(mean, found, atol=1e-5)
    # Of four samples, rows from 4 on have the label: in fixed row x = 8 - j / 2 come x + 1, x - 1, x + 3 and x - 3.
    spread = load_image(tmp_path / "out/label_uncertainty.nii.gz").array
    x = 8 - np.arange(17) / 2
    inside = np.stack([(x + s > 3.5) & (x + s < 8.5) for s in (1, -1, 3, -3)]).mean(0)
    whole = x == x.round()  # between rows, and beyond the last, it is a matter of rounding
    assert np.allclose(spread[3, whole, 2], np.sqrt(inside * (1 - inside))[whole], atol=1e-6)


def test_of_two_axes(tmp_path: Path) -> None:
    register(tmp_path / "out", files(tmp_path, (9, 8), np.diag([1.0, 1, 1, 1])), (9, 8))
    assert np.allclose(load_image(tmp_path / "out/uncertainty.nii.gz").array, np.sqrt(5), atol=1e-5)
    assert load_image(tmp_path / "out/label_uncertainty.nii.gz").array.shape == (9, 8)
    assert (tmp_path / "out/registration.png").is_file()


def test_the_picture_shows_millimetres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import common.handlers.writer as writer

    drawn: list[dict[str, Any]] = []
    draw = writer.registration_figure
    monkeypatch.setattr(writer, "registration_figure", lambda *a, **k: drawn.append(k) or draw(*a, **k))
    register(tmp_path / "out", files(tmp_path, (9, 8, 7), np.eye(4)), (9, 8, 7))
    assert drawn[0]["uncertainty_unit"] == "mm" and torch.allclose(drawn[0]["uncertainty"], torch.tensor(5.0).sqrt())
    register(tmp_path / "plain", files(tmp_path, (9, 8, 7), np.eye(4)), (9, 8, 7), steps=None)
    assert "uncertainty" not in drawn[1]


def test_without_samples_or_a_label_there_is_less(tmp_path: Path) -> None:
    pair = files(tmp_path, (9, 8, 7), np.eye(4))
    register(tmp_path / "plain", pair, (9, 8, 7), steps=None)
    assert not list((tmp_path / "plain").glob("*uncertainty*")) and not (tmp_path / "plain/std_ddf.nii.gz").exists()
    register(tmp_path / "out", {k: v for k, v in pair.items() if k != "moving_label"}, (9, 8, 7))
    names, plain = ({path.name for path in (tmp_path / name).glob("*.nii.gz")} for name in ("out", "plain"))
    more = {"uncertainty.nii.gz", "mean_ddf.nii.gz", "std_ddf.nii.gz"}
    assert names == (plain - {"moved_label.nii.gz"}) | more and "ddf.nii.gz" in plain
