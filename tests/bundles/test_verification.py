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
"""What the Model Zoo's CI checks of a bundle, and what it does not: that a field has the size of its images."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.bundles.commands import read_config, succeed
from tests.processes import run_python

BUNDLES = sorted(path.parent.name for path in (Path(__file__).parents[2] / "bundles").glob("*/configs"))

REQUIRED = ["LICENSE", "configs/metadata.json", "configs/inference.json", "configs/train.json", "configs/evaluate.json"]
REQUIRED += [
    "configs/logging.conf",
    "models/model.pt",
    "docs/README.md",
    "docs/data_license.txt",
    "scripts/__init__.py",
]

# Dimensions of weights that a bundle ships besides those of its metadata.
MORE = {"dual_stream_pyramid": [2]}

# A registration that is an optimisation needs no good result here.
SHORT = {"similarity_learning": {"iterations": 2}}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_bundle_has_its_files_under_the_names_they_need(repository: Path, bundle: str) -> None:
    root = repository / "bundles" / bundle
    assert re.fullmatch("[a-z][a-z0-9_]*", bundle)
    assert [name for name in REQUIRED if not (root / name).is_file() or not (root / name).stat().st_size] == []
    largest = max(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert largest < 25e6, "a larger file belongs in large_files.yml"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_newest_change_is_the_version(repository: Path, bundle: str) -> None:
    metadata = read_config(bundle, repository, "metadata")
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["version"])
    assert metadata["version"] == max(metadata["changelog"], key=lambda v: [int(part) for part in v.split(".")])


@pytest.mark.parametrize("bundle", BUNDLES)
def test_monai_verifies_the_metadata(repository: Path, shared: Path, bundle: str) -> None:
    pytest.importorskip("jsonschema")
    # A schema that is already there is not downloaded.
    schema = shared / "specs/meta_schema_20240725.retyped.json"
    command = ["-m", "monai.bundle", "verify_metadata", "--meta_file", "configs/metadata.json"]
    text = succeed(run_python([*command, "--filepath", str(schema)], repository / "bundles" / bundle))
    assert "metadata is verified with no error" in text


_NETWORK = """
import torch
from monai.bundle import verify_net_in_out
from common.export import build_network, random_pair

verify_net_in_out(
    net_id="network_def", config_file="configs/inference.json", meta_file="configs/metadata.json", device="cpu",
    dataset_dir={data!r}, **{short}
)
for dims in {dims}:
    network, channels = build_network({bundle!r}, dims, **{short})
    for size in ((19, 23, 13), (7, 33, 11)):
        image = random_pair(size[:dims], channels)
        ddf = network.eval()(image).detach()
        assert ddf.shape == (1, dims, *size[:dims]), ddf.shape
        assert ddf.dtype == torch.float32 and bool(torch.isfinite(ddf).all())
        assert float(ddf.abs().max()) > 1e-3, "weights that move nothing"
print("every field fits")
"""


@pytest.mark.parametrize("bundle", BUNDLES)
def test_monai_verifies_the_network_and_its_fields_fit_the_images(
    repository: Path, tmp_path: Path, bundle: str
) -> None:
    root = repository / "bundles" / bundle
    dims = [len(read_config(bundle, repository, "metadata")["network_data_format"]["inputs"]["image"]["spatial_shape"])]
    code = _NETWORK.format(
        data=str(tmp_path), bundle=bundle, dims=dims + MORE.get(bundle, []), short=SHORT.get(bundle, {})
    )
    # The bundle's folder holds ``common`` when it is shipped; in the checkout the path does.
    places = os.pathsep.join([str(root), str(repository)])
    text = succeed(run_python(["-c", code], root, {"PYTHONPATH": places}))
    assert "data shape of network is verified with no error" in text and "every field fits" in text
