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

import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR, PolynomialLR
from torch.utils.data import DataLoader, TensorDataset

from common.handlers import CheckpointError, SafeCheckpoint, load_checkpoint, resume_from, save_checkpoint
from common.handlers.checkpoint import unwrap


class Run:
    """A small training whose result depends on data order and on every generator."""

    def __init__(self, folder: Path | None, epochs: int, **options: Any) -> None:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
        self.network = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.05, amsgrad=True)
        self.scheduler = MultiStepLR(self.optimizer, [1, 3], gamma=0.5)
        self.engine = Engine(self._step)
        self.engine.state.max_epochs = epochs
        self.rates: list[float] = []
        if folder is not None:
            # In the list before the scheduler, as a user may well do.
            SafeCheckpoint(folder, self.objects, **options).attach(self.engine)
        self.engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.scheduler.step())
        generator = torch.Generator().manual_seed(5)
        data = TensorDataset(torch.randn(12, 3, generator=generator), torch.randn(12, 1, generator=generator))
        self.loader = DataLoader(data, batch_size=4, shuffle=True)

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.network, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}

    def _step(self, engine: Engine, batch: Any) -> dict[str, Any]:
        noise = random.random() + np.random.rand()  # noqa: NPY002
        loss = ((self.network(batch[0]) - batch[1] * noise) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return {"loss": loss.detach()}

    def run(self) -> Run:
        self.engine.run(self.loader, max_epochs=self.engine.state.max_epochs)
        return self


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_resumed_run_reaches_the_same_weights(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", 4).run()
    Run(tmp_path / "half", 2).run()
    again = Run(None, 4)
    for generator_use in (torch.rand, np.random.rand):
        generator_use(7)
    resume_from(tmp_path / "half" / "last.pt", again.engine, again.objects)
    assert (again.engine.state.epoch, again.engine.state.iteration) == (2, 6)
    torch.rand(3), random.random()
    again.run()
    assert same(whole.network, again.network) and whole.rates[6:] == again.rates
    assert again.engine.state.epoch == 4 and again.engine.state.iteration == 12


def test_resuming_from_the_handler(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", 3).run()
    Run(tmp_path / "run", 1, resume=True).run()  # there is none yet: starts afresh
    again = Run(tmp_path / "run", 3, resume=True).run()
    assert same(whole.network, again.network) and len(again.rates) == 6
    assert same(whole.network, _loaded(tmp_path / "run" / "model.pt"))
    with pytest.raises(FileNotFoundError):
        Run(tmp_path / "other", 3, resume=tmp_path / "nowhere.pt")


def _loaded(path: Path) -> nn.Module:
    network = Run(None, 1).network
    load_checkpoint(path, network)
    return network


def test_a_finished_run_is_not_started_over(tmp_path: Path) -> None:
    Run(tmp_path, 2).run()
    again = Run(None, 2)
    with pytest.raises(CheckpointError, match="epoch 2 and max_epochs is 2"):
        resume_from(tmp_path / "last.pt", again.engine, again.objects)


def test_a_longer_run_is_told_that_the_schedule_has_ended_or_is_another(tmp_path: Path) -> None:
    def scheduled(epochs: int) -> Run:
        run = Run(None, epochs)
        run.scheduler = PolynomialLR(run.optimizer, total_iters=epochs)  # type: ignore[assignment]
        return run

    whole = scheduled(2)
    SafeCheckpoint(tmp_path, whole.objects).attach(whole.engine)
    half = tmp_path / "half.pt"
    whole.engine.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: half.write_bytes(last.read_bytes()))
    last = tmp_path / "last.pt"
    whole.run()
    longer = scheduled(4)
    with pytest.warns(UserWarning, match=r"half.pt: its .* schedule goes on, which has total_iters 2 instead of 4"):
        resume_from(half, longer.engine, longer.objects)
    longer = scheduled(4)
    with (
        pytest.warns(UserWarning, match="total_iters"),
        pytest.raises(CheckpointError, match=r"learning rate of 0.*max_epochs 4"),
    ):
        resume_from(last, longer.engine, longer.objects)


def test_last_holds_plain_values_only(tmp_path: Path) -> None:
    run = Run(tmp_path, 2).run()
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert set(content) == {"model", "optimizer", "lr_scheduler", "trainer", "best", "rng", "scaler_of_trainer"}
    assert content["trainer"] == {"epoch": 2, "iteration": 6}
    assert content["lr_scheduler"]["last_epoch"] == run.scheduler.last_epoch == 2  # after the other handlers


def test_interval_and_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, 3, interval=2)
    seen: list[int] = []
    handler = run.engine.add_event_handler
    handler(Events.EPOCH_STARTED, lambda: seen.append(len(list(tmp_path.glob("last.pt")))))
    run.run()
    assert seen == [0, 0, 1]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"]["epoch"] == 3


def test_a_run_stopped_within_an_epoch_keeps_the_epoch_before(tmp_path: Path) -> None:
    run = Run(tmp_path, 3)
    run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())
    run.run()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"] == {"epoch": 1, "iteration": 3}


