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
"""MLflow at engines whose output is a dictionary; tests of the bundles run the rest with real trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from mlflow import MlflowClient
from monai.handlers import MLFlowHandler

from common.handlers import attach_handlers
from common.handlers.tracking import _is_plain, _repaired


class Counter:
    """A handler that is none of MLflow's."""

    seen = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.count)

    def count(self) -> None:
        self.seen += 1


def test_what_is_disabled_is_dropped_and_others_are_attached() -> None:
    engine, counter = Engine(lambda _, item: {"loss": item}), Counter()
    attach_handlers(engine, [None, counter, None])
    attach_handlers(engine, None)
    engine.run([1.0, 2.0], max_epochs=1)
    assert counter.seen == 2


@pytest.mark.parametrize("quoted", [True, False])
def test_terms_options_and_config_are_logged(quoted: bool, tmp_path: Path) -> None:
    config = tmp_path / "config_20260101_000000.json"
    options = {"seed": 3, "size": [1, 2], "device": "$x", "labels": ["@a"], "net": {}, "tracking_uri": "y"}
    config.write_text(json.dumps({"_meta_": {"name": "n", "version": "1"}, **options}))
    path = f"{tmp_path} + '/{config.name}'" if quoted else str(config)
    uri = f"sqlite:///{tmp_path}/mlruns.db"
    handler = MLFlowHandler(tracking_uri=uri, artifacts=path, tag_name="train_loss", close_on_complete=True)

    def step(engine: Engine, item: float) -> dict[str, Any]:
        return {"loss": torch.tensor(item), "losses": {"similarity": torch.tensor(2 * item)}}

    engine = Engine(step)
    attach_handlers(engine, [handler])
    engine.run([1.0, 3.0], max_epochs=1)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics == {"train_loss": 3, "train_similarity": 6}
    logged = {"bundle_name": "n", "bundle_version": "1", "seed": "3", "size": "[1, 2]"}
    assert run.data.params == {**logged, "max_epochs": "1", "epoch_length": "2"}
    assert [entry.path for entry in client.list_artifacts(run.info.run_id)] == [config.name]


def test_only_monais_own_slip_is_repaired() -> None:
    assert _repaired("runs/a b + '/config_20260101_000000.json'") == "runs/a b/config_20260101_000000.json"
    assert _repaired("runs/a + b/mine.json") == "runs/a + b/mine.json"


@pytest.mark.parametrize(("value", "plain"), [(None, True), ([1, [2]], True), ("@a", False), (["$a"], False)])
def test_references_are_no_options(value: object, plain: bool) -> None:
    assert _is_plain(value) is plain
