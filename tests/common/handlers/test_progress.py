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

import logging

import pytest
import torch
from ignite.engine import Engine

from common.handlers import LossProgressBar


def engine() -> Engine:
    def step(engine: Engine, batch: float) -> dict[str, object]:
        return {
            "loss": torch.tensor(batch),
            "losses": {"lncc": torch.tensor(batch - 1), "diffusion": torch.tensor(1.0)},
        }

    return Engine(step)


def test_sparse_lines_without_a_terminal(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    run = engine()
    LossProgressBar("train", terminal=False).attach(run)
    with caplog.at_level(logging.INFO, "common.handlers.progress"):
        run.run([1.0, 2.0, 6.0], max_epochs=2)
    lines = [record.message for record in caplog.records]
    assert lines == [f"train epoch {k}/2: loss 3, lncc 2, diffusion 1" for k in (1, 2)]
    assert capfd.readouterr().err == ""


def test_lines_within_long_epochs(caplog: pytest.LogCaptureFixture) -> None:
    run = engine()
    LossProgressBar("train", terminal=False, line_seconds=0.0).attach(run)
    with caplog.at_level(logging.INFO, "common.handlers.progress"):
        run.run([1.0, 3.0], max_epochs=2)
    lines = [record.message for record in caplog.records]
    assert lines[:2] == [
        "train epoch 1/2 1/2: loss 1, lncc 0, diffusion 1",
        "train epoch 1/2 2/2: loss 2, lncc 1, diffusion 1",
    ]
    assert lines[3].startswith("train epoch 2/2 1/2")


def test_a_bar_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    run = engine()
    LossProgressBar("train", terminal=True, refresh_seconds=0.0).attach(run)
    run.run([1.0, 3.0])
    shown = capfd.readouterr().err
    assert "train epoch 1/1" in shown and "2/2" in shown and "loss 2, lncc 1, diffusion 1" in shown


def test_metrics_of_an_evaluator(caplog: pytest.LogCaptureFixture) -> None:
    run = Engine(lambda e, b: {"metrics": {"dice": torch.tensor([[b, float("nan")]])}})
    LossProgressBar("validate", terminal=False).attach(run)
    with caplog.at_level(logging.INFO, "common.handlers.progress"):
        run.run([0.5, 0.7])
    assert caplog.records[-1].message == "validate epoch 1/1: dice 0.6"


def test_other_ranks_are_quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("common.handlers.progress.is_first_rank", lambda: False)
    run = engine()
    LossProgressBar(terminal=False).attach(run)
    with caplog.at_level(logging.INFO, "common.handlers.progress"):
        run.run([1.0])
    assert not caplog.records


def test_errors_pass_and_the_next_run_has_a_new_bar(capfd: pytest.CaptureFixture[str]) -> None:
    def step(engine: Engine, batch: float) -> dict[str, object]:
        if batch < 0:
            raise ValueError("loss is nan")
        return {"loss": torch.tensor(batch)}

    run = Engine(step)
    LossProgressBar(terminal=True, refresh_seconds=0.0).attach(run)
    with pytest.raises(ValueError, match="loss is nan"):
        run.run([1.0, -1.0])
    run.state.max_epochs = None  # Ignite starts anew
    run.run([1.0, 1.0, 4.0], epoch_length=3)
    assert "3/3" in capfd.readouterr().err
