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
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.engines import NonFiniteLossError, PairsEvaluator, Refinement, pair_objective, standard_measures
from common.engines.pair_objective import PairObjective
from common.engines.refinement import _Progress
from common.engines.spline_flow import SplineFlow
from common.losses import LNCC, MSE, Diffusion, SoftDice, WeightedLosses
from common.metrics import InverseConsistency
from common.spatial import compose, integrate, non_diffeomorphic_volume, warp

logging.getLogger("ignite").setLevel(logging.CRITICAL)
SIZES = {2: (37, 30), 3: (17, 15, 19)}
LARGE = {2: (70, 65), 3: (67, 13, 12)}  # with axes long enough to be halved
WEAK = {
    "similarity": {"term": MSE(), "inputs": ["moved", "fixed"]},
    "smoothness": {"term": Diffusion(), "inputs": ["ddf"], "weight": 1e-3},
}


def smooth_noise(size: tuple[int, ...], channels: int, width: float, seed: int = 0) -> Tensor:
    """(1, C, *S), of unit standard deviation, smooth over about so many voxels."""
    noise = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))
    taps = torch.exp(-0.5 * (torch.arange(-8.0, 9.0) / width) ** 2)
    for axis in range(2, noise.dim()):
        index = (torch.arange(size[axis - 2])[:, None] + torch.arange(-8, 9)).clamp(0, size[axis - 2] - 1)
        noise = (noise.index_select(axis, index.flatten()).unflatten(axis, index.shape).movedim(axis + 1, -1)) @ taps
    return noise / noise.std()


