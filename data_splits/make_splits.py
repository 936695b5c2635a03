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
"""Write every JSON of this folder again, from rules and from the facts in ``facts/``.

``python data_splits/make_splits.py [--check]``: with ``--check`` nothing is written; the command fails when a file
differs from what the rules give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent

STUDY = "DIR-Revisited study, arXiv 2512.01913"
LUMIR_SIZES = (3384, 1000, 300, 100, 50, 30, 20, 10)


def facts(name: str) -> dict[str, Any]:
    """What no rule gives."""
    content: dict[str, Any] = json.loads((HERE / "facts" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def shuffled(items: Sequence[str], seed: int = 0) -> list[str]:
    """One seeded permutation. ``RandomState`` because numpy promises that its stream never changes."""
    return [items[i] for i in np.random.RandomState(seed).permutation(len(items))]


def ring(ids: Sequence[str]) -> list[tuple[str, str]]:
    """(fixed, moving) pairs in which each id is once the fixed and once the moving one."""
    return [(ids[i], ids[(i + 1) % len(ids)]) for i in range(len(ids))]


def ring_and_more(ids: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, str]]:
    """A ring and, up to ``count``, further different ordered pairs at random."""
    chosen = ring(ids)
    others = [(fixed, moving) for fixed in ids for moving in ids if moving != fixed and (fixed, moving) not in chosen]
    order = np.random.RandomState(seed).permutation(len(others))
    return chosen + [others[i] for i in order[: count - len(chosen)]]


def subject(name: str, image: str, label: str | None = None) -> dict[str, str]:
    """One training entry; ``{id}`` in a pattern is the subject."""
    return {"id": name, "image": image.format(id=name)} | ({"label": label.format(id=name)} if label else {})


def pair(fixed: str, moving: str, image: str, label: str | None = None) -> dict[str, str]:
    """One validation or test entry."""
    entry = {}
    for role, name in (("moving", moving), ("fixed", fixed)):
        entry |= {f"{role}_id": name, role: image.format(id=name)}
        entry |= {f"{role}_label": label.format(id=name)} if label else {}
    return entry


def hippocampus() -> dict[str, Any]:
    """160 training subjects, 20 validation subjects in a ring, 40 test subjects in 60 pairs."""
    order = shuffled(facts("hippocampus")["subjects"])
    files = ("imagesTr/{id}.nii.gz", "labelsTr/{id}.nii.gz")
    return {
        "name": "hippocampus",
        "description": "Hippocampi cut out of T1 brain MRI, Medical Segmentation Decathlon task 4, 220 of its subjects",
        "source": "http://medicaldecathlon.com (Task04_Hippocampus.tar), or let it be fetched: --download True on a "
        "bundle's command line, load_cohort('hippocampus', download=True) in Python",
        "reference": "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022",
        "licence": "CC-BY-SA 4.0",
        "folder": "Task04_Hippocampus",
        "modality": {"0": "MRI"},
        "tensorImageSize": {"0": "3D"},
        "shape": None,
        "spacing": [1.0, 1.0, 1.0],
        "orientation": "RAS",
        "labels": {"0": "background", "1": "anterior", "2": "posterior"},
        # Of the training subjects the one whose label volumes, extent and principal axes are nearest to the medians.
        "suggested_atlas": "hippocampus_303",
        "training": [subject(name, *files) for name in sorted(order[:160])],
        "validation": [pair(*ids, *files) for ids in ring(order[160:180])],
        "test": [pair(*ids, *files) for ids in ring_and_more(order[180:220], 60)],
    }


def oasis2d() -> dict[str, Any]:
    """60 training slices, 8 validation slices in a ring, 12 test slices in 24 pairs; no labels."""
    order = shuffled(facts("oasis2d")["subjects"])
    return {
        "name": "oasis2d",
        "description": "Axial slices of OASIS brains, without labels",
        "source": "test data of mermaid, https://github.com/uncbiag/mermaid (80 slices as oasis2d_XXXX.nrrd)",
        "reference": "Marcus et al., Open Access Series of Imaging Studies, Journal of Cognitive Neuroscience 2007",
        "licence": "OASIS data use agreement, https://www.oasis-brains.org/#access",
        "modality": {"0": "MRI"},
        "tensorImageSize": {"0": "2D"},
        "shape": [128, 128],
        "spacing": [1.0, 1.0],
        "orientation": None,
        "labels": {},
        "training": [subject(name, "{id}.nrrd") for name in sorted(order[:60])],
        "validation": [pair(*ids, "{id}.nrrd") for ids in ring(order[60:68])],
        "test": [pair(*ids, "{id}.nrrd") for ids in ring_and_more(order[68:80], 24)],
    }


OASIS_LABELS = [
    "left cerebral white matter",
    "left cerebral cortex",
    "left lateral ventricle",
    "left inferior lateral ventricle",
    "left cerebellum white matter",
    "left cerebellum cortex",
    "left thalamus",
    "left caudate",
    "left putamen",
    "left pallidum",
    "third ventricle",
    "fourth ventricle",
    "brain stem",
    "left hippocampus",
    "left amygdala",
    "left accumbens",
    "left ventral DC",
    "left vessel",
    "left choroid plexus",
    "right cerebral white matter",
    "right cerebral cortex",
    "right lateral ventricle",
    "right inferior lateral ventricle",
    "right cerebellum white matter",
    "right cerebellum cortex",
    "right thalamus",
    "right caudate",
    "right putamen",
    "right pallidum",
    "right hippocampus",
    "right amygdala",
    "right accumbens",
    "right ventral DC",
    "right vessel",
    "right choroid plexus",
]


def oasis_validation(ids: Sequence[str]) -> list[tuple[str, str]]:
    """First half of the sorted ids onto the second in order, then the second half, descending, onto the first."""
    ids = sorted(ids)
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    return [*zip(first, second, strict=True), *zip(reversed(second), first, strict=True)]


def oasis() -> dict[str, Any]:
    """The study's 300/30/84 subjects; ``test`` is its 200 pairs, of which the shorter lists are parts."""
    known = facts("oasis")
    files = ("OASIS_OAS1_{id}_MR1/aligned_norm.nii.gz", "OASIS_OAS1_{id}_MR1/aligned_seg35.nii.gz")
    return {
        "name": "oasis",
        "description": "T1 brain MRI of 414 people, skull-stripped, affinely aligned, 35 labels (neurite-oasis v1.0)",
        "source": "https://github.com/adalca/medical-datasets/blob/master/neurite-oasis.md (neurite-oasis.v1.0.tar), "
        "or OASIS of https://learn2reg.grand-challenge.org",
        "reference": "Marcus et al., Journal of Cognitive Neuroscience 2007; Hoopes et al., HyperMorph, IPMI 2021",
        "split": STUDY,
        "licence": "OASIS data use agreement, https://www.oasis-brains.org/#access",
        "modality": {"0": "MRI"},
        "tensorImageSize": {"0": "3D"},
        "shape": [160, 192, 224],
        "spacing": [1.0, 1.0, 1.0],
        "orientation": None,
        "labels": {"0": "background"} | {str(value): name for value, name in enumerate(OASIS_LABELS, start=1)},
        "layouts": {
            "neurite": {"image": [files[0]], "label": [files[1]]},
            "learn2reg": {
                "image": ["imagesTr/OASIS_{id}_0000.nii.gz"],
                "label": ["labelsTr/OASIS_{id}_0000.nii.gz"],
                "shape": None,
            },
            "study": {"image": ["{split}/img{id}.nii.gz"], "label": ["{split}/seg{id}.nii.gz"], "shape": None},
        },
        "training": [subject(name, *files) for name in known["training"]],
        "validation": [pair(*ids, *files) for ids in oasis_validation(known["validation_subjects"])],
        "test": [pair(*ids, *files) for ids in known["test_200"]],
        "test_100": [pair(*ids, *files) for ids in known["test_100"]],
        "test_020": [pair(*ids, *files) for ids in known["test_020"]],
    }


