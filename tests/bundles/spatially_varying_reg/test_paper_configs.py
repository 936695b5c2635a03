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
"""The published tasks, on tiny data in each folder layout: files to a training step, with networks made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.bundles.commands import python, read_config

BUNDLE = "spatially_varying_reg"
PAPERS = ("ixi", "autopet", "acdc", "mnms")


def write(path: Path, label: bool, size: tuple[int, ...], seed: int, affine: np.ndarray) -> None:
    """A smooth image, or a map of whatever labels there may be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 4, size).astype(np.uint8) if label else draw.random(size).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), path)


def write_ixi(root: Path, repository: Path) -> dict[str, Any]:
    size, eye = (32, 32, 32), np.eye(4)
    counts = {"Tr": 2, "Val": 1, "Ts": 1}
    for suffix, count in counts.items():
        for n in range(count):
            for kind in ("images", "labels"):
                write(root / f"{kind}{suffix}/subject_{n}.nii.gz", kind == "labels", size, n + 7 * count, eye)
    write(root / "atlas.nii.gz", False, size, 90, eye)
    write(root / "atlas_label.nii.gz", True, size, 91, eye)
    content = json.loads((repository / "data_splits/ixi.json").read_text()) | {"shape": size}
    for split, suffix in (("training", "Tr"), ("validation", "Val"), ("test", "Ts")):
        content[split]["count"] = counts[suffix]
    (root / "ixi.json").write_text(json.dumps(content))
    return {"datalist": str(root / "ixi.json"), "spatial_size": [32, 32, 32]}


def write_autopet(root: Path, repository: Path) -> dict[str, Any]:
    size, affine = (32, 32, 32), np.diag([2.8, 2.8, 3.8, 1.0])
    for folder, name in (("Tr", "a"), ("Tr", "b"), ("Val", "c"), ("Ts", "d"), ("", "atlas")):
        for channel in (0, 1):
            place = root / f"images{folder}" if folder else root
            write(place / f"{name}_{channel:04d}.nii.gz", False, size, ord(name[0]) + channel, affine)
        label = root / (f"labels{folder}/{name}.nii.gz" if folder else "atlas_label.nii.gz")
        write(label, True, size, ord(name[0]) + 7, affine)
    return {"dataset_dir": str(root), "spatial_size": [32, 32, 32]}


def write_hearts(root: Path, files: dict[str, str]) -> dict[str, Any]:
    """Oblique stacks of six thick slices, whose last axis points mostly to the left."""
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.1, 0.3, -0.95], [0.9, -0.4, 0.0], [-0.4, -0.87, -0.3]]) * (1.5, 1.5, 9.0)
    for split, subjects in (("training", (1, 2, 3)), ("testing", (4,))):
        for number in subjects:
            folder = root / split / f"patient{number:03d}"
            for k, (name, kind) in enumerate(files.items()):
                write(folder / name.format(id=folder.name), kind == "label", (36, 30, 6), 10 * number + k, affine)
            (folder / "Info.cfg").write_text("ED: 1\nES: 9\n")
    return {"dataset_dir": str(root), "spatial_size": [32, 32, 16]}


def write_acdc(root: Path, repository: Path) -> dict[str, Any]:
    frames = ("{id}_frame01", "{id}_frame09")
    kinds = {"": "image", "_gt": "label"}
    return write_hearts(root, {f"{f}{end}.nii.gz": kind for f in frames for end, kind in kinds.items()})


def write_mnms(root: Path, repository: Path) -> dict[str, Any]:
    kinds = {"img": "image", "seg": "label"}
    return write_hearts(root, {f"{p}_{end}.nii.gz": kind for p in ("ED", "ES") for end, kind in kinds.items()})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> dict[str, dict[str, Any]]:
    """What the configs of all papers make of such data, in one process that has a bundle's ``scripts``."""
    makers = {"ixi": write_ixi, "autopet": write_autopet, "acdc": write_acdc, "mnms": write_mnms}
    options = {name: make(tmp_path_factory.mktemp(name), repository) for name, make in makers.items()}
    small = {
        "embed_dim": 8,
        "depths": [1, 1, 2],
        "num_heads": [2, 2, 2],
        "window_size": 2,
        "steps": 2,
        "num_workers": 0,
    }
    code = f"""
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(1, "bundles/{BUNDLE}")
from monai.bundle import ConfigParser
from torch.utils.data import default_collate
from common.engines import FieldsModule, PairValues, stack_pair
found = {{}}
for name, options in json.loads({json.dumps(json.dumps(options))}).items():
    parser = ConfigParser()
    parser.read_config([f"bundles/{BUNDLE}/configs/{{config}}.json" for config in ("train", f"paper_{{name}}")])
    for key, value in (options | {small!r}).items():
        parser[key] = value
    cohort = parser.get_parsed_content("cohort")
    training, validation = (parser.get_parsed_content(f"{{part}}#dataset") for part in ("train", "validate"))
    batch = default_collate([training[0]])
    network = parser.get_parsed_content("network_def").train()
    loss = parser.get_parsed_content("loss")
    fields = network.fields(stack_pair(batch))
    total, terms = loss(PairValues(batch, fields))
    total.backward()
    found[name] = dict(
        ids=[training.pair_ids(k) for k in range(len(training))],
        validation=[validation.pair_ids(k) for k in range(len(validation))],
        shape=list(batch["moving"].shape), low=float(batch["fixed"].min()), high=float(batch["fixed"].max()),
        labels=batch["fixed_label"].unique().tolist(), measured=len(parser.get_parsed_content("labels")),
        spacing=batch["fixed_affine"][0, :3, :3].norm(dim=0).tolist(), stacks=cohort.stacks,
        mm=list(loss.terms["smoothness"].diffusion.spacing or []), w=loss.terms["smoothness"].w,
        alpha=loss.terms["prior"].alpha, form=loss.terms["similarity"].form,
        terms=sorted(terms), weights=loss.weights, total=float(total),
        slopes=sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None),
    )
print(json.dumps(found))
"""
    result: dict[str, dict[str, Any]] = json.loads(python(repository, code).splitlines()[-1])
    return result


