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
"""What the options of a registration mean, as ``python -m common register --help`` lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.command_line import option_lines

__all__ = ["GROUPS", "config_keys", "options_help"]

#: Options of every bundle's ``inference.json``, by what they are about.
GROUPS: dict[str, dict[str, str]] = {
    "Two scans": {
        "moving": "the scan that is moved: NIfTI, NRRD, MetaImage",
        "fixed": "the scan that it is moved to; without the two, an embedded example",
        "moving_label": "label map of the moving scan, carried along",
        "fixed_label": "label map of the fixed scan; with both, overlap is measured",
        "moving_points": "landmarks of the moving scan, a CSV",
        "fixed_points": "their partners in the fixed scan, in the same rows; the distance is measured",
        "points_space": "of the landmarks: ras or lps (mm), or voxel",
        "frame": "which image of a 4-D series, counted from 0",
        "moving_frame": "that of the moving scan, where the two differ",
        "fixed_frame": "that of the fixed scan",
    },
    "Many pairs": {
        "pairs": "a CSV with the columns moving and fixed, a dataset JSON or the name of a cohort",
        "split": "which pairs of a JSON or cohort: test, validation or training_pairs",
        "dataset_dir": "folder of the data of a JSON or cohort",
        "overwrite": "register the pairs again whose folder is complete",
    },
    "How": {
        "stacks": "scans are stacks of slices, which are registered one by one",
        "affine": "before the network: affine, similarity, rigid, centre (of mass), none (as the headers say), frames "
        "(middles laid on each other), or a file of ITK, ANTs or FSL; name:inverse turns one around",
        "affine_similarity": "what that maximises: ncc, lncc, mse, or mi for scans of different contrast",
        "spacing": "voxel size in mm at which the network sees the scans; by default that of the fixed scan",
        "intensity": "mri, ct_lung, ct_abdomen, none, minmax, or a window such as [-1000,400]",
        "padding": "beyond a scan: zeros, or border to repeat its outermost voxels",
        "refine": "iterations of optimisation on this pair after the network, at most",
    },
    "Results": {
        "output_dir": "their folder",
        "field_format": "of the transform: itk (a field), composite (.h5), l2r (Learn2Reg), or a list of these",
        "inverse_field": "the way back: auto (numerical where the network gives none), network (its own only), none",
        "report": "write report.html; by default for two scans, not for a list",
    },
    "Running": {
        "bundle": "whose network",
        "checkpoint": "its weights; by default those that the bundle ships",
        "device": "cpu, cuda or cuda:1; by default a GPU if there is one",
        "amp": "bf16 or fp16 for less memory",
        "seed": "of all that is random",
        "debug": "show where an error came from",
    },
}

_INTERNAL = ("imports", "bundle_root", "spatial_dims", "handlers", "loaded", "run")
_ROW = re.compile(r"^\| (`[^|]*`) \| ([^|]*) \|", re.MULTILINE)


def config_keys(bundle: Path) -> dict[str, Any]:
    """What the ``inference.json`` in a bundle's folder says, by key."""
    content: dict[str, Any] = json.loads((bundle / "configs/inference.json").read_text(encoding="utf-8"))
    return content


def options_help(bundle: Path, own: Mapping[str, Any]) -> str:
    """All options of a registration with a bundle.

    Args:
        bundle: its folder.
        own: options that are not in its ``inference.json``, or have another default.
    """
    values = {**config_keys(bundle), **own}
    plain = {name: value for name, value in values.items() if name not in _INTERNAL and not isinstance(value, dict)}
    # What the config works out is told in words.
    defaults = {name: None if str(value).startswith("$") else value for name, value in plain.items()}
    known = {name for group in GROUPS.values() for name in group}
    parts = []
    for title, group in GROUPS.items():
        there = {name: (meaning, defaults[name]) for name, meaning in group.items() if name in defaults}
        parts.append(f"{title}\n{option_lines(there)}")
    meanings = _documented(bundle)
    rest = {name: (meanings.get(name, ""), value) for name, value in defaults.items() if name not in known}
    if rest:
        parts.append(f"The network of {bundle.name}\n{option_lines(rest)}")
    return "\n\n".join(parts)


def _documented(bundle: Path) -> dict[str, str]:
    """What the table of options in a bundle's own page says, by key."""
    page = bundle / "docs/README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    section = re.split(r"^#+ ", text.partition("# Options\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    found: dict[str, str] = {}
    for keys, meaning in _ROW.findall(section):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", meaning).replace("`", "")
        found |= dict.fromkeys(re.findall(r"`(\w+)`", keys), plain)
    return found
