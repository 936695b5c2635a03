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
from typing import Any

import pytest
import torch

from common.engines import PairValues, standard_measures
from common.metrics import DiceScore, HausdorffDistance95


def values(moving_label: torch.Tensor, ddf: torch.Tensor, spacing: float = 1.0) -> PairValues:
    """A pair whose fixed label 1 is the slab of rows 4 and 5."""
    fixed_label = torch.zeros(1, 1, 12, 10, dtype=torch.int32)
    fixed_label[:, :, 4:6] = 1
    affine = torch.diag(torch.tensor([spacing, 1.0, 1.0], dtype=torch.float64))[None]
    batch: dict[str, Any] = {"moving_label": moving_label, "fixed_label": fixed_label, "fixed_affine": affine}
    return PairValues({**batch, "moving": moving_label.float(), "fixed": fixed_label.float()}, {"ddf": ddf})


def slab(start: int) -> torch.Tensor:
    label = torch.zeros(1, 1, 12, 10, dtype=torch.int32)
    label[:, :, start : start + 2] = 1
    return label


def test_names_depend_on_what_there_is() -> None:
    assert set(standard_measures().metrics) == {"similarity_before", "similarity", "ndv", "folds", "sdlogj"}
    more = set(standard_measures([1], surface=True, true_field=True).metrics)
    assert {"dice", "dice_before", "hd95", "hd95_before", "asd", "asd_before", "epe"} <= more


def test_a_label_that_warping_loses_scores_zero() -> None:
    away = torch.zeros(1, 2, 12, 10)
    away[:, 0] = -20.0  # everything reads the first row, which is background
    measured = standard_measures([1, 2])(values(slab(4), away))
    assert measured["dice_before"][0, 0] == 1 and measured["dice"][0, 0] == 0
    assert math.isnan(measured["dice"][0, 1]), "a label that neither image has"


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_surface_distances_are_in_the_scans_millimetres(spacing: float) -> None:
    measures = standard_measures([1], surface=True, spacing="fixed_spacing")
    measured = measures(values(slab(7), torch.zeros(1, 2, 12, 10), spacing))
    assert measured["hd95"].item() == pytest.approx(3 * spacing)
    assert measures.aggregate()["hd95_before"] == pytest.approx(3 * spacing)