def lumir() -> dict[str, Any]:
    """LUMIR 2024's training images and validation pairs, and our nested smaller training sets."""
    training = [f"LUMIRMRI_{number:04d}_0000" for number in range(3384)]
    fixed = [*range(3455, 3484), *range(3485, 3494)]
    validation = [(f"LUMIRMRI_{number:04d}_0000", f"LUMIRMRI_{number - 1:04d}_0000") for number in fixed]
    order = shuffled(training)
    evaluated = facts("lumir")["labels"]
    return {
        "name": "lumir",
        "description": "T1 brain MRI from OpenBHB, skull-stripped, affinely aligned, intensities 0 to 255 (LUMIR 2024)",
        "source": "https://learn2reg.grand-challenge.org, https://github.com/JHU-MedImage-Reg/LUMIR_L2R",
        "reference": "Chen et al., LUMIR, Learn2Reg 2024; Dufumier et al., OpenBHB, NeuroImage 2022",
        "licence": "CC BY 4.0",
        "modality": {"0": "MRI"},
        "tensorImageSize": {"0": "3D"},
        "tensorImageShape": {"0": [160, 224, 192]},
        "shape": [160, 224, 192],
        "spacing": [1.0, 1.0, 1.0],
        "orientation": None,
        "labels": {str(value): "background" if value == 0 else f"label {value}" for value in evaluated},
        "evaluation_labels": evaluated,
        "note": "The first 29 validation pairs are scored by overlap, the last 9 by landmarks; neither is public. "
        "training_sizes: prefixes of numpy's RandomState(0) permutation, as load_cohort(..., train_count=n) gives.",
        "training": [subject(name, "imagesTr/{id}.nii.gz") for name in training],
        "validation": [pair(*ids, "imagesVal/{id}.nii.gz") for ids in validation],
        "test": [],
        "training_sizes": {str(size): order[:size] for size in LUMIR_SIZES},
    }


