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
"""A small run that trains a similarity, as several tests need it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bundles.similarity_learning.scripts.contrastive import ContrastiveObjective
from bundles.similarity_learning.scripts.image_posterior import ImageGaussian
from bundles.similarity_learning.scripts.inner_loop import InnerLoop
from bundles.similarity_learning.scripts.prepare import atlas_image
from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.store import PosteriorStore
from bundles.similarity_learning.scripts.trainer import SimilarityTrainer
from bundles.similarity_learning.scripts.transformation import build_transformation
from bundles.similarity_learning.scripts.variational import VariationalProblem
from common.handlers import SafeCheckpoint

SIZES = {2: (11, 9), 3: (9, 8, 7)}


class Subjects(Dataset):
    """Blobs at different places, each to be registered to one at a fixed place."""

    def __init__(self, spatial_dims: int = 2, count: int = 3, mask: bool = False, poison: int | None = None) -> None:
        self.size, self.count, self.mask, self.poison = SIZES[spatial_dims], count, mask, poison
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return self.count

    def blob(self, shift: float) -> Tensor:
        axes = torch.meshgrid(*[torch.arange(n) - n // 2 for n in self.size], indexing="ij")
        return torch.exp(-((axes[0] - shift) ** 2 + sum(a**2 for a in axes[1:])) / 6)[None]

    def __getitem__(self, index: int) -> dict[str, Any]:
        moving = self.blob(1.0 + 0.3 * index) * (math.nan if index == self.poison else 1)
        item = {"moving": moving, "fixed": self.blob(0.0), "moving_id": f"m{index}", "fixed_id": "atlas"}
        return {**item, "fixed_mask": self.blob(0.0) > 0.05} if self.mask else item


class Run:
    """A training run with everything it consists of, made from one seed."""

    def __init__(
        self,
        epochs: int = 1,
        dims: int = 2,
        kind: str = "ssd",
        transformation: str = "svf",
        dataset: Dataset | None = None,
        store: PosteriorStore | None = None,
        objective: str = "published",
        folder: Path | None = None,
        resume: bool | None = None,
        iterations: int = 3,
        batch_size: int = 2,
        sampler: Sampler[int] | None = None,
        seed: int = 7,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        dataset = Subjects(dims) if dataset is None else dataset
        self.similarity = Similarity(kind, learnt=True, spatial_dims=dims, train_lcc_kernel=kind == "lcc")
        self.image_posterior = ImageGaussian(atlas_image(dataset))  # type: ignore[arg-type]
        self.optimizer = torch.optim.Adam(self.similarity.parameters(), lr=1e-3)
        self.image_optimizer = torch.optim.Adam(self.image_posterior.parameters(), lr=1e-2)
        self.store = PosteriorStore() if store is None else store
        self.objects = {
            "model": self.similarity,
            "image_posterior": self.image_posterior,
            "optimizer": self.optimizer,
            "image_optimizer": self.image_optimizer,
            "store": self.store,
        }
        checkpoint = None if folder is None else SafeCheckpoint(folder, self.objects, resume=resume)
        handlers = [checkpoint, *options.pop("train_handlers", [])]
        self.trainer = SimilarityTrainer(
            device=device,
            max_epochs=epochs,
            train_data_loader=DataLoader(dataset, batch_size=batch_size, sampler=sampler),
            problem=VariationalProblem(
                self.similarity,
                build_transformation(transformation, steps=4),
                SobolevSmoothing(),
                DifferenceEnergy(0.1),
            ),
            inner_loop=options.pop("inner_loop", InnerLoop(iterations, learning_rate=0.05)),
            image_posterior=self.image_posterior,
            optimizer=self.optimizer,
            image_optimizer=self.image_optimizer,
            objective=ContrastiveObjective(objective),
            store=self.store,
            train_handlers=handlers,
            **options,
        )

    def run(self) -> Run:
        self.trainer.run()
        return self

    def everything(self) -> dict[str, Tensor]:
        """All that a run leaves behind."""
        found = {f"model {k}": v for k, v in self.similarity.state_dict().items()}
        found |= {f"q_f {k}": v for k, v in self.image_posterior.state_dict().items()}
        for name, optimizer in (("optimizer", self.optimizer), ("image_optimizer", self.image_optimizer)):
            for number, state in optimizer.state_dict()["state"].items():
                found |= {f"{name} {number} {k}": v for k, v in state.items()}
        stored = [(f"m{k}", "atlas") for k in range(3)]
        if self.store.where != "none":
            found |= {f"q_v {k}": v for k, v in self.store.get(stored).state().items()}
        return found
