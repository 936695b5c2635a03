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

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from common.handlers import PairsTable
from common.io import PairFolders

logging.getLogger("ignite").setLevel(logging.CRITICAL)


def output(name: str, **more: Any) -> dict[str, Any]:
    return {"moving_id": [f"m{name}"], "fixed_id": ["f"], "id": [name], "metrics": {}, **more}


def run(folder: Path, outputs: list[dict[str, Any]], columns: dict[str, tuple[str, ...]]) -> list[dict[str, str]]:
    engine = Engine(lambda engine, batch: batch)
    PairsTable(PairFolders(folder, columns)).attach(engine)
    engine.run(outputs)
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_of_now_of_before_and_of_failures(tmp_path: Path, caplog: Any) -> None:
    # Before, there was one label less.
    pair = {"id": "old", "moving": "/a", "fixed": "/b"}
    PairFolders(tmp_path, {"dice": ("2", "3")}).finish(pair, {"dice": [0.25, 0.75], "ndv": [4.0]})
    now = {"dice": torch.tensor([[0.5, 0.0, 1.0]]), "ndv": torch.tensor([[2.0]])}
    outputs = [output("bad", error=["no\nimage, at all"]), output("old"), output("new", metrics=now)]
    bad, old, new = run(tmp_path, outputs, {"dice": ("1", "2", "3")})
    assert (bad["id"], bad["moving_id"], bad["error"], bad["ndv"]) == ("bad", "mbad", "no image, at all", "nan")
    assert (old["dice_2"], old["dice_3"], old["dice_1"], old["dice_mean"]) == ("0.25", "0.75", "nan", "0.5")
    assert (new["dice_1"], new["dice_3"], new["ndv"], new["error"], old["error"]) == ("0.5", "1", "2", "", "")
    assert list(bad)[:3] == ["moving_id", "fixed_id", "id"] and list(bad)[-1] == "error"
    with open(tmp_path / "summary.csv", encoding="utf-8") as file:
        summary = {row["metric"]: row for row in csv.DictReader(file)}
    assert "error" not in summary and "id" not in summary
    assert (summary["ndv"]["mean"], summary["ndv"]["count"], summary["ndv"]["nan"]) == ("3", "2", "1")
    assert "1 of 3 pairs could not be registered" in caplog.text and "bad: no image, at all" in caplog.text


def test_only_the_failure_of_all_is_an_error(tmp_path: Path) -> None:
    bad = [output(name, error=["no image"]) for name in ("a", "b")]
    with pytest.raises(RuntimeError, match=r"2 of 2 pairs could not be registered:\n  a: no image\n  b: no image"):
        run(tmp_path, bad, {})
    assert (tmp_path / "metrics.csv").read_text().count("no image") == 2
