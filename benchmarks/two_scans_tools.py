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
"""Greedy or ANTs on two files, as a process of its own that loads nothing else.

``python -m benchmarks.two_scans_tools greedy|syn|syn_cc MOVING FIXED FOLDER THREADS`` leaves transforms in the folder
and prints how long each stage took, in the words of ANTs: ``Elapsed time (stage 0): 1.95``. ANTs takes its number of
threads from ``ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS``.
"""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["ANTS", "GREEDY_AFFINE", "GREEDY_WARP", "run_ants", "run_greedy"]

# The commands of Greedy's own quick start, with displacements as they are found instead of rounded to 0.1 voxels.
GREEDY_AFFINE = "-a -dof 12 -m NCC 2x2x2 -n 100x50x10 -ia-image-centers"
GREEDY_WARP = "-m NCC 2x2x2 -n 100x50x10 -wp 0"
# ANTsPy's SyN as it comes, by mutual information; and by local correlation, with Greedy's window and iterations.
# (Its own "SyNCC" takes 500 seconds for a hippocampus of 37 x 51 x 35.)
ANTS: dict[str, dict[str, Any]] = {
    "syn": {},
    "syn_cc": {"syn_metric": "CC", "syn_sampling": 2, "reg_iterations": (100, 50, 10)},
}


def run_greedy(moving: str, fixed: str, folder: str, threads: str) -> None:
    """``affine.mat``, a matrix in RAS mm, and ``warp.nii.gz``; ``moved.nii.gz`` is the moving scan through both."""
    from picsl_greedy import Greedy3D

    tool = Greedy3D()
    common = f"-V 0 -seed 1 -threads {threads}"
    stages = (
        f"{common} {GREEDY_AFFINE} -i {fixed} {moving} -o {folder}/affine.mat",
        f"{common} {GREEDY_WARP} -i {fixed} {moving} -it {folder}/affine.mat -o {folder}/warp.nii.gz",
    )
    for number, command in enumerate(stages):
        began = time.perf_counter()
        tool.execute(command)
        print(f"Elapsed time (stage {number}): {time.perf_counter() - began:.3f}")
    way = f"{folder}/warp.nii.gz {folder}/affine.mat"
    tool.execute(f"{common} -rf {fixed} -rm {moving} {folder}/moved.nii.gz -r {way}")


def run_ants(kind: str, moving: str, fixed: str, folder: str) -> None:
    """``1Warp.nii.gz`` and ``0GenericAffine.mat``, their inverses, and ``moved.nii.gz``.

    Args:
        kind: of :data:`ANTS`.
        moving: the file that is moved.
        fixed: the file that it is moved to.
        folder: where to.
    """
    import ants

    images = {"fixed": ants.image_read(fixed), "moving": ants.image_read(moving)}
    # Only when it is talkative does it say how long its stages took.
    found = ants.registration(
        **images, type_of_transform="SyN", outprefix=f"{folder}/", random_seed=1, verbose=True, **ANTS[kind]
    )
    ants.image_write(found["warpedmovout"], f"{folder}/moved.nii.gz")


if __name__ == "__main__":
    name, moving, fixed, folder, threads = sys.argv[1:]
    if name == "greedy":
        run_greedy(moving, fixed, folder, threads)
    else:
        run_ants(name, moving, fixed, folder)
