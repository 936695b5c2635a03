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
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine

from common.handlers.output import RunningMeans, engine_output, measurements, replacing


def test_means_of_scalars_and_rows() -> None:
    means = RunningMeans()
    means.update({"loss": torch.tensor(1.0, requires_grad=True)})
    means.update({"loss": torch.tensor(4.0), "dice": torch.tensor([[1.0, math.nan], [0.0, 0.5]])})
    means.update({"dice": torch.tensor([[math.nan, math.nan]])})
    assert means.compute() == {"loss": 2.5, "dice": 0.625}
    means.reset()
    assert means.compute() == {}


def test_nothing_but_nan() -> None:
    means = RunningMeans()
    means.update({"dice": torch.tensor([[math.nan]])})
    assert math.isnan(means.compute()["dice"])


def test_half_precision_losses_add_up() -> None:
    means = RunningMeans()
    for _ in range(1000):
        means.update({"loss": torch.tensor(1.01, dtype=torch.bfloat16)})
    assert means.compute()["loss"] == pytest.approx(float(torch.tensor(1.01, dtype=torch.bfloat16)), rel=1e-6)


def test_measurements_of_trainers_and_evaluators() -> None:
    assert measurements({"loss": 2.0, "losses": {"lncc": torch.tensor(1.0)}, "moving": torch.zeros(1)}) == {
        "loss": torch.tensor(2.0),
        "lncc": torch.tensor(1.0),
    }
    assert list(measurements({"metrics": {"dice": torch.ones(2, 1)}})) == ["dice"]


def test_decollated_output_is_refused() -> None:
    engine = Engine(lambda e, b: [{"loss": 1.0}])
    engine.run([0])
    with pytest.raises(TypeError, match="decollate=False"):
        engine_output(engine)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("whole")
    with pytest.raises(OSError, match="disk"), replacing(path) as temporary:
        temporary.write_text("ha")
        raise OSError("disk full")
    assert path.read_text() == "whole" and [p.name for p in path.parent.iterdir()] == ["a.txt"]
