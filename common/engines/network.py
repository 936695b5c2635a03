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
"""How an engine calls a network, on one process or on several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.networks import RegistrationNetwork

__all__ = ["FieldsModule", "autocast", "distribute", "seed_everything"]

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FieldsModule(nn.Module):
    """Calls ``network.fields`` from ``forward``, which is the only method that gradient synchronisation sees.

    Args:
        network: a registration network.
    """

    def __init__(self, network: RegistrationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predict the fields of ``image`` (B, 2C, *S)."""
        return self.network.fields(image)


def distribute(network: RegistrationNetwork, device: torch.device | str, find_unused: bool = False) -> nn.Module:
    """Move a network to its device and, where a process group exists, synchronise its gradients.

    The network given is the one to make optimisers of and to save: its keys are the same on any number of processes.

    Args:
        network: the network to train or evaluate.
        device: where it runs.
        find_unused: set it when some parameters get no gradient, such as a head whose loss has weight 0; costs time.

    Returns:
        a module that maps ``image`` (B, 2C, *S) to the dictionary of fields.
    """
    device = torch.device(device)
    module = FieldsModule(network).to(device)
    trains = any(parameter.requires_grad for parameter in network.parameters())
    if not (dist.is_available() and dist.is_initialized() and trains):
        return module
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, find_unused_parameters=find_unused)


@contextmanager
def autocast(device: torch.device, amp: bool | str) -> Iterator[None]:
    """Run the network's convolutions and products in half precision.

    Args:
        device: CPU or CUDA; MONAI's own engines know only CUDA here.
        amp: False, True or "bf16" (bfloat16), or "fp16".

    Raises:
        ValueError: for another precision.
    """
    if not amp:
        yield
        return
    name = "bf16" if amp is True else str(amp)
    if name not in _PRECISIONS:
        raise ValueError(f"amp must be one of False, True, {sorted(_PRECISIONS)}, got {amp!r}")
    with torch.autocast(device.type, dtype=_PRECISIONS[name]):
        yield


def seed_everything(seed: int) -> int:
    """Seed torch, numpy and MONAI, differently on each process, so that sampled noise differs between them.

    Initial weights may differ too: gradient synchronisation starts from those of the first process.

    Args:
        seed: the run's seed.

    Returns:
        the seed of this process.
    """
    from monai.utils import set_determinism

    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    # A large odd stride keeps neighbouring seeds of neighbouring runs apart.
    local = (int(seed) + 1_000_003 * rank) % (2**32)
    set_determinism(seed=local)
    torch.backends.cudnn.deterministic = False
    return local
