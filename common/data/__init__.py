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
"""Cohorts, pairs and integrity checks: from files to items that a DataLoader can batch."""

from __future__ import annotations

from common.data.cohort import Cohort, cohort_from_json, load_cohort
from common.data.group_sampler import GroupSampler
from common.data.integrity import CohortReport, IntegrityError, check_integrity
from common.data.pair_files import PairList, read_pair_table
from common.data.pairs import PairDataset
from common.data.random_pairs import RandomPairDataset
from common.data.scan_pairs import ScanPairs
from common.data.subsets import nested_subset

__all__ = [
    "Cohort",
    "CohortReport",
    "GroupSampler",
    "IntegrityError",
    "PairDataset",
    "PairList",
    "RandomPairDataset",
    "ScanPairs",
    "check_integrity",
    "cohort_from_json",
    "load_cohort",
    "nested_subset",
    "read_pair_table",
]
