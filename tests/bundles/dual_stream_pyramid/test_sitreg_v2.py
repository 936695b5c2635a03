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
"""The recipe of SITReg-v2 runs: triplets, both new losses, the ramp."""

from __future__ import annotations

from pathlib import Path

from tests.processes import run_python

BUNDLE = "bundles/dual_stream_pyramid"
OPTIONS = {
    "bundle_root": BUNDLE,
    "logging_file": f"{BUNDLE}/configs/logging.conf",
    "spatial_size": [16, 16, 16],
    "network_def#channels": [4, 4],
    "network_def#head_channels": [4, 4],
    "train_count": 4,
    "max_epochs": 2,
    "epoch_length": 1,
    "val_interval": 9,
    "lncc_window": 5,
    "consistency_ramp": [[0, 0], [1, 0], [2, 7]],
}


def run(repository: Path, *launcher: str, configs: tuple[str, ...], **options: object) -> str:
    files = [f"{BUNDLE}/configs/{name}.json" for name in configs]
    command = ["-m", *launcher, "monai.bundle", "run", "--config_file", str(files)]
    for key, value in {**OPTIONS, **options}.items():
        command += [f"--{key}", str(value)]
    done = run_python(command, repository, {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_two_iterations(repository: Path, tmp_path: Path) -> None:
    log = run(repository, configs=("train", "sitreg_v2"), output_dir=tmp_path)
    first, last = (next(line for line in log.splitlines() if f"train epoch {epoch}/2:" in line) for epoch in (1, 2))
    assert "inverse_folding" in first and "group_consistency" not in first, "the term is not computed at weight 0"
    assert "group_consistency" in last
    assert "epoch 2: the weight of 'group_consistency' is now 7" in log
    assert (tmp_path / "model.pt").is_file() or (tmp_path / "last.pt").is_file()


def test_two_ranks_keep_their_triplets_whole(repository: Path, tmp_path: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    log = run(
        repository,
        *launcher,
        configs=("train", "multi_gpu_train", "sitreg_v2"),
        output_dir=tmp_path,
        epoch_length=2,
        consistency_ramp=[[0, 1]],
    )
    assert "group_consistency" in log