def pattern(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A label map with a field that moves its boundaries by parts of voxels and loses label 3."""
    generator = torch.Generator().manual_seed(seed)
    label = slab(4)
    label[:, :, 7:10, 2:8] = 2
    label[:, :, 1, 1] = 3
    ddf = 0.7 * torch.randn(1, 2, 12, 10, generator=generator)
    ddf[:, :, :3, :3] = 20.0
    return label, ddf


def test_both_definitions_stand_side_by_side() -> None:
    label, ddf = pattern()
    sets = {
        name: standard_measures([1, 2, 3], surface=True, spacing="fixed_spacing", definition=name)
        for name in ("standard", "learn2reg", "both")
    }
    measured = {name: measures(values(label, ddf, 2.0)) for name, measures in sets.items()}
    suffixed = {"dice_l2r", "dice_l2r_before", "hd95_l2r", "hd95_l2r_before", "ndv_l2r", "sdlogj_l2r"}
    assert set(measured["both"]) == set(measured["standard"]) | suffixed
    assert set(measured["learn2reg"]) == set(measured["standard"])
    for name, value in measured["standard"].items():
        assert torch.equal(measured["both"][name].nan_to_num(-1), value.nan_to_num(-1)), name
    for name in ("dice", "hd95", "ndv", "sdlogj"):
        l2r = measured["both"][f"{name}_l2r"].nan_to_num(-1)
        assert torch.equal(l2r, measured["learn2reg"][name].nan_to_num(-1)), name
        assert not torch.allclose(l2r, measured["standard"][name].nan_to_num(-1)), name
    assert sets["both"].columns["dice_l2r"] == ("1", "2", "3")


def test_learn2regs_labels_and_surfaces_are_those_of_nearest_voxels() -> None:
    label, ddf = pattern()
    pair = values(label, ddf)
    measured = standard_measures([1, 2, 3], surface=True, definition="both")(pair)
    nearest = pair["moved_label_l2r"]
    metrics = {"dice_l2r": DiceScore([1, 2, 3]), "hd95_l2r": HausdorffDistance95([1, 2, 3], definition="learn2reg")}
    for name, metric in metrics.items():
        expected = metric(nearest, pair["fixed_label"], label)
        assert torch.equal(measured[name].nan_to_num(-1), expected.nan_to_num(-1)), name


def test_a_lost_label_is_infinitely_far_for_the_organisers_and_unknown_to_us() -> None:
    away = torch.full((1, 2, 12, 10), -20.0)
    measured = standard_measures([1], surface=True, definition="both")(values(slab(4), away))
    assert measured["hd95"].isnan().all() and measured["hd95_l2r"].item() == math.inf
    assert measured["dice_l2r"].item() == 0


def test_an_unknown_definition_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'standard', 'learn2reg', 'both'.* got 'l2r'"):
        standard_measures(definition="l2r")


def test_inverse_and_time_are_measured_where_there_are_any() -> None:
    label, ddf = pattern()
    batch = values(label, ddf).known()
    measures = standard_measures(inverse=True, seconds=True)
    without = measures(PairValues(batch, {"ddf": ddf, "seconds": torch.tensor([[0.5]])}))
    assert without["seconds"].item() == 0.5 and "inverse_consistency" not in without
    fields = {"ddf": ddf, "seconds": torch.ones(1, 1), "inverse_ddf": -ddf}
    measured = measures(PairValues(batch, {**fields, "inversion_iterations": torch.tensor([[[3, 4], [5, 6]]])}))
    assert measured["inversion_iterations"].item() == 4.5 and measured["inverse_consistency"].item() > 0.1


def test_what_a_network_reports_has_a_column() -> None:
    label, ddf = pattern()
    batch = values(label, ddf).known()
    measures = standard_measures(reported={"weight": "weight_map", "alpha": "alpha"})
    weight = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
    measured = measures(PairValues(batch, {"ddf": ddf, "weight_map": weight}))
    assert measured["weight"].item() == 0.5 and "alpha" not in measured
    measured = measures(PairValues(batch, {"ddf": ddf, "alpha": torch.tensor([1.25])}))
    assert measured["alpha"].item() == 1.25 and "weight" not in measured


def landmarks(**more: Any) -> dict[str, Any]:
    """One landmark, whose partner is a voxel further along the first axis, of a sheared moving image."""
    affine = torch.tensor([[[2.0, 0.0, 5.0], [1.0, 3.0, -9.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    return {"fixed_points": torch.tensor([[[4.0, 4.0]]]), "moving_points": torch.tensor([[[5.0, 4.0]]])} | {
        "moving_affine": affine,
        **more,
    }


def test_landmarks_are_measured_in_the_moving_scans_world() -> None:
    label, _ = pattern()
    ddf = torch.zeros(1, 2, 12, 10)
    ddf[:, 1] = 2.0  # to (4, 6), which is (-1, 2) from (5, 4): (-2, 5) mm
    batch = {**values(label, ddf).known(), **landmarks()}
    measured = standard_measures([1], landmarks=True)(PairValues(batch, {"ddf": ddf}))
    assert measured["tre_before"].item() == pytest.approx(math.sqrt(5))
    assert measured["tre"].item() == pytest.approx(math.sqrt(29))


def test_pairs_without_landmarks_leave_them_out_where_they_may() -> None:
    label, ddf = pattern()
    pair = values(label, ddf)
    with pytest.raises(KeyError, match=r"metric 'tre_before' needs \['fixed_points', 'moving_points'"):
        standard_measures(landmarks=True)(pair)
    measures = standard_measures([1], landmarks=True, some_labels=True)
    assert not {"tre", "tre_before"} & set(measures(pair))
    measured = measures(PairValues({**pair.known(), **landmarks()}, {"ddf": 0 * ddf}))
    assert measured["tre"].item() == measured["tre_before"].item() == pytest.approx(math.sqrt(5))
    assert measures.aggregate()["tre"] == pytest.approx(math.sqrt(5))


def test_stages_that_a_pair_went_through_are_measured() -> None:
    _, ddf = pattern()
    pair = values(slab(4), 0 * ddf)
    measures = standard_measures([1], landmarks=True, some_labels=True, stages=True)
    names = {f"{name}_{stage}" for name in ("dice", "tre") for stage in ("initial", "network")}
    assert not names & set(measures(pair))
    stages = {"initial_label": slab(5), "network_label": slab(8)}
    stages |= {"initial_points": torch.tensor([[[5.0, 5.0]]]), "network_points": torch.tensor([[[7.0, 4.0]]])}
    measured = measures(PairValues({**pair.known(), **landmarks(), **stages}, {"ddf": 0 * ddf}))
    assert names <= set(measured)
    # Half of it is where it should be; and none, though it was there.
    assert measured["dice_initial"].item() == 0.5 and measured["dice_network"].item() == 0.0
    assert measured["tre_initial"].item() == 3.0
    assert measured["tre_network"].item() == pytest.approx(2 * math.sqrt(5))
    assert not names & set(standard_measures([1], landmarks=True).metrics)
    assert set(standard_measures(stages=True).metrics) == set(standard_measures().metrics)
