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
"""One process a device: how the processes that torchrun starts find each other, and take leave."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist

__all__ = ["join_ranks", "leave_ranks"]

_SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def join_ranks() -> torch.device:
    """Make this process one of those that work together, and say which device is its own.

    Under torchrun this makes the process group unless there is one already: NCCL with CUDA, gloo without. Rank r of a
    machine takes its GPU number ``LOCAL_RANK``. Without torchrun there is no group, and the device is the one that a
    single process would use.

    Returns:
        ``cuda:<LOCAL_RANK>``, ``cuda`` without torchrun, or ``cpu`` on a machine without GPUs.

    Raises:
        RuntimeError: when only some of the variables are there that torchrun sets, or the machine has fewer GPUs than
            processes.
    """
    cuda = torch.cuda.is_available()
    if not _started_by_torchrun(os.environ):
        return torch.device("cuda" if cuda else "cpu")
    device = _device_of(int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        # Objects that ranks exchange travel over the current device.
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def leave_ranks() -> None:
    """Take leave of the process group, if there is one; all ranks do so at their end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _started_by_torchrun(environment: Mapping[str, str]) -> bool:
    found = [name for name in _SET_BY_TORCHRUN if environment.get(name)]
    # Slurm, notebooks and others set one or the other of them for purposes of their own: RANK and WORLD_SIZE alone
    # would leave two processes on one GPU, so half a setting is no setting.
    if found and len(found) < len(_SET_BY_TORCHRUN):
        missing = sorted(set(_SET_BY_TORCHRUN) - set(found))
        raise RuntimeError(
            f"the environment has {found} but not {missing}: start the processes with torchrun, which sets them all, "
            "or unset them for a run of one process"
        )
    return bool(found)


def _device_of(local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RuntimeError(
            f"this is process {local_rank} of its machine, counted from 0, which has {count} visible GPUs: start at "
            f"most {count} a machine (--nproc_per_node), or set CUDA_VISIBLE_DEVICES to none to run on CPUs"
        )
    return torch.device("cuda", local_rank)
