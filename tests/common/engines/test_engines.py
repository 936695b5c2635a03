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
"""What the trainer and the evaluator promise to every bundle."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.metrics import CumulativeIterationMetric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.engines import (
    FieldsModule,
    NonFiniteLossError,
    PairValues,
    RegistrationEvaluator,
    RegistrationTrainer,
    distribute,
    load_pretrained_encoder,
    prepare_pair,
    seed_everything,
)
from common.losses import LNCC, MSE, Diffusion, SoftDice, WeightedLosses
from common.metrics import Reported
from common.networks import RegistrationNetwork


class OneShift(RegistrationNetwork):
    """Moves everything by one learned vector: the smallest network there is."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__(spatial_dims)
        self.shift = nn.Parameter(torch.zeros(spatial_dims))
        self.mix = nn.Conv2d(2, 1, 1) if spatial_dims == 2 else nn.Conv3d(2, 1, 1)

    def fields(self, image: Tensor) -> dict[str, Tensor]:
        # The convolution makes autocast have something to do; it adds nothing.
        nothing = 0 * self.mix(image).float()
        shape = (1, self.spatial_dims) + (1,) * self.spatial_dims
        return {"ddf": self.shift.view(shape) + nothing.expand(-1, self.spatial_dims, *image.shape[2:])}


class Blobs(Dataset):
    """A Gaussian blob, and the same blob two voxels further along the first axis."""

    def __init__(self, spatial_dims: int, size: int = 13, length: int = 4, poison: int | None = None) -> None:
        self.spatial_dims, self.size, self.length, self.poison = spatial_dims, size, length, poison
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.length

    def blob(self, centre: float) -> Tensor:
        axes = torch.meshgrid(*[torch.arange(self.size).float()] * self.spatial_dims, indexing="ij")
        squared = (axes[0] - centre) ** 2 + sum((a - 6.0) ** 2 for a in axes[1:])
        return torch.exp(-squared / 18)[None]

    def __getitem__(self, index: int) -> dict[str, Any]:
        moving, fixed = self.blob(7.0), self.blob(5.0)
        if index == self.poison:
            moving = moving * math.nan
        item = {"moving": moving, "fixed": fixed, "moving_id": f"m{index}", "fixed_id": f"f{index}"}
        return {**item, "moving_label": (moving > 0.5).to(torch.uint8), "fixed_label": (fixed > 0.5).to(torch.uint8)}


class MeanOf(CumulativeIterationMetric):
    """The mean difference of two tensors, one value an item."""

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        return (y_pred.float() - y.float()).abs().flatten(1).mean(1, keepdim=True)

    def aggregate(self) -> Tensor:  # type: ignore[override]
        return self.get_buffer().nanmean()


def make_loss(similarity: nn.Module | None = None) -> WeightedLosses:
    return WeightedLosses(
        {
            "similarity": {"term": similarity or MSE(), "inputs": ["moved", "fixed"], "weight": 1.0},
            "smoothness": {"term": Diffusion(), "inputs": ["ddf"], "weight": 0.1},
        }
    )


def make_trainer(network: RegistrationNetwork, dataset: Dataset, **options: Any) -> RegistrationTrainer:
    options = {"max_epochs": 1, "loss_function": make_loss(), **options}
    optimizer = torch.optim.Adam(network.parameters(), lr=0.2)
    loader = DataLoader(dataset, batch_size=2)
    device = options.pop("device", torch.device("cpu"))
    return RegistrationTrainer(
        device=device, train_data_loader=loader, network=distribute(network, device), optimizer=optimizer, **options
    )


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("amp", [False, "bf16"])
def test_training_finds_the_translation_and_its_direction(d: int, amp: bool | str, device: torch.device) -> None:
    network = OneShift(d)
    make_trainer(network, Blobs(d), max_epochs=25, amp=amp, device=device).run()
    # moved(x) = moving(x + ddf): the blob at 7 appears at 5 when ddf is +2 along the first axis.
    assert network.shift[0].item() == pytest.approx(2.0, abs=0.1)
    assert network.shift[1:].abs().max().item() < 0.1


def test_output_names_every_term_and_total_is_their_weighted_sum() -> None:
    trainer = make_trainer(OneShift(2), Blobs(2), loss_function=make_loss(LNCC(window=5, spatial_dims=2)))
    trainer.run()
    output = trainer.state.output
    assert set(output["losses"]) == {"similarity", "smoothness"}
    expected = output["losses"]["similarity"] + 0.1 * output["losses"]["smoothness"]
    assert torch.allclose(output["loss"], expected)
    assert not output["loss"].requires_grad
    assert output["ddf"].dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step_and_names_term_and_subjects() -> None:
    network = OneShift(2)
    trainer = make_trainer(network, Blobs(2, poison=2))
    with pytest.raises(NonFiniteLossError, match=r"iteration 2.*similarity.*m2.*f2"):
        trainer.run()
    assert torch.isfinite(network.shift).all()


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    network = OneShift(2)
    trainer = make_trainer(network, Blobs(2), clip_gradient=1e-4)
    trainer.run()
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    assert norm.item() <= 1.001e-4


def test_the_dataset_hears_of_each_epoch() -> None:
    dataset = Blobs(2)
    make_trainer(OneShift(2), dataset, max_epochs=3).run()
    assert dataset.epochs == [1, 2, 3]


def test_a_batch_without_a_fixed_image_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="fixed"):
        prepare_pair({"moving": torch.zeros(1, 1, 4, 4)}, "cpu")
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\) and \(1, 1, 4, 5\)"):
        prepare_pair({"moving": torch.zeros(1, 1, 4, 4), "fixed": torch.zeros(1, 1, 4, 5)}, "cpu")