@pytest.mark.parametrize("name", PAPERS)
def test_a_training_step_is_finite_and_reaches_the_network(found: dict[str, dict[str, Any]], name: str) -> None:
    step = found[name]
    assert np.isfinite(step["total"]) and np.isfinite(step["slopes"]) and step["slopes"] > 0
    assert step["low"] >= 0 and step["high"] <= 1


def test_ixi_brings_the_atlas_to_each_subject(found: dict[str, dict[str, Any]]) -> None:
    step = found["ixi"]
    assert sorted(step["ids"]) == [["atlas", "subject_0"], ["atlas", "subject_1"]]
    assert step["validation"] == [["atlas", "subject_0"]] and step["measured"] == 30
    assert (step["form"], step["alpha"], step["w"]) == ("sum", 1.175, 3.35)
    assert step["terms"] == ["prior", "similarity", "smoothness"]


def test_autopet_has_two_channels_merged_labels_and_both_directions(found: dict[str, dict[str, Any]]) -> None:
    step = found["autopet"]
    assert step["shape"] == [1, 2, 32, 32, 32] and step["measured"] == 39
    assert sorted(step["ids"]) == [["atlas", "a"], ["atlas", "b"]] and step["validation"] == [["atlas", "c"]]
    assert step["labels"] == [0, 1, 2, 3] and step["form"] == "mean"
    assert step["terms"] == ["inverse_similarity", "inverse_smoothness", "prior", "similarity", "smoothness"]
    # Two channels average to half each: a quarter for each channel and direction.
    assert {step["weights"][term] for term in step["terms"] if term != "prior"} == {0.5}


@pytest.mark.parametrize("name", ["acdc", "mnms"])
def test_hearts_are_volumes_either_way_in_millimetres(found: dict[str, dict[str, Any]], name: str) -> None:
    step = found[name]
    assert not step["stacks"] and step["shape"] == [1, 1, 32, 32, 16] and step["measured"] == 3
    np.testing.assert_allclose(step["spacing"], [1.5, 1.5, 3.15], rtol=1e-4)
    assert step["mm"] == [1.5, 1.5, 3.15], "slices stay across the last axis, however oblique the stack is"
    for pairs in (step["ids"], step["validation"]):
        assert all({a[-2:], b[-2:]} == {"ED", "ES"} and a[:-2] == b[:-2] for a, b in pairs)
        assert [pair[::-1] for pair in pairs[::2]] == pairs[1::2] and pairs


@pytest.mark.parametrize("name", PAPERS)
def test_overlays_change_only_what_the_config_has(repository: Path, name: str) -> None:
    train, overlay = read_config(BUNDLE, repository, "train"), read_config(BUNDLE, repository, f"paper_{name}")
    assert {key.split("#")[0] for key in overlay} <= set(train)


def test_the_published_settings_stand(repository: Path) -> None:
    settings = {name: read_config(BUNDLE, repository, f"paper_{name}") for name in PAPERS}
    assert [settings[name]["embed_dim"] for name in PAPERS] == [96, 128, 96, 96]
    assert [settings[name]["alpha"] for name in PAPERS] == [1.175, 1.005, 1.493, 1.493]
    assert [settings[name]["sigma"] for name in PAPERS] == [0.525, 0.002, 1.416, 1.416]
    for name, content in settings.items():
        factors = content["downsample"] if isinstance(content["downsample"], list) else [content["downsample"]] * 3
        last = [n // factor // 16 for n, factor in zip(content["spatial_size"], factors, strict=True)]
        assert content["window_size"] == last, f"{name}: the last stage is one window"
