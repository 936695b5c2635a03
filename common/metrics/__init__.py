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
"""Registration metrics in MONAI's form."""

from __future__ import annotations

from common.metrics.base import RegistrationMetric
from common.metrics.collection import MetricCollection
from common.metrics.consistency import InverseConsistency
from common.metrics.endpoint import EndpointError
from common.metrics.intensity import RootMeanSquareError
from common.metrics.landmarks import TargetRegistrationError
from common.metrics.learn2reg import learn2reg_labels
from common.metrics.overlap import DiceScore
from common.metrics.regularity import (
    MeanJacobian,
    NonDiffeomorphicVolumePercent,
    NonPositiveJacobianPercent,
    StdLogJacobian,
)
from common.metrics.reported import Reported
from common.metrics.similarity import Similarity
from common.metrics.slices import PerSlice
from common.metrics.surface import AverageSurfaceDistance, HausdorffDistance, HausdorffDistance95

__all__ = [
    "AverageSurfaceDistance",
    "DiceScore",
    "EndpointError",
    "HausdorffDistance",
    "HausdorffDistance95",
    "InverseConsistency",
    "MeanJacobian",
    "MetricCollection",
    "NonDiffeomorphicVolumePercent",
    "NonPositiveJacobianPercent",
    "PerSlice",
    "RegistrationMetric",
    "Reported",
    "RootMeanSquareError",
    "Similarity",
    "StdLogJacobian",
    "TargetRegistrationError",
    "learn2reg_labels",
]
