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
"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("WARPZOO_SHARED", REPOSITORY.parent / "shared"))


_NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_NEEDS_CUDA)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and parity figures beside the checkout; a test that asks for it skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}; set WARPZOO_SHARED to the folder with data/ and parity/")
    return SHARED


@pytest.fixture
def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images (1,1,32,32) of one bright blob, a few voxels apart: what any network learns to register at once."""
    position = torch.arange(32.0)
    moving = torch.exp(-((position - 12) ** 2).view(1, 1, -1, 1) / 30 - ((position - 18) ** 2) / 30)
    fixed = torch.exp(-((position - 16) ** 2).view(1, 1, -1, 1) / 30 - ((position - 15) ** 2) / 30)
    return moving, fixed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
