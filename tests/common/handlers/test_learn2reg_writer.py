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

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor
from torch.utils.data import DataLoader

from common.data import PairDataset
from common.engines import FieldsModule, RegistrationEvaluator, standard_measures
from common.handlers import Learn2RegWriter
from common.handlers.learn2reg_writer import case_number
from common.networks import RegistrationNetwork
from common.spatial import identity_grid
from common.transforms import scan_transforms

LABELS = [1, 2]


class Wave(RegistrationNetwork):
    """A smooth field that is not the same along any two axes."""

    def fields(self, image: Tensor) -> dict[str, Tensor]:
        grid = identity_grid(image.shape[2:])
        amounts = (1.0, -1.6, 1.5)[: self.spatial_dims]
        waves = [most * torch.sin(grid[k - 1] / (4.0 + k)) for k, most in enumerate(amounts)]
        return {"ddf": torch.stack(waves)[None]}


@pytest.fixture
def pairs(tmp_path: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Two scans whose files are turned, shifted, and of other sizes than what the network sees."""
    dims = request.param
    turned = np.array([[-1.0, 0, 0, 90], [0, 0, 1, -20], [0, -1, 0, 35], [0, 0, 0, 1]]) if dims == 3 else np.eye(4)
    shapes = {"0237": (23, 26, 22), "0029": (22, 25, 23)}
    subjects = {}
    for seed, (number, shape) in enumerate(shapes.items()):
        blob = gaussian_filter(np.random.RandomState(seed).rand(*shape[:dims]), 2.0)
        inside = np.pad(np.ones([n - 10 for n in blob.shape], dtype=np.uint8), 5)  # labels end before the scan does
        affine = turned.copy()
        affine[:3, 3] += seed
        files = {"image": blob, "label": inside * np.digitize(blob, np.quantile(blob, [0.3, 0.7])).astype(np.uint8)}
        subjects[number] = {key: str(tmp_path / f"{key}{number}.nii.gz") for key in files}
        for key, array in files.items():
            nib.save(nib.Nifti1Image(array.reshape(*array.shape, *[1] * (3 - dims)), affine), subjects[number][key])
    moving, fixed = subjects.values()
    ids = {"moving_id": "OASIS_0237_0000", "fixed_id": "img29"}
    labels = {"moving_label": moving["label"], "fixed_label": fixed["label"]}
    return [{"moving": moving["image"], "fixed": fixed["image"], **labels, **ids}]


def evaluate(pairs: list[dict[str, Any]], folder: Path, size: tuple[int, ...]) -> dict[str, Any]:
    """Evaluate :class:`Wave` on images of that size, and write its fields; returns the output."""
    transform = scan_transforms(["image", "label"], size)
    evaluator = RegistrationEvaluator(
        "cpu",
        DataLoader(PairDataset(pairs, strategy="listed", transform=transform)),
        FieldsModule(Wave(len(size))),
        standard_measures(LABELS, definition="both"),
        val_handlers=[Learn2RegWriter(folder, pairs)],
    )
    evaluator.run()
    output: dict[str, Any] = evaluator.state.output
    return output


def read(path: str | Path) -> np.ndarray:
    return np.squeeze(np.asarray(nib.load(path).dataobj))


@pytest.mark.parametrize(("pairs", "size"), [(2, (28, 29)), (3, (28, 26, 30))], indirect=["pairs"])
def test_the_organisers_find_the_overlap_that_we_measure(
    pairs: list[dict[str, Any]], size: tuple[int, ...], tmp_path: Path
) -> None:
    """The files of a submission and of the data alone, put together as the challenge's evaluation does."""
    output = evaluate(pairs, tmp_path / "fields", size)
    (path,) = (tmp_path / "fields").iterdir()
    assert path.name == "disp_0029_0237.nii.gz"
    disp = nib.load(path)
    fixed, moving = read(pairs[0]["fixed_label"]), read(pairs[0]["moving_label"])
    assert disp.shape == (*fixed.shape, len(size)) and disp.get_data_dtype() == np.float32
    identity = np.stack(np.meshgrid(*[np.arange(n) for n in fixed.shape], indexing="ij"))
    positions = identity + np.moveaxis(np.asarray(disp.dataobj, dtype=np.float64), -1, 0)
    moved = map_coordinates(moving, positions, order=0)
    for column, label in enumerate(LABELS):
        a, b = moved == label, fixed == label
        theirs = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert theirs == pytest.approx(output["metrics"]["dice_l2r"][0, column].item(), abs=0.004)
        assert theirs == pytest.approx(output["metrics"]["dice"][0, column].item(), abs=0.04)
        assert abs(theirs - output["metrics"]["dice_before"][0, column].item()) > 0.02
    # The image that the network's field gives, on the file's grid: correlated with it as only the same image is.
    image = map_coordinates(read(pairs[0]["moving"]), positions, order=1, mode="nearest")
    ours = _on_file_grid(output["moved"][0, 0].numpy(), output["fixed_affine"][0].numpy(), pairs[0]["fixed"])
    inner = tuple(slice(3, -3) for _ in size)
    assert np.corrcoef(image[inner].ravel(), ours[inner].ravel())[0, 1] > 0.999


def _on_file_grid(image: np.ndarray, affine: np.ndarray, path: str) -> np.ndarray:
    """Look an image of the network's grid up at the voxels of a file."""
    shape = read(path).shape
    d = len(shape)
    keep = [*range(d), 3]
    to_network = np.linalg.inv(affine) @ nib.load(path).affine[np.ix_(keep, keep)]
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")).reshape(d, -1)
    where = to_network[:d, :d] @ index + to_network[:d, d:]
    return map_coordinates(image, where.reshape(d, *shape), order=1, mode="nearest")


@pytest.mark.parametrize("pairs", [3], indirect=True)
def test_a_cropped_evaluation_still_covers_the_whole_file(pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    evaluate(pairs, tmp_path / "fields", (16, 16, 16))
    field = read(tmp_path / "fields/disp_0029_0237.nii.gz")
    assert field.shape == (22, 25, 23, 3) and np.isfinite(field).all()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("OASIS_0029_0000", "0029"),
        ("img0029", "0029"),
        ("LUMIRMRI_3455_0000", "3455"),
        ("hippocampus_123", "0123"),
        ("case_7_0001", "0007"),
        ("oasis2d_0085", "0085"),
        ("0236", "0236"),
        ("0000", "0000"),
        ("sub-100206_T1w", "100206"),
    ],
)
def test_numbers_of_cases(name: str, number: str) -> None:
    assert case_number(name) == number


def test_an_id_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'atlas' has no number"):
        Learn2RegWriter(tmp_path, [{"moving_id": "img0001", "fixed_id": "atlas"}])


def test_two_pairs_of_one_name_are_refused(tmp_path: Path) -> None:
    two = [{"moving_id": f"{site}_0002", "fixed_id": "img0001"} for site in ("leeds", "oslo")]
    with pytest.raises(ValueError, match=r"leeds_0002.*oslo_0002.*would both be written to disp_0001_0002"):
        Learn2RegWriter(tmp_path, two)
    Learn2RegWriter(tmp_path, [two[0], two[0]])  # the same pair, listed twice


def test_a_folder_that_cannot_be_made_is_named_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = Engine(lambda e, b: pytest.fail("no pair should be registered"))
    Learn2RegWriter(tmp_path / "file/fields", []).attach(engine)
    with pytest.raises(OSError, match="file/fields"):
        engine.run([0])
