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
"""Training a similarity: what happens to q(v), to the network and to q_f, and that a run can be interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import Tensor

from bundles.similarity_learning.scripts.inner_loop import Fit, InnerLoop
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.prepare import atlas_image
from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.store import PosteriorStore
from bundles.similarity_learning.scripts.trainer import SimilarityTrainer
from bundles.similarity_learning.scripts.transformation import build_transformation
from bundles.similarity_learning.scripts.variational import VariationalProblem
from common.engines import NonFiniteLossError
from tests.bundles.similarity_learning.training_run import SIZES, Run, Subjects


def assert_same(one: Run, other: Run) -> None:
    left, right = one.everything(), other.everything()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.similarity.state_dict().items()}


@pytest.mark.parametrize(
    ("dims", "kind", "transformation", "amp", "objective"),
    [
        (2, "ssd", "svf", False, "published"),
        (2, "lcc", "bspline", "bf16", "published"),
        (2, "ssd", "bspline", False, "bound"),
        (3, "ssd", "bspline", "bf16", "bound"),
        (3, "lcc", "svf", False, "published"),
    ],
)
def test_a_step_changes_network_and_q_f_and_reports_every_part(
    dims: int, kind: str, transformation: str, amp: bool | str, objective: str, device: torch.device
) -> None:
    run = Run(1, dims, kind, transformation, Subjects(dims, mask=True), objective=objective, amp=amp, device=device)
    before, atlas = weights(run), run.image_posterior.mean.clone()
    before_q_f = {name: value.clone() for name, value in run.image_posterior.state_dict().items()}
    run.run()
    assert not torch.equal(
        before["encoder.aggregation.weight"], run.similarity.state_dict()["encoder.aggregation.weight"]
    )
    for name, value in run.image_posterior.state_dict().items():
        assert not torch.equal(before_q_f[name], value), name
    assert torch.equal(atlas, run.image_posterior.mean)
    output, size = run.trainer.state.output, SIZES[dims]
    assert {"q_v", "data", "regularisation", "entropy", "model", "plus", "minus"} <= set(output["losses"])
    assert all(value.ndim == 0 and bool(torch.isfinite(value)) for value in output["losses"].values())
    assert not output["loss"].requires_grad and not output["moved"].requires_grad
    # Three pairs in batches of two: the last batch is smaller than the first.
    assert output["moved"].shape == output["moving"].shape == (1, 1, *size)
    assert output["ddf"].shape == (1, dims, *size) and output["ddf"].dtype == torch.float32
    parts = output["losses"]
    expected = parts["data"] / 2 + parts["regularisation"] / 2 - parts["entropy"]
    assert torch.allclose(parts["q_v"], expected, rtol=1e-4)


def test_the_published_loss_is_the_difference_of_its_parts() -> None:
    output = Run(batch_size=3).run().trainer.state.output
    parts = output["losses"]
    expected = parts["model"] - 0.5 * (parts["plus"] + parts["minus"])
    assert torch.allclose(output["loss"], expected, rtol=1e-4, atol=1e-5)


def test_images_come_closer_and_what_is_moved_is_the_mean_without_noise() -> None:
    run = Run(iterations=40)
    run.run()
    output = run.trainer.state.output
    before = (output["moving"] - output["fixed"]).square().sum()
    assert (output["moved"] - output["fixed"]).square().sum() < 0.7 * before
    mean = run.store.get([("m2", "atlas")]).mean
    assert torch.allclose(run.trainer.problem.displacement(mean, (11, 9)), output["ddf"])


class Recorder(InnerLoop):
    """Notes what each call started from."""

    def __init__(self) -> None:
        super().__init__(2)
        self.calls: list[tuple[int, bool, int | None]] = []

    def fit(self, problem: VariationalProblem, moving: Tensor, fixed: Tensor, *args: Any, **options: Any) -> Fit:
        start: LowRankGaussian | None = options["posterior"]
        self.calls.append((len(moving), start is not None, options["iterations"]))
        return super().fit(problem, moving, fixed, *args, **options)


def test_a_pair_goes_on_from_its_last_visit_with_iterations_of_its_own() -> None:
    recorder = Recorder()
    Run(2, inner_loop=recorder, first_iterations=4).run()
    assert recorder.calls == [(2, False, 4), (1, False, 4), (2, True, None), (1, True, None)]


@pytest.mark.parametrize("known", [(0,), (1,), (0, 2)])
def test_new_and_known_pairs_of_a_batch_keep_their_places(known: tuple[int, ...]) -> None:
    store, recorder = PosteriorStore(), Recorder()
    for number in known:
        shape = (1, 2, 11, 9)
        mean = torch.full(shape, 10.0 * (number + 1))
        state = {"mean": mean, "log_var": torch.full(shape, -20.0), "factors": torch.zeros(1, 1, *shape[1:])}
        store.put([(f"m{number}", "atlas")], LowRankGaussian.from_state(state))
    Run(store=store, inner_loop=recorder, batch_size=3, iterations=5, first_iterations=6).run()
    assert [call[:2] for call in recorder.calls] == [(len(known), True), (3 - len(known), False)]
    means = store.get([(f"m{k}", "atlas") for k in range(3)]).mean.flatten(1).mean(1)
    expected = [10.0 * (k + 1) if k in known else 0.0 for k in range(3)]
    assert torch.allclose(means, torch.tensor(expected), atol=2.0)


def test_without_a_store_no_ids_are_needed_and_with_one_they_are() -> None:
    class Nameless(Subjects):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {key: value for key, value in super().__getitem__(index).items() if not key.endswith("_id")}

    Run(dataset=Nameless(), store=PosteriorStore("none")).run()
    with pytest.raises(KeyError, match=r"moving_id.*fixed_id"):
        Run(dataset=Nameless()).run()


@pytest.mark.parametrize("where", ["memory", "disk", "none"])
def test_an_interrupted_run_gives_the_numbers_of_a_whole_one(where: str, tmp_path: Path) -> None:
    def start(name: str, epochs: int, **options: Any) -> Run:
        folder = tmp_path / name
        store = PosteriorStore(where, folder / "q" if where == "disk" else None)
        return Run(epochs, store=store, folder=folder, **options)

    class Killed(RuntimeError):
        pass

    class Kill:
        """Ends a run in the middle of its third epoch, when newer q(v) have been stored."""

        def attach(self, trainer: Any) -> None:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), self.kill)

        def kill(self) -> None:
            raise Killed

    whole = start("whole", 4).run()
    with pytest.raises(Killed):
        start("half", 4, train_handlers=[Kill()]).run()
    resumed = start("half", 4, resume=True)
    assert resumed.trainer.state.epoch == 2
    assert_same(whole, resumed.run())


def test_epochs_differ_so_that_the_comparison_above_can_fail() -> None:
    with pytest.raises(AssertionError):
        assert_same(Run(1).run(), Run(2).run())


def test_more_steps_a_batch_draw_samples_of_their_own() -> None:
    fired = []

    class Count:
        def attach(self, trainer: Any) -> None:
            for event in (IterationEvents.LOSS_COMPLETED, IterationEvents.BACKWARD_COMPLETED):
                trainer.add_event_handler(event, lambda engine: fired.append(engine.problem))

    run = Run(batch_size=3, network_steps=3, train_handlers=[Count()]).run()
    assert len(fired) == 6
    assert run.optimizer.state_dict()["state"][0]["step"] == 3


def test_the_dataset_hears_of_each_epoch() -> None:
    dataset = Subjects()
    Run(3, dataset=dataset, iterations=1).run()
    assert dataset.epochs == [1, 2, 3]


def test_a_scan_that_is_no_number_stops_the_run_by_name_before_anything_is_stored() -> None:
    run = Run(dataset=Subjects(poison=2))
    before = weights(run)
    with pytest.raises(NonFiniteLossError, match=r"iteration 2.*m2"):
        run.run()
    assert ("m2", "atlas") not in run.store and ("m0", "atlas") in run.store
    assert all(torch.isfinite(tensor).all() for tensor in run.similarity.state_dict().values())
    assert not torch.equal(before["encoder.convolutions.0.weight"], run.similarity.encoder.convolutions[0].weight)


def test_a_loss_of_the_network_that_is_no_number_does_not_reach_its_weights() -> None:
    run = Run()
    before = weights(run)
    honest = run.trainer.objective
    run.trainer.objective = lambda *values: {name: part * math.nan for name, part in honest(*values).items()}
    with pytest.raises(NonFiniteLossError, match=r"iteration 1.*'model': nan.*m0.*m1.*learning rates of the network"):
        run.run()
    assert all(torch.equal(before[name], tensor) for name, tensor in run.similarity.state_dict().items())


def _another_fixed(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "fixed": item["moving"], "fixed_id": "other"} if item["moving_id"] == "m1" else item


def _another_size(item: dict[str, Any]) -> dict[str, Any]:
    images = {key: value[:, :-1] if isinstance(value, Tensor) else value for key, value in item.items()}
    return images if item["moving_id"] != "m0" else item


@pytest.mark.parametrize(
    ("change", "message"),
    [(_another_fixed, r"\['other'\] differ from it by up to"), (_another_size, r"\(1, 1, 11, 9\).*\(1, 1, 10, 9\)")],
)
def test_another_fixed_image_than_the_atlas_is_refused(change: Callable[..., Any], message: str) -> None:
    class Mixed(Subjects):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return change(super().__getitem__(index))

    with pytest.raises(ValueError, match=message):
        Run(dataset=Mixed(), batch_size=1).run()


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="fp16"):
        Run(amp="fp16")
    with pytest.raises(ValueError, match="network_steps must be at least 1, got 0"):
        Run(network_steps=0)
    plain = VariationalProblem(Similarity(), build_transformation(), SobolevSmoothing(), DifferenceEnergy())
    with pytest.raises(ValueError, match="nothing to learn"):
        SimilarityTrainer("cpu", 1, [], plain, *[None] * 4)  # type: ignore[arg-type]


def test_the_atlas_is_the_fixed_image_of_a_dataset_that_has_one_channel() -> None:
    dataset = Subjects()
    assert torch.equal(atlas_image(dataset)[0], dataset[1]["fixed"])
    with pytest.raises(ValueError, match=r"one channel, the atlas is \(2, 11, 9\)"):
        atlas_image([{"fixed": torch.zeros(2, 11, 9)}])
