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
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from common.handlers import MetricsTable
from common.metrics import DiceScore, MetricCollection

NAN = math.nan
OUTPUTS: list[dict[str, Any]] = [
    {
        "moving_id": ["a", "b"],
        "fixed_id": ["x", "y"],
        "metrics": {
            "dice_before": torch.tensor([[0.2, 0.4], [0.5, NAN]]),
            "dice": torch.tensor([[0.6, 0.8], [0.9, NAN]]),
            "ndv": torch.tensor([[0.0], [0.002]]),
        },
    },
    {
        "moving_id": ["c"],
        "fixed_id": ["z"],
        "metrics": {
            "dice_before": torch.tensor([[NAN, NAN]]),
            "dice": torch.tensor([[NAN, NAN]]),
            "ndv": torch.tensor([[0.001]]),
        },
    },
]


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def evaluate(table: MetricsTable, outputs: list[dict[str, Any]] | None = None) -> None:
    engine = Engine(lambda e, batch: batch)
    table.attach(engine)
    engine.run(OUTPUTS if outputs is None else outputs)


def test_one_row_per_pair(tmp_path: Path) -> None:
    evaluate(MetricsTable(tmp_path / "new", labels=[3, 17]))
    rows = read(tmp_path / "new" / "metrics.csv")
    assert list(rows[0]) == [
        *("moving_id", "fixed_id", "dice_before_3", "dice_before_17", "dice_before_mean"),
        *("dice_3", "dice_17", "dice_mean", "ndv"),
    ]
    assert [(row["moving_id"], row["fixed_id"]) for row in rows] == [("a", "x"), ("b", "y"), ("c", "z")]
    assert rows[0]["dice_17"] == "0.8" and float(rows[0]["dice_mean"]) == pytest.approx(0.7)
    assert rows[1]["dice_17"] == "nan" and float(rows[1]["dice_mean"]) == pytest.approx(0.9)
    assert rows[2]["dice_mean"] == "nan" and rows[2]["ndv"] == "0.001"


def test_summary_leaves_out_what_is_absent(tmp_path: Path) -> None:
    evaluate(MetricsTable(tmp_path, labels={3: "anterior", 17: "posterior"}))
    summary = {row["metric"]: row for row in read(tmp_path / "summary.csv")}
    assert float(summary["dice_mean"]["mean"]) == pytest.approx(0.8) and summary["dice_mean"]["count"] == "2"
    assert float(summary["dice_mean"]["std"]) == pytest.approx(math.sqrt(2 * 0.1**2))
    assert float(summary["ndv"]["median"]) == pytest.approx(0.001) and summary["ndv"]["count"] == "3"
    assert summary["dice_posterior"]["count"] == "1" and summary["dice_posterior"]["std"] == "nan"
    assert [summary[name]["nan"] for name in ("dice_anterior", "dice_posterior", "dice_mean", "ndv")] == list("1210")


def test_the_mean_is_the_metrics_own(tmp_path: Path) -> None:
    """The summary must say what ``aggregate`` says, with labels missing in some pairs."""
    torch.manual_seed(0)
    metrics = MetricCollection({"dice": {"metric": DiceScore([1, 2, 3]), "inputs": ["moved_label", "fixed_label"]}})
    outputs = []
    for _ in range(3):
        labels = [torch.randint(0, 4, (2, 1, 2, 3)) for _ in range(2)]
        outputs.append({"metrics": metrics({"moved_label": labels[0], "fixed_label": labels[1]})})
    table = MetricsTable(tmp_path, columns=metrics.columns)
    evaluate(table, outputs)
    assert any(math.isnan(value) for row in table.rows for value in row.values() if isinstance(value, float))
    assert table.summary["dice_mean"]["mean"] == pytest.approx(metrics.aggregate()["dice"], rel=1e-6)


def test_one_readable_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "common.handlers.table"):
        evaluate(MetricsTable(tmp_path))
    assert caplog.records[-1].message == "3 pairs: dice 0.400 -> 0.800, ndv 0.001"


def test_metrics_whose_names_share_a_start(tmp_path: Path) -> None:
    metrics = {
        "sim": torch.tensor([[0.1, 0.3]]),
        "sim_edge": torch.tensor([[0.5]]),
        "sim_before": torch.tensor([[0.0]]),
    }
    table = MetricsTable(tmp_path)
    evaluate(table, [{"metrics": metrics}])
    assert table.line() == "sim 0 -> 0.200, sim_edge 0.500"


def test_columns_of_a_metric_beat_the_labels(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path, labels=[3, 17], columns={"dice": ("left", "right")})
    evaluate(table)
    assert "dice_left" in table.rows[0] and "dice_before_3" in table.rows[0]


def test_infinite_distances_and_missing_ids(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path)
    evaluate(table, [{"metrics": {"hd95": torch.tensor([[math.inf, 2.0]])}}])
    rows = read(tmp_path / "metrics.csv")
    assert rows[0]["moving_id"] == "" and rows[0]["hd95_1"] == "inf" and rows[0]["hd95_mean"] == "inf"
    assert table.summary["hd95_mean"]["mean"] == math.inf


def test_each_run_replaces_the_files(tmp_path: Path) -> None:
    table = MetricsTable(tmp_path, summary_filename=None)
    engine = Engine(lambda e, batch: batch)
    table.attach(engine)
    for _ in range(2):
        engine.run(OUTPUTS)
    assert len(read(tmp_path / "metrics.csv")) == 3 and [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.handlers.table.is_first_rank", lambda: False)
    evaluate(MetricsTable(tmp_path))
    assert not list(tmp_path.iterdir())
