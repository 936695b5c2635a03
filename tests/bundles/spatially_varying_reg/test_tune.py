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
"""The search for hyper-parameters, on a network whose optimum is known."""

from __future__ import annotations

import builtins
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bundles.spatially_varying_reg.scripts.landscape import Landscape
from bundles.spatially_varying_reg.scripts.tune import ConditionSearch, coarse_to_fine, with_optuna
from common.engines import standard_measures
from common.spatial import warp

SIZE = (24, 20)
RANGES = {"alpha_range": (1.0, 1.2), "w_range": (0.0, 5.0)}
BEST = (1.13, 1.6)


class Known(nn.Module):
    """Shifts by the true amount at ``BEST`` and by another one elsewhere; folds where alpha is large."""

    def __init__(self, best: tuple[float, float] = BEST) -> None:
        super().__init__()
        self.best, self.point, self.conditioned, self.registered = best, (0.0, 0.0), [], 0

    def condition(self, **point: float) -> None:
        self.point = tuple(point.values())
        self.conditioned.append(self.point)
        self.names = tuple(point)

    def fields(self, image: Tensor) -> dict[str, Tensor]:
        self.registered += 1
        (first, second), (low, high) = self.point, self.best
        error = abs(first - low) / 0.2 + abs(second - high) / 5
        ddf = torch.zeros(len(image), 2, *SIZE)
        ddf[:, 0] = 3 + 4 * error
        ddf[:, 1, :, 18] += 40 * max(0.0, first - 1.1)  # beside the discs
        return {"ddf": ddf, "weight_map": torch.full((len(image), 1, *SIZE), 0.25)}


class Pairs(torch.utils.data.Dataset):
    """Discs, and the same shifted by three voxels."""

    def __init__(self, count: int = 4) -> None:
        grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in SIZE), indexing="ij"))
        self.items = []
        for k in range(count):
            moving = ((grid - torch.tensor([12.0, 9.0 + k]).view(2, 1, 1)).square().sum(0) < 20).float()[None]
            ddf = torch.zeros(1, 2, *SIZE)
            ddf[:, 0] = 3
            fixed = warp(moving[None], ddf)[0]
            item = {"moving": moving, "fixed": fixed, "moving_id": f"m{k}", "fixed_id": f"f{k}"}
            self.items.append(item | {"moving_label": moving.int(), "fixed_label": fixed.round().int()})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def search(folder: Path, network: nn.Module | None = None, pairs: int = 4, **options: Any) -> ConditionSearch:
    measures = standard_measures([1], seconds=True, reported={"weight": "weight_map"})
    options = {"labels": [1], **RANGES, **options}
    return ConditionSearch(network or Known(), Pairs(pairs), measures, folder, **options)


def table(folder: Path) -> list[dict[str, float]]:
    with open(folder / "landscape.csv") as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def test_coarse_to_fine_comes_close_in_few_registrations(tmp_path: Path) -> None:
    network = Known()
    summary = search(tmp_path, network, objective="similarity").run()
    # The last step is a quarter of the coarse one.
    assert abs(summary["alpha"] - BEST[0]) <= 0.0125 + 1e-9 and abs(summary["w"] - BEST[1]) <= 0.3125 + 1e-9
    assert not summary["at_border"] and summary["measured"]["cases"] == 4
    assert network.registered == summary["registrations"] <= 25 * 2 + 3 * 2 + 16 * 4
    assert network.point == (summary["alpha"], summary["w"]) and network.names == ("alpha", "w")
    # One change of weights for all pairs of a point, twice for those measured again on all.
    assert len(network.conditioned) <= summary["points"] + 4
    rows = table(tmp_path)
    assert len(rows) == summary["points"] and {row["cases"] for row in rows} == {2, 4}
    assert {"alpha", "w", "dice", "ndv", "sdlogj", "seconds", "weight", "cases"} <= set(rows[0])
    assert all(row["weight"] == 0.25 for row in rows)
    best = max((row for row in rows if row["cases"] == 4), key=lambda row: row["similarity"])
    written = json.loads((tmp_path / "best.json").read_text())
    assert (written["alpha"], written["w"]) == (best["alpha"], best["w"])
    assert written["measured"]["dice"] == pytest.approx(best["dice"], rel=1e-6) and best["dice"] > 0.9
    picture = Image.open(tmp_path / "landscape.png")
    assert picture.width > 800


def test_a_bound_on_folding_is_kept(tmp_path: Path) -> None:
    summary = search(tmp_path, max_ndv=0.5, objective="similarity").run()
    assert summary["allowed"] and summary["measured"]["ndv"] <= 0.5
    assert 1.05 < summary["alpha"] <= 1.125, "the optimum itself folds"
    options: dict[str, Any] = {"alpha_range": (1.15, 1.2), "grid": 3, "refinements": 0}
    with pytest.warns(UserWarning, match=r"nowhere is NDV at most max_ndv 0.5 %: the best point is .* lowest NDV"):
        summary = search(tmp_path, max_ndv=0.5, **options).run()
    assert not summary["allowed"] and summary["alpha"] == 1.15


def test_an_optimum_at_the_border_is_said_to_be_there(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"upper end of alpha, 1.2 and the upper end of w, 5: the optimum may lie"):
        summary = search(tmp_path, Known((1.25, 6.0)), objective="similarity", refinements=1).run()
    assert summary["at_border"] == ["upper end of alpha, 1.2", "upper end of w, 5"]


