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
import re

import pytest

from common.handlers.report.tables import details_of_labels, measures, number, table, timings


def rows(html: str) -> list[list[str]]:
    """The text of the cells."""
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.78125, "0.7812"), (12, "12"), (None, "not measured"), (math.nan, "not measured"), (math.inf, "infinite")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_measures_stand_before_and_after_with_their_change() -> None:
    given = {
        "dice_before": [0.5, None],
        "dice": [0.75, 0.25],
        "ndv": 0.125,
        "tre_before": 4.0,
        "tre": math.nan,
        "own": [1.0],
    }
    assert rows(measures(given)) == [
        ["measure", "before", "after", "change"],
        # The mean is that of what was measured.
        ["Dice (1 is perfect), mean of 2 labels", "0.5", "0.5", "+0"],
        ["non-diffeomorphic volume, %", "", "0.125", ""],
        ["distance of landmarks (TRE), mm", "4", "not measured", ""],
        ["own", "", "1", ""],
    ]


def test_further_stages_have_columns_of_their_own() -> None:
    given = {"tre_before": [3.0], "tre": [1.0], "dice": [0.5, 0.75], "tre_initial": [5.0], "tre_network": [2.0]}
    assert rows(measures(given)) == [
        ["measure", "by the headers", "after the affine map", "network alone", "after", "change"],
        ["distance of landmarks (TRE), mm", "5", "3", "2", "1", "-4"],
        ["Dice (1 is perfect), mean of 2 labels", "", "", "", "0.625", ""],
    ]
    given |= {"dice_initial": [0.25, 0.5], "dice_network": [0.5, 0.5]}
    assert rows(details_of_labels(given, [1, 2])) == [
        ["label", "dice by the headers", "dice network alone", "dice after"],
        ["1", "0.25", "0.5", "0.5"],
        ["2", "0.5", "0.5", "0.75"],
    ]


def test_each_label_has_a_row() -> None:
    given = {"dice_before": [0.5, None], "dice": [0.75, 0.25], "ndv": [0.125]}
    expected = [["17", "0.5", "0.75"], ["the &lt;rest&gt;", "not measured", "0.25"]]
    assert rows(details_of_labels(given, [17, "the <rest>"])) == [["label", "dice before", "dice after"], *expected]
    assert [row[0] for row in rows(details_of_labels(given, [17]))] == ["label", "number 1", "number 2"]
    assert details_of_labels({"ndv": [0.125]}, []) == ""


def test_stages_add_up() -> None:
    assert rows(timings({"load": 1.5, "network": 0.25})) == [
        ["stage", "seconds"],
        ["load", "1.5"],
        ["network", "0.25"],
        ["together", "1.75"],
    ]


def test_text_is_escaped() -> None:
    html = table(["<b>"], [["<script>", "\"'&"]])
    assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html
