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
"""Bundles used from Python: MONAI's ``load``, workflows and their properties, several bundles in one process."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.bundles.commands import python, succeed
from tests.processes import run_python

JOBS = {
    "ssl_pretrain": ("train", "finetune"),
    "gradirn": ("train",),
    "spatially_varying_reg": ("train",),
    "similarity_learning": ("train", "train_vxm"),
    "dual_stream_pyramid": ("train",),
}


def test_the_page_runs_as_it_stands(repository: Path, tmp_path: Path) -> None:
    page = (repository / "docs/api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 6
    succeed(run_python(["-c", "\n".join(blocks)], tmp_path, {"PYTHONPATH": str(repository)}))
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"moving.nii.gz", "fixed.nii.gz", "registered", "data", "trained", "evaluated"}


@pytest.mark.parametrize("bundle", sorted(JOBS))
def test_every_workflow_has_its_properties(bundle: str, repository: Path, tmp_path: Path) -> None:
    code = f"""
import common, torch
from monai.bundle import create_workflow
root = common.bundle_root({bundle!r})
kinds = {{"evaluate": "eval", "inference": "infer"}}
for name in {[*JOBS[bundle], "evaluate", "inference"]}:
    folders = dict(output_dir={str(tmp_path / "out")!r}, dataset_dir={str(tmp_path / "data")!r})
    file = f"{{root}}/configs/{{name}}.json"
    workflow = create_workflow(config_file=file, workflow_type=kinds.get(name, "train"), logging_file=False, **folders)
    assert workflow.check_properties() == [], name
    assert workflow.bundle_root == root and isinstance(workflow.device, torch.device)
    assert isinstance(workflow.network_def, torch.nn.Module), name
    required = [key for key, value in workflow.properties.items() if value["required"]]
    heavy = ("trainer", "evaluator", "train_dataset", "dataset")
    assert all(getattr(workflow, key) is not None for key in required if key not in (*heavy, "dataset_dir")), name
"""
    python(repository, code)


def test_networks_of_all_bundles_live_in_one_process(repository: Path) -> None:
    """Each is made by MONAI, then again after all others, and by us, with keys that have to fit; all predict alike."""
    code = """
import torch, common
from monai.bundle import create_workflow, load
from common.handlers import load_checkpoint

bundles = ["ssl_pretrain", "gradirn", "spatially_varying_reg", "similarity_learning", "dual_stream_pyramid"]
few = {"similarity_learning": {"iterations": 2, "samples": 2, "steps": 3, "levels": [1]}}
image = {name: torch.rand(1, 2, 32, 32, 32) for name in ("ssl_pretrain", "dual_stream_pyramid")}
flat = torch.rand(1, 2, 32, 32)

def predicted(bundle, network):
    torch.manual_seed(0)
    return network.cpu().eval()(image.get(bundle, flat)).detach()

def made(bundle):
    root = common.bundle_root(bundle)
    options = dict(bundle_dir=f"{root}/..", workflow_type="inference", net_override=few.get(bundle), device="cpu")
    return load(bundle, **options)

first = {bundle: made(bundle) for bundle in bundles}
before = {bundle: predicted(bundle, network) for bundle, network in first.items()}
assert all(field.abs().max() > 0 for field in before.values())
for bundle in reversed(bundles):
    again = made(bundle)
    assert type(again) is type(first[bundle]), bundle
    root = common.bundle_root(bundle)
    override = {f"network_def#{key}": value for key, value in few.get(bundle, {}).items()}
    workflow = create_workflow(config_file=f"{root}/configs/inference.json", workflow_type="infer", **override)
    ours = workflow.network_def
    load_checkpoint(f"{root}/models/model.pt", ours)
    for network in (again, ours, first[bundle]):
        torch.testing.assert_close(predicted(bundle, network), before[bundle], msg=bundle)
"""
    python(repository, code)


def test_a_copied_bundle_is_loaded_with_the_core_it_brings(repository: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "models/gradirn"
    shutil.copytree(repository / "bundles/gradirn", bundle, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("common", "data_splits"):
        shutil.copytree(repository / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import sys
sys.path.insert(0, {str(bundle)!r})
import common, torch
assert common.bundle_root("gradirn") == {str(bundle.resolve())!r}
from monai.bundle import load
network = load("gradirn", bundle_dir={str(bundle.parent)!r}, workflow_type="inference", device="cpu")
assert sys.modules[type(network).__module__].__file__.startswith({str(bundle)!r})
assert sys.modules["common.networks"].__file__.startswith({str(bundle)!r})
weights = torch.load({str(bundle / "models/model.pt")!r}, weights_only=True)
assert set(weights) == set(network.state_dict())
assert all(torch.equal(value, network.state_dict()[name]) for name, value in weights.items())
"""
    succeed(run_python(["-c", code], tmp_path))


def test_what_monai_cannot_do_is_as_the_page_says(repository: Path, tmp_path: Path) -> None:
    code = f"""
import common, torch
from monai.bundle import create_workflow, load
folder = {str(repository / "bundles")!r}
try:
    load("gradirn", bundle_dir=folder, workflow_type="inference")
    raise SystemExit("load finds scripts by itself now: say so in docs/api.md")
except Exception as error:
    assert "scripts" in str(error) or "scripts" in str(error.__cause__), error

common.bundle_root("ssl_pretrain")
pretraining = load("ssl_pretrain", bundle_dir=folder)
shipped = torch.load(folder + "/ssl_pretrain/models/model.pt", weights_only=True)
assert set(pretraining.state_dict()) - set(shipped), "train.json of ssl_pretrain holds another network"

common.bundle_root("gradirn")
workflow = create_workflow(config_file=folder + "/gradirn/configs/inference.json", workflow_type="infer")
workflow.device = "cpu"
try:
    workflow.network_def
    raise SystemExit("a property can be read after another was set now: say so in docs/api.md")
except RuntimeError as error:
    assert "initialize" in str(error)
workflow.initialize()
assert workflow.device == "cpu" and workflow.network_def is not None
"""
    text = succeed(run_python(["-c", code], tmp_path, {"PYTHONPATH": str(repository)}))
    assert "now: say so" not in text