def test_a_run_that_was_never_validated_leaves_its_last_weights_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, 2, evaluator=Engine(lambda e, b: {}), key_metric="dice")
    with caplog.at_level("WARNING"):
        run.run()
    assert same(run.network, _loaded(tmp_path / "model.pt"))
    assert "dice was never measured" in caplog.text


def test_a_place_where_nothing_can_be_saved_is_named_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = Run(tmp_path / "file" / "run", 1)
    with pytest.raises(OSError, match=r"file/run .*choose another output_dir"):
        run.run()
    assert not run.rates


@pytest.mark.parametrize(("negative", "best"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("in_state", [True, False])
def test_the_best_network_is_kept(tmp_path: Path, negative: bool, best: int, in_state: bool) -> None:
    values = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.6}
    network, kept = nn.Linear(1, 1), {}
    evaluator = Engine(lambda e, batch: {"metrics": {"other": torch.zeros(1, 1)} | _metric(in_state, batch)})

    @evaluator.on(Events.EPOCH_COMPLETED)
    def _aggregate(engine: Engine) -> None:
        if in_state:
            engine.state.metrics["dice"] = values[engine.state.epoch]

    def step(engine: Engine, batch: Any) -> dict[str, Any]:
        nn.init.constant_(network.weight, engine.state.epoch)
        return {"loss": torch.zeros(())}

    trainer = Engine(step)

    @trainer.on(Events.EPOCH_COMPLETED)
    def _validate(engine: Engine) -> None:
        epoch = engine.state.epoch
        evaluator.state.epoch, evaluator.state.iteration, evaluator.state.max_epochs = epoch - 1, 0, epoch
        evaluator.run([values[epoch]], max_epochs=epoch)
        kept[epoch] = float(load_checkpoint(tmp_path / "model.pt")["weight"])

    handler = SafeCheckpoint(tmp_path, {"model": network}, evaluator, key_metric="dice", negative=negative)
    handler.attach(trainer)
    trainer.run([0], max_epochs=5)
    assert kept[5] == best and handler.best_epoch == best and handler.best == pytest.approx(values[best])
    assert load_checkpoint(tmp_path / "last.pt")["best"]["epoch"] == best
    # A run that goes on keeps the best value of the one before.
    fresh = SafeCheckpoint(tmp_path, {"model": network}, evaluator, key_metric="dice", negative=negative)
    later = Engine(step)
    later.state.max_epochs = 6
    resume_from(tmp_path / "last.pt", later, {"model": network}, fresh)
    assert fresh.best == pytest.approx(values[best]) and fresh.best_epoch == best


def _metric(in_state: bool, value: float) -> dict[str, torch.Tensor]:
    return {} if in_state else {"dice": torch.tensor([[value]])}


def test_an_unknown_key_metric_is_named(tmp_path: Path) -> None:
    evaluator = Engine(lambda e, batch: {"metrics": {"hd95": torch.zeros(1, 1)}})
    SafeCheckpoint(tmp_path, {"model": nn.Linear(1, 1)}, evaluator, key_metric="dice").attach(Engine(lambda e, b: None))
    with pytest.raises(KeyError, match=r"'dice' is not among.*'hd95'"):
        evaluator.run([0])


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_wrappers_leave_no_prefix(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    for wrapped in (nn.parallel.DistributedDataParallel(network), nn.DataParallel(network), torch.compile(network)):
        assert unwrap(wrapped) is network
        handler = SafeCheckpoint(tmp_path, {"model": wrapped})
        engine = Engine(lambda e, b: {})
        handler.attach(engine)
        engine.run([0])
        assert set(load_checkpoint(tmp_path / "model.pt")) == {"0.weight", "0.bias"}
        assert set(load_checkpoint(tmp_path / "last.pt")["model"]) == {"0.weight", "0.bias"}
        other = nn.Sequential(nn.Linear(2, 2))
        load_checkpoint(tmp_path / "model.pt", nn.DataParallel(other))
        assert same(network, other)


def test_weights_of_any_device_land_on_the_cpu(tmp_path: Path, device: torch.device) -> None:
    network = nn.Linear(2, 2).to(device)
    save_checkpoint(tmp_path / "model.pt", network.state_dict())
    assert all(value.device.type == "cpu" for value in load_checkpoint(tmp_path / "model.pt").values())


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickled_payload_is_refused(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"weight": Payload()}))
    else:
        torch.save({"weight": torch.zeros(1), "extra": Payload()}, path)
    with pytest.raises(CheckpointError, match="pickled Python objects"):
        load_checkpoint(path)
    assert not (tmp_path / "hacked").exists()


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"state_dict\(\)"):
        load_checkpoint(tmp_path / "model.pt")


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.pt", {"a": torch.zeros(1000)})
    with pytest.raises(FileNotFoundError, match=r"models.pt.*\['model.pt'\]"):
        load_checkpoint(tmp_path / "models.pt")
    with pytest.raises(FileNotFoundError, match="none"):
        load_checkpoint(tmp_path / "nowhere" / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("empty", b""), ("text", b"version https://git-lfs")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="got list"):
        load_checkpoint(tmp_path / "list.pt")


