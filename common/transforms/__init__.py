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
"""The random-image transform and preprocessing.

Importing this package also puts its transforms into the namespace ``monai.transforms``, where MONAI's config parser
and MONAI's users look for a transform: code that takes ``getattr(monai.transforms, name)`` finds ours like any other.
Only names of ours are set, and never one that MONAI has itself.
"""

from __future__ import annotations

import monai.transforms

from common.transforms.array import RandImagePair
from common.transforms.dictionary import RandImagePairD, RandImagePaird, RandImagePairDict
from common.transforms.fitting import FitWholed
from common.transforms.pair_alignment import PairAlignment
from common.transforms.preprocessing import CheckScand, ScalePercentilesd, scan_transforms
from common.transforms.random_images import ImagePair, PairOptions, generate_pair
from common.transforms.scan_pairs import LoadScanPaird
from common.transforms.shifts import IntensityShift
from common.transforms.stacks import CompleteSlices, RandSlice, ScaleSlicesd, cohort_transforms, stack_transforms

__all__ = [
    "CheckScand",
    "CompleteSlices",
    "FitWholed",
    "ImagePair",
    "IntensityShift",
    "LoadScanPaird",
    "PairAlignment",
    "PairOptions",
    "RandImagePair",
    "RandImagePairD",
    "RandImagePairDict",
    "RandImagePaird",
    "RandSlice",
    "ScalePercentilesd",
    "ScaleSlicesd",
    "cohort_transforms",
    "generate_pair",
    "scan_transforms",
    "stack_transforms",
]

for _transform in (RandImagePair, RandImagePaird):
    for _name in {n for n, value in globals().items() if value is _transform}:
        if getattr(monai.transforms, _name, None) is None:
            setattr(monai.transforms, _name, _transform)
