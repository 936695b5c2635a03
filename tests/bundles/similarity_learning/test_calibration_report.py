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
"""The table and the picture of a calibration."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from bundles.similarity_learning.scripts.calibration_report import CalibrationReport, calibration_figure


def batch(name: str, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """A pair whose errors are ``scale`` times its standard deviations, voxel by voxel."""
    std = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(seed)) + 0.5
    field = torch.cat([std, torch.zeros_like(std)], 1)
    samples = torch.stack([field, -field], 1)
    return {"ddf": torch.zeros_like(field), "true_ddf": scale * field, "ddf_samples": samples,
            "moving_id": [name], "fixed_id": ["atlas"]}  # fmt: skip


def report(folder: Path, batches: list[dict[str, Any]], **options: Any) -> CalibrationReport:
    handler = CalibrationReport(folder, **options)
    engine = Engine(lambda e, b: b)
    handler.attach(engine)
    engine.run(batches)
    return handler


def rows(handler: CalibrationReport, curve: str) -> list[dict[str, Any]]:
    return [row for row in handler.rows if row["curve"] == curve]


def test_a_perfect_spread_is_on_the_diagonal_and_ranks_as_the_oracle(tmp_path: Path) -> None:
    handler = report(tmp_path, [batch("a"), batch("b", seed=1)], bins=5, points=4)
    assert [row["x"] for row in rows(handler, "reliability")] == pytest.approx(
        [row["y"] for row in rows(handler, "reliability")]
    )
    assert [row["count"] for row in rows(handler, "reliability")] == [160] * 5
    assert [row["y"] for row in rows(handler, "sparsification")] == pytest.approx(
        [row["y"] for row in rows(handler, "oracle")]
    )
    assert rows(handler, "spearman")[0]["y"] == pytest.approx(1) and rows(handler, "spearman")[0]["count"] == 2
    with open(tmp_path / "calibration.csv", newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [float(row["y"]) for row in written] == pytest.approx([row["y"] for row in handler.rows], rel=1e-6)


def test_errors_twice_as_large_are_shown_as_such(tmp_path: Path) -> None:
    handler = report(tmp_path, [batch("a", scale=2.0)])
    for row in rows(handler, "reliability"):
        assert row["y"] == pytest.approx(2 * row["x"])


def test_repeated_pairs_count_once_and_each_run_starts_anew(tmp_path: Path) -> None:
    handler = CalibrationReport(tmp_path)
    engine = Engine(lambda e, b: b)
    handler.attach(engine)
    for _ in range(2):
        engine.run([batch("a"), batch("b"), batch("a")])
        assert rows(handler, "spearman")[0]["count"] == 2


def test_ranks_are_gathered_and_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(local: list[Any]) -> list[list[Any]]:
        return [local, [(("other", "atlas"), local[0][1])]]

    monkeypatch.setattr("bundles.similarity_learning.scripts.calibration_report.gather_objects", both)
    assert rows(report(tmp_path / "first", [batch("a")]), "spearman")[0]["count"] == 2
    monkeypatch.setattr("bundles.similarity_learning.scripts.calibration_report.is_first_rank", lambda: False)
    report(tmp_path / "second", [batch("a")])
    assert not (tmp_path / "second").exists()


def test_pairs_without_errors_are_left_out_of_curves(tmp_path: Path) -> None:
    handler = report(tmp_path, [batch("a"), batch("b", scale=0.0)], points=2)
    assert [row["count"] for row in rows(handler, "sparsification")] == [1, 1]
    assert rows(handler, "spearman")[0]["count"] == 1


def test_nothing_is_written_without_a_truth(tmp_path: Path) -> None:
    handler = report(tmp_path, [{**batch("a"), "true_ddf": None}])
    assert not handler.rows and not list(tmp_path.iterdir())


def test_labels_have_a_line_of_their_own(tmp_path: Path) -> None:
    label = torch.zeros(1, 1, 20, 20, dtype=torch.int32)
    label[:, :, 5:12, 5:12] = 2
    given = {**batch("a"), "moving_label": label, "fixed_label": label.roll(1, 2)}
    handler = report(tmp_path, [given], labels=[2])
    assert {row["kind"] for row in handler.rows} == {"displacement", "label"}
    assert all(
        0 <= row["x"] <= 1 and 0 <= row["y"] <= 1 for row in rows(handler, "reliability") if row["kind"] == "label"
    )
    titles = [axis.get_title() for axis in calibration_figure(handler.rows).axes]
    assert titles[0].startswith("displacement: rank correlation 1.00, 1 pairs")
    assert titles[2].startswith("propagated label: rank correlation")


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 0 and 20"):
        CalibrationReport(tmp_path, bins=0)