ORGANS = [
    "spleen",
    "right kidney",
    "left kidney",
    "gall bladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic vein",
    "pancreas",
    "adrenal gland 1",
    "adrenal gland 2",
]


def abdomen_ct() -> dict[str, Any]:
    """The study's 30/10/10 subjects; 20 training subjects have no labels."""
    known = facts("abdomen_ct")
    labelled = set(known["training_labelled"])

    def files(split: str, with_label: bool = True) -> tuple[str, str | None]:
        return f"{split}/img{{id}}.nii.gz", f"{split}/seg{{id}}.nii.gz" if with_label else None

    return {
        "name": "abdomen_ct",
        "description": "Abdominal CT of 50 people, affinely aligned, 13 organs in 30 of them (Learn2Reg 2020 task 3)",
        "source": "https://learn2reg.grand-challenge.org/Datasets (task 3 of 2020), from Beyond the Cranial Vault, "
        "https://www.synapse.org/Synapse:syn3193805",
        "reference": "Xu et al., IEEE Transactions on Biomedical Engineering 2016; Hering et al., Learn2Reg, TMI 2022",
        "split": STUDY,
        "licence": "terms of Beyond the Cranial Vault, see the licence file of the Learn2Reg archive",
        "modality": {"0": "CT"},
        "tensorImageSize": {"0": "3D"},
        "shape": [192, 160, 256],
        "spacing": [2.0, 2.0, 2.0],
        "orientation": None,
        "note": "Hounsfield units: clip to [-1000, 1000], scale to [0, 1]. Subject ids are those of the 2020 release; "
        "the later AbdomenCTCT_XXXX files are numbered otherwise. Labels 12 and 13 are the adrenal glands.",
        "labels": {"0": "background"} | {str(value): name for value, name in enumerate(ORGANS, start=1)},
        "layouts": {
            "study": {"image": ["{split}/img{id}.nii.gz"], "label": ["{split}/seg{id}.nii.gz"]},
            "learn2reg_2020": {
                "image": ["Training/img/img{id}.nii.gz", "Testing/img/img{id}.nii.gz"],
                "label": ["Training/label/label{id}.nii.gz"],
            },
        },
        "training": [subject(name, *files("train", name in labelled)) for name in known["training"]],
        "validation": [pair(*ids, *files("val")) for ids in known["validation"]],
        "test": [pair(*ids, *files("test")) for ids in known["test"]],
    }