def test_a_gaussian_prior_is_searched_over_sigma_and_other_objectives_are_minimised(tmp_path: Path) -> None:
    network = Known((0.5, 2.5))
    options = {"alpha_range": None, "sigma_range": (0.0, 1.0), "objective": "sdlogj", "grid": 3, "refinements": 0}
    with pytest.warns(UserWarning, match="lower end of sigma, 0"):
        summary = search(tmp_path, network, pairs=1, **options).run()
    assert network.names == ("sigma", "w") and summary["measured"]["sdlogj"] == 0
    assert list(table(tmp_path)[0])[:2] == ["sigma", "w"]


def test_an_axis_of_no_length_is_left_alone(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="end of w"):
        summary = search(tmp_path, Known((1.1, 9.0)), alpha_range=(1.1, 1.1), grid=3, refinements=0).run()
    assert summary["points"] == 3 and summary["at_border"] == ["upper end of w, 5"]


def test_no_pair_is_registered_twice_at_a_point() -> None:
    landscape, done = Landscape(("alpha", "w"), ((1.0, 1.2), (0.0, 5.0)), 3, "dice"), []

    def measure(point: tuple[float, float], cases: Any) -> None:
        known = landscape.values.setdefault(point, {})
        for case in cases:
            if case not in known:
                done.append((point, case))
                known[case] = {"dice": -((point[0] - 1.1) ** 2) - (point[1] - 2.5) ** 2 / 100, "ndv": 0.0}

    coarse_to_fine(landscape, measure, [0], grid=5, refinements=3)
    assert len(set(done)) == len(done) and landscape.best == (1.1, 2.5)
    assert sum(len(cases) for cases in landscape.values.values()) == len(done)


def test_means_leave_out_what_could_not_be_measured() -> None:
    values = {(1.0, 2.0): {0: {"dice": 0.5, "ndv": 1.0}, 1: {"dice": math.nan, "ndv": 3.0}}}
    values[(1.1, 2.0)] = {0: {"dice": math.nan, "ndv": 0.0}, 1: {"dice": math.nan, "ndv": 0.0}}
    landscape = Landscape(("alpha", "w"), ((1.0, 1.2), (0.0, 5.0)), 2, "dice", values=values)  # type: ignore[arg-type]
    assert landscape.mean((1.0, 2.0)) == {"dice": 0.5, "ndv": 2.0, "cases": 2}
    assert landscape.best == (1.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, r"method must be one of \('grid', 'optuna'\), got 'random'"),
        ({"objective": "tre"}, r"objective 'tre' and 'ndv' must be measured; there are \['dice_before'"),
        ({"sigma_range": (0, 1)}, "give either alpha_range or sigma_range"),
        ({"w_range": (5.0, 0.0)}, "range of w needs its lower and its upper end"),
        ({"alpha_range": (1.0, math.inf)}, "range of alpha"),
        ({"grid": 1}, "grid must be at least 2"),
        ({"early_fraction": 0.0}, r"early_fraction in \(0, 1\]"),
        ({"pairs": 0}, "no pair to search on"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path, **options)


def test_without_optuna_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "optuna":
            raise ModuleNotFoundError(name)
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    network = Known()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'warpzoo\[tune\]'"):
        search(tmp_path, network, method="optuna").run()
    assert not network.registered


def test_optuna_comes_close_too(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    network = Known()
    summary = search(tmp_path, network, method="optuna", evaluations=25).run()
    assert summary["points"] <= 25 and summary["measured"]["cases"] == 4
    assert abs(summary["alpha"] - BEST[0]) < 0.05 and abs(summary["w"] - BEST[1]) < 1.25
    assert network.registered < 25 * 4, "trials below the median stop early"


def test_optuna_keeps_a_bound_on_folding() -> None:
    pytest.importorskip("optuna")
    landscape = Landscape(("alpha", "w"), ((1.0, 1.2), (0.0, 5.0)), 1, "dice", max_ndv=1.0)

    def measure(point: tuple[float, float], cases: Any) -> None:
        landscape.values[point] = {0: {"dice": point[1], "ndv": point[1]}}

    with_optuna(landscape, measure, [0], 20)
    assert landscape.allowed(landscape.best) and landscape.best[1] > 0.4


def test_the_picture_compares_points_on_the_pairs_that_all_share() -> None:
    easy, hard = {"dice": 0.9, "ndv": 0.0}, {"dice": 0.5, "ndv": 0.2}
    values = {(1.0, 0.0): {0: easy}, (1.1, 2.0): {0: easy, 1: hard}, (1.2, 4.0): {0: easy}, (1.2, 0.0): {0: hard}}
    landscape = Landscape(("alpha", "w"), ((1.0, 1.2), (0.0, 5.0)), 2, "dice", values=values)  # type: ignore[arg-type]
    assert landscape.shared == {0}
    assert [row["dice"] for row in landscape.rows(landscape.shared)] == [0.9, 0.9, 0.5, 0.9]
    assert landscape.rows()[1]["dice"] == pytest.approx(0.7)
    assert "means over 1 of 2 pairs" in landscape.picture()._suptitle.get_text()