def pair(dims: int, amplitude: float = 1.0, size: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """A textured pair with the field that made it, its inverse and half of each."""
    size = SIZES[dims] if size is None else size
    velocity = amplitude * smooth_noise(size, dims, 4.0, seed=1)
    texture = smooth_noise(size, 1, 1.5, seed=2).sigmoid()
    return {
        "moving": texture,
        "fixed": warp(texture, integrate(velocity)),
        "true": integrate(velocity),
        "half": integrate(velocity / 2),
        "half_back": integrate(-velocity / 2),
    }


def error(ddf: Tensor, true: Tensor) -> float:
    """Mean distance in voxels, away from the border, where what flows in cannot be known."""
    inner = (..., *(slice(3, -3) for _ in range(ddf.dim() - 2)))
    return float((ddf - true)[inner].norm(dim=1).mean())


def both(found: dict[str, Tensor], start: str = "zero") -> dict[str, Tensor]:
    """Fields in both directions to start from."""
    if start == "zero":
        return {name: torch.zeros_like(found["true"]) for name in ("ddf", "inverse_ddf")}
    return {"ddf": found["half"], "inverse_ddf": found["half_back"]}


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images count as large, and are refined at half their resolution first."""
    monkeypatch.setattr(pair_objective, "_LARGE", 1)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("start", ["zero", "half"])
def test_it_recovers_a_known_deformation(dims: int, start: str, device: torch.device) -> None:
    found = {name: value.to(device) for name, value in pair(dims).items()}
    fields = {"ddf": both(found, start)["ddf"]}
    result = Refinement(WeightedLosses(WEAK), tolerance=0)(fields, found, 60)
    assert result.loss_after < 0.3 * result.loss_before
    assert error(result.fields["ddf"], found["true"]) < 0.4 * error(fields["ddf"], found["true"])
    assert result.fields["ddf"].dtype == torch.float32 and not result.fields["ddf"].requires_grad
    assert set(result.fields) == {"ddf"}


@pytest.mark.parametrize("dims", [2, 3])
def test_both_directions_are_refined_as_one(dims: int) -> None:
    found = pair(dims, 1.5)
    fields = both(found, "half")
    result = Refinement()(fields, found, 15)
    consistency, (ddf, back) = InverseConsistency(), (result.fields["ddf"], result.fields["inverse_ddf"])
    changed = float((ddf - fields["ddf"]).norm(dim=1).mean())
    assert changed > 0.2
    # The inverse that nobody touched would be as far off as the field was moved.
    assert float(consistency(ddf, fields["inverse_ddf"]).mean()) > 0.5 * changed
    assert float(consistency(ddf, back).mean()) < 0.1 * changed + 2 * float(consistency(*fields.values()).mean())
    moved_back, before_back = (warp(found["fixed"], field) for field in (back, fields["inverse_ddf"]))
    assert float(LNCC(9)(moved_back, found["moving"])) < float(LNCC(9)(before_back, found["moving"]))


def test_an_inverse_that_the_loss_does_not_ask_for_follows_too() -> None:
    found = pair(2)
    fields = both(found)
    result = Refinement(WeightedLosses(WEAK))(fields, found, 10)
    ddf, back = result.fields["ddf"], result.fields["inverse_ddf"]
    assert float(compose(ddf, back)[..., 4:-4, 4:-4].norm(dim=1).mean()) < 0.1 * float(ddf.norm(dim=1).mean())


def test_it_stops_where_nothing_is_to_be_gained() -> None:
    found = pair(2)
    fields = {"ddf": found["true"]}
    result = Refinement(WeightedLosses(WEAK), patience=4, learning_rate=1e-3)(fields, found, 50)
    assert result.iterations < 50
    assert Refinement(WeightedLosses(WEAK), patience=4)(both(found), found, 50).iterations > result.iterations


def test_it_is_never_worse_than_what_it_got() -> None:
    found = pair(2)
    fields = {"ddf": found["true"]}
    # Steps far longer than the image.
    result = Refinement(WeightedLosses(WEAK), learning_rate=500.0, tolerance=0)(fields, found, 5)
    assert result.iterations == 5 and result.loss_after == result.loss_before
    assert torch.equal(result.fields["ddf"], fields["ddf"])
    nothing = Refinement()(fields, found, 0)
    assert nothing.iterations == 0 and torch.equal(nothing.fields["ddf"], fields["ddf"])


@pytest.mark.parametrize("dims", [2, 3])
def test_it_folds_no_more_than_before(dims: int) -> None:
    found = pair(dims)
    unrelated = {"moving": found["moving"], "fixed": smooth_noise(SIZES[dims], 1, 1.0, seed=7).sigmoid()}
    # Nothing holds the field together but what is tested here.
    reckless = WeightedLosses({"similarity": WEAK["similarity"]})
    refinement = Refinement(reckless, learning_rate=2.0, spacing=1, steps=2, tolerance=0)
    fields = both(found)
    result = refinement(fields, unrelated, 20)
    assert result.loss_after < result.loss_before
    assert [float(non_diffeomorphic_volume(field)) for field in result.fields.values()] == [0.0, 0.0]
    objective = PairObjective({**unrelated, **fields}, reckless, SplineFlow(SIZES[dims], 1, 2))
    points = refinement._descend(objective, objective.control_points(), 20, 2.0, _Progress(20), "")
    assert float(non_diffeomorphic_volume(objective.fields(points)["ddf"])) > 0  # there was something to take back


def test_folds_of_the_network_may_stay() -> None:
    found = pair(2)
    ddf = 4.0 * smooth_noise(SIZES[2], 2, 1.5, seed=3)
    volume = float(non_diffeomorphic_volume(ddf))
    result = Refinement()({"ddf": ddf}, found, 10)
    assert 0 < float(non_diffeomorphic_volume(result.fields["ddf"])) <= volume * (1 + 1e-6)
    assert result.loss_after < result.loss_before


def test_what_is_left_without_folds_may_be_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pair(2)
    monkeypatch.setattr(PairObjective, "unfolded", lambda self, points: {"ddf": -found["half"]})
    result = Refinement(WeightedLosses(WEAK))({"ddf": found["half"]}, found, 3)
    assert torch.equal(result.fields["ddf"], found["half"]) and result.loss_after == result.loss_before


@pytest.mark.parametrize("dims", [2, 3])
def test_half_the_resolution_comes_nearly_as_far(dims: int, levels: None, device: torch.device) -> None:
    found = {name: value.to(device) for name, value in pair(dims, size=LARGE[dims]).items()}
    zero = {"ddf": torch.zeros_like(found["true"])}
    losses = WeightedLosses(WEAK)
    results = [Refinement(losses, tolerance=0, fine=share)(zero, found, 40) for share in (0.0, 0.3, 1.0)]
    assert [result.iterations for result in results] == [40, 40, 40]
    rough, usual, fine = (error(result.fields["ddf"], found["true"]) for result in results)
    assert rough < 0.6 * error(zero["ddf"], found["true"])
    assert usual < rough and usual < 1.5 * fine
    few = Refinement(losses, tolerance=0)(zero, found, 12)  # of the 40, those at full resolution alone
    assert usual < error(few.fields["ddf"], found["true"])


@pytest.mark.parametrize(
    ("iterations", "fine", "expected"), [(10, 0.3, (7, 3)), (1, 0.3, (0, 1)), (5, 0.5, (2, 3)), (4, 1.0, (0, 4))]
)
def test_how_iterations_are_divided(
    iterations: int, fine: float, expected: tuple[int, int], levels: None, caplog: pytest.LogCaptureFixture
) -> None:
    found = pair(2, size=LARGE[2])
    with caplog.at_level(logging.INFO, "common.engines.refinement"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.engines.refinement._LINE_SECONDS", 0.0)
        result = Refinement(tolerance=0, fine=fine)({"ddf": torch.zeros_like(found["true"])}, found, iterations)
    assert result.iterations == iterations
    counts = [sum(f"{name} resolution" in line for line in caplog.messages) for name in ("half", "full")]
    # A line each, and one for the loss that a resolution begins with.
    assert counts == [expected[0] + (expected[0] > 0), expected[1] + 1]
    assert caplog.messages[-1] == (
        f"refine {iterations}/{iterations}: loss {result.loss_before:.4g} -> {result.loss_after:.4g}"
    )


class Misleading(nn.Module):
    """Wants at half the resolution the opposite of what it wants at the full one."""

    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        error = (moved - fixed).square().mean()
        return error if moved.shape[2:] == LARGE[2] else -error


def test_half_the_resolution_does_no_harm(levels: None) -> None:
    found = pair(2, size=LARGE[2])
    half = {"ddf": found["half"]}
    losses = WeightedLosses({"similarity": {"term": Misleading(), "inputs": ["moved", "fixed"]}})
    result = Refinement(losses, fine=0.0)(half, found, 10)
    assert torch.equal(result.fields["ddf"], found["half"]) and result.loss_after == result.loss_before
    refined = Refinement(losses, fine=0.5)(half, found, 10)
    direct = Refinement(losses, fine=1.0)(half, found, 5)
    assert torch.equal(refined.fields["ddf"], direct.fields["ddf"]) and refined.loss_after < refined.loss_before


@pytest.mark.parametrize("dims", [2, 3])
def test_folds_and_inverses_at_two_resolutions(dims: int, levels: None) -> None:
    found = pair(dims, 1.5, size=LARGE[dims])
    unrelated = {**found, "fixed": smooth_noise(LARGE[dims], 1, 1.0, seed=7).sigmoid()}
    fields = both(found, "half")
    reckless = WeightedLosses({"similarity": WEAK["similarity"]})
    result = Refinement(reckless, learning_rate=2.0, tolerance=0)(fields, unrelated, 20)
    assert result.loss_after < result.loss_before
    for name, field in result.fields.items():
        assert float(non_diffeomorphic_volume(field)) <= float(non_diffeomorphic_volume(fields[name]))
    usual = Refinement()(fields, found, 15)
    consistency, (ddf, back) = InverseConsistency(), (usual.fields["ddf"], usual.fields["inverse_ddf"])
    changed = float((ddf - fields["ddf"]).norm(dim=1).mean())
    assert changed > 0.2
    assert float(consistency(ddf, back).mean()) < 0.1 * changed + 2 * float(consistency(*fields.values()).mean())


def test_masks_stacks_and_precision_at_two_resolutions(levels: None) -> None:
    found = pair(2, size=LARGE[2])
    zero = {"ddf": torch.zeros_like(found["true"])}
    mask = torch.zeros_like(found["fixed"])
    mask[..., 9:51, 8:42] = 1
    ruined = torch.where(mask > 0, found["fixed"], torch.rand(found["fixed"].shape))
    results = [Refinement()(zero, {**found, "fixed": f, "fixed_mask": mask}, 8) for f in (found["fixed"], ruined)]
    assert torch.equal(results[0].fields["ddf"], results[1].fields["ddf"])
    plain = Refinement()(zero, found, 8)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        strict = Refinement()({"ddf": zero["ddf"].clone()}, {name: f.clone() for name, f in found.items()}, 8)
    assert torch.equal(strict.fields["ddf"], plain.fields["ddf"])
    stack = {name: torch.stack([found[name][0]] * 2, dim=-1)[None] for name in ("moving", "fixed")}
    stack["fixed_affine"] = torch.eye(4, dtype=torch.float64)[None]
    flat = Refinement(stacks=True)({"ddf": torch.zeros(1, 3, *LARGE[2], 2)}, stack, 8).fields["ddf"]
    # Not equal, as the mean over two slices halves gradients, and Adam's epsilon stays.
    assert float((flat[:, :2, ..., 1] - plain.fields["ddf"]).norm(dim=1).mean()) < 0.02
    assert float(plain.fields["ddf"].norm(dim=1).mean()) > 0.2


@pytest.mark.parametrize("size", [(11, 7), (3, 50), (7, 5, 9), (3, 3, 3)])
def test_any_size(size: tuple[int, ...]) -> None:
    found = pair(len(size), 0.5, size)
    result = Refinement()({"ddf": torch.zeros_like(found["true"])}, found, 3)
    assert result.fields["ddf"].shape == found["true"].shape
    assert result.loss_after <= result.loss_before


def test_neither_half_precision_nor_gradients_around_it_matter() -> None:
    found = pair(2)
    plain = Refinement()(both(found), found, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Refinement()(both(found), found, 5)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        strict = Refinement()(both(pair(2)), pair(2), 5)
    for result in (inside, strict):
        assert torch.equal(result.fields["ddf"], plain.fields["ddf"]) and result.loss_after == plain.loss_after
    half = Refinement()({n: f.bfloat16() for n, f in both(found).items()}, found, 2)
    assert half.fields["ddf"].dtype == torch.float32


def test_pairs_of_a_batch_do_not_depend_on_each_other() -> None:
    one, other = pair(2), pair(2, -1.5)
    together = {name: torch.cat([one[name], other[name]]) for name in one}
    result = Refinement()({"ddf": torch.zeros_like(together["true"])}, together, 8)
    for item, alone in enumerate((one, other)):
        expected = Refinement()({"ddf": torch.zeros_like(alone["true"])}, alone, 8)
        assert torch.equal(result.fields["ddf"][item : item + 1], expected.fields["ddf"])


def test_what_a_mask_hides_has_no_say() -> None:
    found = pair(2)
    mask = torch.zeros_like(found["fixed"])
    mask[..., 10:28, 8:22] = 1
    ruined = torch.where(mask > 0, found["fixed"], torch.rand(found["fixed"].shape))
    fields = {"ddf": torch.zeros_like(found["true"])}
    results = [Refinement()(fields, {**found, "fixed": f, "fixed_mask": mask}, 8) for f in (found["fixed"], ruined)]
    assert torch.equal(results[0].fields["ddf"], results[1].fields["ddf"])
    assert results[0].loss_after < results[0].loss_before


def test_slices_of_a_stack_are_refined_in_their_plane() -> None:
    slices = [pair(2, amplitude) for amplitude in (0.5, 1.0)]
    stack = {name: torch.stack([one[name][0] for one in slices], dim=-1)[None] for name in ("moving", "fixed")}
    zero = torch.zeros(1, 3, *SIZES[2], 2)
    result = Refinement(stacks=True)({"ddf": zero}, stack, 20)
    assert result.fields["ddf"].shape == zero.shape and not result.fields["ddf"][:, 2].any()
    for number, one in enumerate(slices):
        found, nothing = result.fields["ddf"][:, :2, ..., number], torch.zeros_like(one["true"])
        assert error(found, one["true"]) < 0.6 * error(nothing, one["true"])


def test_the_loss_may_need_what_is_kept_but_no_labels() -> None:
    found = pair(2)
    weighted = {**WEAK, "smoothness": {"term": Diffusion(), "inputs": ["ddf", "weight_map"], "weight": 1e-3}}
    weight = torch.ones_like(found["fixed"])
    fields = {"ddf": both(found)["ddf"], "weight_map": weight, "velocity": weight, "ddf_samples": weight}
    result = Refinement(WeightedLosses(weighted))(fields, found, 2)
    assert set(result.fields) == {"ddf", "weight_map"}
    labels = {f"{role}_label": (found[role] > 0.5).int() for role in ("moving", "fixed")}
    overlap = {"dice": {"term": SoftDice(), "inputs": ["moved_onehot", "fixed_onehot"]}}
    with pytest.raises(KeyError, match="'dice' needs 'moved_onehot'"):
        Refinement(WeightedLosses(overlap))(fields, {**found, **labels}, 2)


def test_a_loss_that_is_no_number_is_named() -> None:
    found = pair(2)
    found["fixed"][..., 4, 4] = float("nan")
    with pytest.raises(NonFiniteLossError, match="similarity"):
        Refinement(WeightedLosses(WEAK))(both(found), found, 3)


@pytest.mark.parametrize(
    "options", [{"spacing": 0}, {"learning_rate": 0.0}, {"patience": 1.5}, {"tolerance": -1.0}, {"fine": 1.5}]
)
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Refinement(**options)


def test_it_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "common.engines.refinement"):
        Refinement(tolerance=0)(both(pair(2)), pair(2), 3)
    assert "refine 3/3: loss -" in caplog.messages[-1]


class Half(nn.Module):
    """Finds half of the way, and what belongs to that half."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        super().__init__()
        self.found = found

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        velocity = torch.zeros_like(self.found["half"])
        return {"ddf": self.found["half"], "inverse_ddf": self.found["half_back"], "velocity": velocity}


@pytest.mark.parametrize("refine", [0, 5])
def test_an_evaluator_goes_on_from_the_network(refine: int) -> None:
    found = pair(2)
    grids = {f"{role}_affine": torch.eye(3, dtype=torch.float64)[None] for role in ("moving", "fixed")}
    timings = {"load": torch.tensor([2.0], dtype=torch.float64), "affine": torch.tensor([0.5], dtype=torch.float64)}
    batch = {"moving": found["moving"], "fixed": found["fixed"], **grids, "timings": timings}
    evaluator = PairsEvaluator("cpu", [batch], Half(found), metrics=standard_measures(seconds=True), refine=refine)
    evaluator.run()
    output = evaluator.state.output
    assert isinstance(output, dict)
    similarity = -float(LNCC(9)(warp(found["moving"], found["half"]), found["fixed"]))
    network = output["timings"]["network"]
    assert float(output["metrics"]["seconds"]) == pytest.approx(network, rel=1e-5)
    if not refine:
        assert torch.equal(output["ddf"], found["half"]) and "velocity" in output and "refinement" not in output
        assert float(output["metrics"]["similarity"]) == pytest.approx(similarity, abs=1e-5)
        assert output["timings"] == {"load": 2.0, "affine": 0.5, "network": network}
        return
    assert float(output["metrics"]["similarity"]) > similarity + 0.02
    torch.testing.assert_close(output["moved"], warp(found["moving"], output["ddf"]))
    assert "velocity" not in output and "inverse_ddf" in output
    told = output["refinement"]
    assert told["iterations"] == 5 and told["loss_after"] < told["loss_before"]
    assert output["timings"] == {"load": 2.0, "affine": 0.5, "network": network, "refine": told["seconds"]}
    assert all(isinstance(value, (int, float)) for value in [*told.values(), *output["timings"].values()])


@pytest.mark.parametrize("refine", [-1, 2.5, True])
def test_iterations_are_a_whole_number(refine: Any) -> None:
    with pytest.raises(ValueError, match="refine"):
        PairsEvaluator("cpu", [], Half({}), refine=refine)