def test_values_are_computed_once_and_only_when_asked_for() -> None:
    batch = {k: v[None] if isinstance(v, Tensor) else v for k, v in Blobs(2)[0].items()}
    values = PairValues(batch, {"ddf": torch.zeros(1, 2, 13, 13)}, labels=[1])
    assert "moved" in values and "moved" not in values.known()
    assert values["moved"] is values["moved"]
    assert torch.allclose(values["moved"], batch["moving"], atol=1e-6)
    assert torch.equal(values["moved_label"], batch["moving_label"])
    assert values["moved_onehot"].shape == (1, 1, 13, 13)
    assert "moved_mask" not in values
    with pytest.raises(KeyError, match="moved_mask"):
        values["moved_mask"]


def test_the_inverse_field_brings_the_fixed_image_and_its_labels_back() -> None:
    batch = {k: v[None] if isinstance(v, Tensor) else v for k, v in Blobs(2)[0].items()}
    there = torch.zeros(1, 2, 13, 13)
    there[:, 0] = 2.0  # what Blobs are apart
    values = PairValues(batch, {"ddf": there, "inverse_ddf": -there, "pyramid": [there.requires_grad_()]}, labels=[1])
    inside = slice(2, None)  # what came from beyond the border repeats it
    assert torch.allclose(values["inverse_moved"][:, :, inside], batch["moving"][:, :, inside], atol=1e-5)
    assert torch.allclose(values["inverse_moved_onehot"], values["moving_onehot"], atol=1e-5)
    assert not values.known()["pyramid"][0].requires_grad
    assert "inverse_moved" not in PairValues(batch, {"ddf": there})


def test_soft_dice_on_labels_trains_too() -> None:
    loss = WeightedLosses({"dice": {"term": SoftDice(), "inputs": ["moved_onehot", "fixed_onehot"], "weight": 1.0}})
    network = OneShift(2)
    trainer = make_trainer(network, Blobs(2), max_epochs=30, loss_function=loss, labels=[1])
    trainer.run()
    assert network.shift[0].item() == pytest.approx(2.0, abs=0.3)


def test_evaluator_measures_before_and_after_and_keeps_the_best() -> None:
    network = OneShift(2)
    measures = {
        "before": {"metric": MeanOf(), "inputs": ["moving", "fixed"]},
        "after": {"metric": MeanOf(), "inputs": ["moved", "fixed"]},
    }
    evaluator = RegistrationEvaluator(
        device="cpu",
        val_data_loader=DataLoader(Blobs(2, length=3), batch_size=2),
        network=FieldsModule(network),
        metrics=measures,
        key_val_metric="after",
        lower_is_better=True,
    )
    evaluator.run(1)
    assert evaluator.state.metrics["before"] == pytest.approx(evaluator.state.metrics["after"])
    worse = evaluator.state.metrics["after"]
    with torch.no_grad():
        network.shift[0] = 2.0
    evaluator.run(2)
    assert evaluator.state.metrics["after"] < 0.3 * worse
    assert evaluator.state.best_metric == evaluator.state.metrics["after"] and evaluator.state.best_metric_epoch == 2
    with torch.no_grad():
        network.shift[0] = -4.0
    evaluator.run(3)
    assert evaluator.state.best_metric_epoch == 2
    assert measures["after"]["metric"].get_buffer().shape == (3, 1)  # type: ignore[attr-defined]


def test_a_key_metric_that_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="'dice' is not among"):
        RegistrationEvaluator("cpu", DataLoader(Blobs(2)), FieldsModule(OneShift(2)), {}, key_val_metric="dice")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8"):
        make_trainer(OneShift(2), Blobs(2), amp="fp8").run()


def test_one_seed_gives_one_stream_of_noise() -> None:
    seed_everything(7)
    first = torch.rand(3)
    seed_everything(7)
    assert torch.equal(first, torch.rand(3))


def test_the_gradient_scaler_survives_the_start_of_training() -> None:
    class Doubling:
        """Scales by two, counts its steps."""

        steps = 0

        def scale(self, loss: Tensor) -> Tensor:
            return 2 * loss

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad /= 2

        def step(self, optimizer: torch.optim.Optimizer) -> None:
            self.steps += 1
            optimizer.step()

        def update(self) -> None:
            pass

    plain, scaled = OneShift(2), OneShift(2)
    scaled.load_state_dict(plain.state_dict())
    make_trainer(plain, Blobs(2), clip_gradient=0.01).run()
    trainer = make_trainer(scaled, Blobs(2), clip_gradient=0.01)
    trainer.scaler = Doubling()  # type: ignore[assignment]
    trainer.run()
    assert trainer.scaler.steps == 2  # type: ignore[union-attr]
    assert torch.allclose(plain.shift, scaled.shift)


def test_the_evaluator_times_the_network_alone() -> None:
    class Slow(OneShift):
        def fields(self, image: Tensor) -> dict[str, Tensor]:
            time.sleep(0.06)
            return super().fields(image)

    loader = DataLoader(Blobs(2), batch_size=2)
    metrics = {"seconds": {"metric": Reported(), "inputs": ["seconds"]}}
    evaluator = RegistrationEvaluator("cpu", loader, distribute(Slow(2), "cpu"), metrics)
    evaluator.add_event_handler(Events.GET_BATCH_STARTED, lambda: time.sleep(0.3))
    evaluator.run()
    assert evaluator.state.output["metrics"]["seconds"].shape == (2, 1)
    assert 0.03 <= evaluator.state.metrics["seconds"] < 0.2


def test_a_network_without_an_encoder_cannot_start_one() -> None:
    with pytest.raises(ValueError, match=r"no encoder that start\.pt could start"):
        load_pretrained_encoder(None, "start.pt")