def test_another_network_is_described(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model.pt", nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)).state_dict())
    network = nn.Sequential(nn.Linear(2, 4), nn.PReLU())
    before = network.state_dict()["0.weight"].clone()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pt", network)
    message = str(caught.value)
    assert (
        "1 unexpected: 1.bias" in message and "3 of another shape: 0.weight (3, 2) instead of (4, 2), 0.bias" in message
    )
    assert torch.equal(network.state_dict()["0.weight"], before)
    deep = nn.Sequential(*[nn.Linear(1, 1) for _ in range(9)])
    with pytest.raises(CheckpointError, match=r"14 missing: 2.bias, .*, and 10 more"):
        load_checkpoint(tmp_path / "model.pt", deep)


@pytest.mark.parametrize(("here", "there", "scans"), [(2, 3, "volumes"), (3, 2, "slices")])
def test_weights_of_the_other_dimension_are_called_so(tmp_path: Path, here: int, there: int, scans: str) -> None:
    kinds = {2: nn.Conv2d, 3: nn.Conv3d}
    save_checkpoint(tmp_path / "w.pt", nn.Sequential(kinds[here](2, 3, 3), nn.Linear(3, 2)).state_dict())
    network = nn.Sequential(kinds[there](2, 3, 3), nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match=rf"w.pt has weights for {here}-D, .* expected weights for {scans}"):
        load_checkpoint(tmp_path / "w.pt", network)


def test_a_model_file_cannot_be_resumed_from(tmp_path: Path) -> None:
    run = Run(tmp_path, 1).run()
    with pytest.raises(CheckpointError, match=r"lacks \['trainer', 'rng', 'model'"):
        resume_from(tmp_path / "model.pt", run.engine, run.objects)


def test_what_no_checkpoint_can_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"last.pt.lr_scheduler\[1\].f is a function"):
        save_checkpoint(tmp_path / "last.pt", {"lr_scheduler": [0, {"f": lambda: 0}]})
    assert not list(tmp_path.iterdir())


def test_numpy_values_become_plain(tmp_path: Path) -> None:
    content = {"a": np.float64(1.5), "b": np.arange(3), "c": (np.int64(2), None), "d": {1: torch.bfloat16}}
    save_checkpoint(tmp_path / "a.pt", content)
    back = load_checkpoint(tmp_path / "a.pt")
    assert type(back["a"]) is float and back["b"].tolist() == [0, 1, 2] and back["c"] == (2, None)
    assert back["d"] == {1: torch.bfloat16}


def test_a_view_of_something_big_is_saved_small(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"a": torch.zeros(1_000_000)[:2]})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_the_gradient_scaler_comes_back(tmp_path: Path) -> None:
    class Scaler:
        def __init__(self, scale: float) -> None:
            self.scale = scale

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.scale}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.scale = state["scale"]

    run = Run(tmp_path, 1)
    run.engine.scaler = Scaler(8.0)  # type: ignore[attr-defined]
    run.run()
    again = Run(None, 2)
    resume_from(tmp_path / "last.pt", again.engine, again.objects)
    again.engine.scaler = Scaler(1.0)  # type: ignore[attr-defined]
    again.run()
    assert again.engine.scaler.scale == 8.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": {"optimizer": None}}, "must have 'model'"),
        ({"objects": {"model": None, "rng": None}}, "none of"),
        ({"objects": {"model": None}, "key_metric": "dice"}, "go together"),
        ({"objects": {"model": None}, "interval": 0}, "interval"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafeCheckpoint(tmp_path, **options)
