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
"""Similarity and smoothness terms, and their weighted sum."""

from __future__ import annotations

from common.losses.deep_supervision import DeepSupervision
from common.losses.folding import NonDiffeomorphicVolume
from common.losses.group_consistency import GroupConsistency
from common.losses.intensity import MSE, GlobalNCC, MutualInformation
from common.losses.kl import GaussianKL
from common.losses.lncc import LNCC
from common.losses.overlap import SoftDice, WarpedLabelDice, one_hot
from common.losses.smoothness import BendingEnergy, Diffusion
from common.losses.weighted import WeightedLosses

__all__ = [
    "LNCC",
    "MSE",
    "BendingEnergy",
    "DeepSupervision",
    "Diffusion",
    "GaussianKL",
    "GlobalNCC",
    "GroupConsistency",
    "MutualInformation",
    "NonDiffeomorphicVolume",
    "SoftDice",
    "WarpedLabelDice",
    "WeightedLosses",
    "one_hot",
]
