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

import pytest
import torch
from ignite.engine import Engine, Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.handlers import TensorBoardPictures, TensorBoardScalars
from common.spatial import warp


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def values(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events(folder).Scalars(tag)]


def train(engine: Engine, batch: float) -> dict[str, Any]:
    return {"loss": torch.tensor(batch), "losses": {"lncc": torch.tensor(batch / 2)}}


def test_losses_and_learning_rate(tmp_path: Path) -> None:
    engine = Engine(train)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.5}])
    engine.optimizer = optimizer  # type: ignore[attr-defined]
    TensorBoardScalars(tmp_path, every=2).attach(engine)
    engine.run([1.0, 2.0, 3.0, 6.0], max_epochs=2)
    assert values(tmp_path, "train_iteration/loss") == [(2, 2.0), (4, 6.0), (6, 2.0), (8, 6.0)]
    assert values(tmp_path, "train/loss") == [(1, 3.0), (2, 3.0)]
    assert values(tmp_path, "train/lncc") == [(1, 1.5), (2, 1.5)]
    assert values(tmp_path, "train/learning_rate") == [(1, 0.5), (2, 0.5)]


def test_validation_shares_the_epochs_of_training(tmp_path: Path) -> None:
    evaluator = Engine(lambda e, b: {"metrics": {"dice": torch.tensor([[b], [0.5]])}})
    TensorBoardScalars(tmp_path).attach(evaluator)

    @evaluator.on(Events.EPOCH_STARTED)
    def _other(engine: Engine) -> None:
        engine.state.metrics["hd95"] = 3.0

    for epoch in (2, 5):  # as MONAI's evaluator does within training
        evaluator.state.max_epochs, evaluator.state.epoch, evaluator.state.iteration = epoch, epoch - 1, 0
        evaluator.state.epoch_length = 1
        evaluator.run([0.7 if epoch == 2 else 0.9], max_epochs=epoch)
    assert sorted(events(tmp_path).Tags()["scalars"]) == ["validation/dice", "validation/hd95"]
    assert values(tmp_path, "validation/dice") == [(2, 0.6), (5, 0.7)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_rank_that_writes_nothing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.handlers.tensorboard.is_first_rank", lambda: False)
    engine = Engine(train)
    TensorBoardScalars(tmp_path / "events", every=1).attach(engine)
    engine.run([1.0])
    assert not (tmp_path / "events").exists()


def test_pictures(tmp_path: Path) -> None:
    moving = torch.rand(3, 1, 12, 10)
    ddf = torch.zeros(3, 2, 12, 10)
    output = {"moving": moving, "fixed": moving, "moved": warp(moving, ddf), "ddf": ddf}
    engine = Engine(lambda e, b: output)
    TensorBoardPictures(tmp_path, every=2, count=2).attach(engine)
    engine.run([0, 1], max_epochs=3)
    found = events(tmp_path)
    assert found.Tags()["images"] == ["pair/0", "pair/1"]
    assert [image.step for image in found.Images("pair/0")] == [2]


def test_every_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every"):
        TensorBoardScalars(tmp_path, every=0)