# FreeSurfer's colour table. Left and right differ by a constant for most structures.
FREESURFER = {
    0: "unknown",
    **{2: "left cerebral white matter", 3: "left cerebral cortex", 4: "left lateral ventricle"},
    **{5: "left inferior lateral ventricle", 7: "left cerebellum white matter", 8: "left cerebellum cortex"},
    **{10: "left thalamus", 11: "left caudate", 12: "left putamen", 13: "left pallidum", 14: "third ventricle"},
    **{15: "fourth ventricle", 16: "brain stem", 17: "left hippocampus", 18: "left amygdala", 24: "CSF"},
    **{26: "left accumbens", 28: "left ventral DC", 30: "left vessel", 31: "left choroid plexus"},
    **{41: "right cerebral white matter", 42: "right cerebral cortex", 43: "right lateral ventricle"},
    **{44: "right inferior lateral ventricle", 46: "right cerebellum white matter", 47: "right cerebellum cortex"},
    **{49: "right thalamus", 50: "right caudate", 51: "right putamen", 52: "right pallidum", 53: "right hippocampus"},
    **{54: "right amygdala", 58: "right accumbens", 60: "right ventral DC", 62: "right vessel"},
    **{63: "right choroid plexus", 72: "fifth ventricle", 77: "white matter hypointensities"},
    **{80: "non-white-matter hypointensities", 85: "optic chiasm", 251: "posterior corpus callosum"},
    **{252: "mid-posterior corpus callosum", 253: "central corpus callosum", 254: "mid-anterior corpus callosum"},
    255: "anterior corpus callosum",
}
# Positions, in the sorted codes, of the 30 structures that published IXI results average over.
IXI_EVALUATED = (1, 2, 3, *range(5, 17), 18, *range(20, 24), *range(25, 33), 34, 36)


def ixi() -> dict[str, Any]:
    """403/58/115 subjects and an atlas, by folder: the ids are known to those who have the files only."""
    codes = sorted(FREESURFER)
    return {
        "name": "ixi",
        "description": "T1 brain MRI, skull-stripped, affinely aligned, in [0, 1], FreeSurfer labels; one atlas",
        "source": "https://github.com/junyuchen245/TransMorph_Transformer_for_Medical_Image_Registration "
        "(IXI/TransMorph_on_IXI.md: IXI_data, pickles); then python -m common.data.ixi IXI_data TARGET",
        "reference": "https://brain-development.org/ixi-dataset; Chen et al., TransMorph, Medical Image Analysis 2022",
        "licence": "CC BY-SA 3.0",
        "modality": {"0": "MRI"},
        "tensorImageSize": {"0": "3D"},
        "shape": [160, 192, 224],
        "spacing": [1.0, 1.0, 1.0],
        "orientation": None,
        "note": "The pickles have no header: the converter places every volume with an identity affine.",
        "labels": {str(code): FREESURFER[code] for code in codes},
        "evaluation_labels": [codes[position] for position in IXI_EVALUATED],
        "atlas": {"id": "atlas", "image": "atlas.nii.gz", "label": "atlas_label.nii.gz"},
        "training": {"images": "imagesTr", "labels": "labelsTr", "count": 403},
        "validation": {"images": "imagesVal", "labels": "labelsVal", "count": 58, "moving": "atlas"},
        "test": {"images": "imagesTs", "labels": "labelsTs", "count": 115, "moving": "atlas"},
    }


def one_folder_a_subject(name: str) -> dict[str, Any]:
    """Data behind an application or a registration: which subjects there are is known to those who have the files."""
    return facts(name)


SPLITS = {
    "hippocampus": hippocampus,
    "oasis2d": oasis2d,
    "oasis": oasis,
    "lumir": lumir,
    "abdomen_ct": abdomen_ct,
    "ixi": ixi,
    **{name: partial(one_folder_a_subject, name) for name in ("acdc", "camcan", "mnms", "ukbb", "ukbb_brain")},
    "autopet": partial(facts, "autopet"),
}


def text(split: dict[str, Any]) -> str:
    """JSON with one entry a line: readable, and a change is one line in a diff."""
    lines = []
    for key, value in split.items():
        shown = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            shown = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n ]"
        elif isinstance(value, dict) and any(isinstance(entry, (list, dict)) for entry in value.values()):
            shown = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        lines.append(f" {json.dumps(key)}: {shown}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check all files; the exit status is the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
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
