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
"""Write every JSON of this folder again, from rules and stored facts.

``python data_splits/make_splits.py [--check]``: with ``--check`` nothing is written; the command fails when a file
differs from what the rules give.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
FACTS = HERE / "facts"


def shuffled(items: list[str], seed: int = 0) -> list[str]:
    """One seeded permutation. ``RandomState`` because numpy promises that its stream never changes."""
    return [items[i] for i in np.random.RandomState(seed).permutation(len(items))]


def ring(ids: list[str]) -> list[tuple[str, str]]:
    """(moving, fixed) pairs in which each id is once the moving and once the fixed one."""
    return list(zip(ids[1:] + ids[:1], ids, strict=True))


def ring_and_more(ids: list[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """A ring and, up to ``count``, further different ordered pairs at random."""
    chosen = ring(ids)
    others = [(moving, fixed) for fixed in ids for moving in ids if moving != fixed and (moving, fixed) not in chosen]
    order = np.random.RandomState(seed).permutation(len(others))
    return chosen + [others[i] for i in order[: count - len(chosen)]]


def hippocampus() -> dict[str, Any]:
    """160 training subjects, 20 validation subjects in a ring, 40 test subjects in 60 pairs."""
    ids = json.loads((FACTS / "hippocampus.json").read_text(encoding="utf-8"))["subjects"]
    order = shuffled(ids)
    training, validation, test = sorted(order[:160]), order[160:180], order[180:220]

    def files(subject: str, prefix: str = "") -> dict[str, str]:
        own = {prefix or "image": f"imagesTr/{subject}.nii.gz"}
        return own | {f"{prefix}_label" if prefix else "label": f"labelsTr/{subject}.nii.gz"}

    def pairs(listed: list[tuple[str, str]]) -> list[dict[str, str]]:
        return [files(moving, "moving") | files(fixed, "fixed") for moving, fixed in listed]

    return {
        "name": "hippocampus",
        "description": "Hippocampi cut out of T1 brain MRI, Medical Segmentation Decathlon task 4, 220 of its subjects",
        "source": "http://medicaldecathlon.com (Task04_Hippocampus.tar), or load_cohort('hippocampus', download=True)",
        "reference": "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "MRI"},
        "tensorImageSize": {"0": "3D"},
        "shape": None,
        "spacing": [1.0, 1.0, 1.0],
        "orientation": "RAS",
        "labels": {"0": "background", "1": "anterior", "2": "posterior"},
        "training": [files(subject) for subject in training],
        "validation": pairs(ring(validation)),
        "test": pairs(ring_and_more(test, 60)),
    }


SPLITS = {"hippocampus": hippocampus}


def text(split: dict[str, Any]) -> str:
    """JSON with one entry a line: readable, and a change is one line in a diff."""
    lines = []
    for key, value in split.items():
        shown = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            shown = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write or check all files; the exit status is the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    differing = 0
    for name, make in SPLITS.items():
        path, wanted = HERE / f"{name}.json", text(make())
        if not check:
            path.write_text(wanted, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            differing += 1
            sys.stderr.write(f"{path} differs from its rules\n")
    return differing


if __name__ == "__main__":
    sys.exit(main())
