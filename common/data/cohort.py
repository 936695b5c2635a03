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
"""Cohorts: who is in training, validation and test, as absolute paths, from a name or from any dataset JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data.atlas import choose_atlas, pairs_to_atlas
from common.data.datalist import Entry, is_pair, parse_labels, parse_pairs, parse_subjects, read_json
from common.data.entry_reader import EntryReader
from common.data.layouts import list_folders, use_layout
from common.data.places import EMBEDDED, default_folder, json_path, require_files
from common.data.subject_folders import list_subject_folders
from common.data.subjects import split_pairs
from common.data.subsets import hold_out_pairs, nested_subset, set_pairs_aside
from common.data.truth import TRUTH_KEYS

__all__ = ["Cohort", "cohort_from_json", "load_cohort"]

logger = logging.getLogger(__name__)

_VALIDATION = ("validation", "val", "registration_val", "validation_paired_images")
_TEST = ("test", "registration_test", "test_paired_images")


@dataclass
class Cohort:
    """A data set ready for :class:`common.data.PairDataset`.

    Attributes:
        name: of the data set.
        training: subjects with ``id``, ``image`` and, where there is one, ``label`` and ``mask``; absolute paths. Where
            an image has several channels, ``image`` is the first one's file and ``channels`` lists those of the others.
        validation, test: pairs with ``moving``, ``fixed``, ``moving_id``, ``fixed_id`` and, where known,
            ``moving_label``, ``fixed_label``, ``moving_mask``, ``fixed_mask``, ``moving_channels``,
            ``fixed_channels``, and what :mod:`common.data.truth` reads.
        training_pairs: pairs, where the JSON lists some for training (Learn2Reg's ``training_paired_images``).
        labels: name by value; without entries when the JSON has none.
        shape: of every image, where the JSON states one.
        spacing: of every image in mm, where the JSON states one.
        orientation: axis codes of every image such as ``"RAS"``, where the JSON states them.
        licence, source: terms of use and where to get the data.
        dataset_dir: the folder that relative paths start from.
        atlas: the subject that serves as atlas, where the JSON names one.
        evaluation_labels: the label values that published results average over; all foreground labels by default.
        meta: the JSON without its lists.
    """

    name: str
    training: list[Entry] = field(default_factory=list)
    validation: list[Entry] = field(default_factory=list)
    test: list[Entry] = field(default_factory=list)
    training_pairs: list[Entry] = field(default_factory=list)
    labels: dict[int, str] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    orientation: str | None = None
    licence: str = ""
    source: str = ""
    dataset_dir: str = ""
    atlas: Entry | None = None
    evaluation_labels: list[int] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def spatial_dims(self) -> int | None:
        """2 or 3, where the JSON tells it by ``shape`` or ``tensorImageSize``."""
        if self.shape is not None:
            return len(self.shape)
        stated = str(self.meta.get("tensorImageSize", ""))
        return next((dims for dims in (2, 3) if f"{dims}D" in stated.upper()), None)

    @property
    def stacks(self) -> bool:
        """Whether an image is a stack of slices (X, Y, Z) that are registered one by one, as in short-axis cine."""
        return bool(self.meta.get("stacks", False))

    @property
    def label_map(self) -> dict[int, int]:
        """The label of each value in the files, where the JSON merges some; what it leaves out is background."""
        merged: Mapping[str, Sequence[int]] = self.meta.get("label_map", {})
        return {int(value): int(label) for label, values in merged.items() for value in values}

    @property
    def foreground_labels(self) -> list[int]:
        """The label values without 0, the background."""
        return [value for value in self.labels if value != 0]

    def files(self) -> list[str]:
        """Every file that the cohort names, once, in order."""
        sides = (f"{role}{key}" for role in ("moving", "fixed") for key in ("", "_label", "_mask"))
        keys = ("image", "label", "mask", *sides, *TRUTH_KEYS)
        entries = [
            *self.training,
            *self.training_pairs,
            *self.validation,
            *self.test,
            *([self.atlas] if self.atlas else []),
        ]
        single = (entry[key] for entry in entries for key in keys if key in entry)
        lists = ("channels", "moving_channels", "fixed_channels")
        further = (path for entry in entries for key in lists for path in entry.get(key, ()))
        return list(dict.fromkeys([*single, *further]))


def load_cohort(
    name_or_json: str | Path = "synthetic",
    dataset_dir: str | Path | None = None,
    *,
    datalist: str | Path | None = None,
    train_fraction: float | None = None,
    train_count: int | None = None,
    seed: int = 0,
    test_list: str | None = None,
    download: bool = False,
    must_exist: bool = True,
    spatial_dims: int | None = None,
    hold_out: float | None = None,
    atlas: str | bool | None = None,
    **synthetic: Any,
) -> Cohort:
    """Load a cohort by name or from a dataset JSON.

    Args:
        name_or_json: ``"synthetic"``, ``"cine"``, ``"sliding"``, ``"contrast"``, a name that has a JSON in
            ``data_splits/`` (``"hippocampus"``, ``"oasis2d"``, ``"oasis"``, ``"lumir"``, ``"abdomen_ct"``,
            ``"autopet"``, ``"ixi"``, ``"acdc"``, ``"mnms"``, ``"ukbb"``, ``"ukbb_brain"``, ``"camcan"``), or the path
            of a dataset JSON.
        dataset_dir: folder of the data. Default for a JSON's path: the JSON's own folder, as Learn2Reg has it; for
            the embedded cohorts and downloads: ``~/.cache/warpzoo`` (``XDG_CACHE_HOME`` is respected).
        datalist: a dataset JSON that takes the place of the name's own.
        train_fraction: part of the training subjects, in (0, 1]; see :func:`common.data.subsets.nested_subset`.
        train_count: number of training subjects, or of training pairs where the JSON lists nothing but pairs.
        seed: of the training subset. It does not change the synthetic cohort: runs with different seeds should differ
            in what they draw, not in the data that they are measured on.
        test_list: which of the JSON's lists is ``test``, such as ``"test_020"``. Default: ``"test"``.
        download: fetch the data when they are missing (``"hippocampus"`` only).
        must_exist: check at once that every file is there.
        spatial_dims: 2 or 3: which of the synthetic, sliding and contrast cohorts; other cohorts have to be of this
            dimension. Stacks of slices are of dimension 2 where slices are registered one by one, and volumes where it
            is 3. Default: 3 for ``"synthetic"``, 2 for ``"sliding"``, ``"contrast"`` and stacks, any for others.
        hold_out: part of the training subjects that become validation pairs where the JSON lists none, always the same.
        atlas: register everyone to one subject: its id, or True for the one that the JSON has or suggests. It takes no
            part in training otherwise, and ``validation`` and ``test`` become pairs of their subjects (moving) and the
            atlas (fixed). Training pairs are then :class:`common.data.PairDataset`'s with strategy ``"atlas"`` and
            ``atlas_is="fixed"``. Default: pairs as they are listed.
        synthetic: ``anatomy_seed``, ``spatial_size``, ``magnitude`` and ``contrast`` of an embedded cohort, see
            :func:`common.data.synthetic.synthetic_cohort`, :func:`common.data.cine.cine_cohort`,
            :func:`common.data.sliding.sliding_cohort` and :func:`common.data.contrast.contrast_cohort`.

    Returns:
        the cohort.

    Raises:
        FileNotFoundError: when the folder or files are missing; says which, and where to get them.
        ValueError: for an unknown name, an unusable JSON, another dimension or an impossible subset.
        TypeError: for options that only the synthetic cohort has.
    """
    if str(name_or_json) in EMBEDDED and datalist is None:
        dims = {} if spatial_dims is None else {"spatial_dims": spatial_dims}
        cohort = _embedded(str(name_or_json))(dataset_dir, **dims, **synthetic)
    elif synthetic:
        raise TypeError(f"options {sorted(synthetic)} are for embedded cohorts, not for '{name_or_json}'")
    else:
        path = Path(datalist) if datalist is not None else json_path(name_or_json)
        if dataset_dir is None:
            dataset_dir = default_folder(str(name_or_json), path, download)
        if download:
            from common.data.download import download_dataset

            dataset_dir = download_dataset(str(name_or_json), dataset_dir)
        cohort = cohort_from_json(path, dataset_dir, test_list=test_list)
        if cohort.stacks and spatial_dims == 3:
            cohort.meta = {**cohort.meta, "stacks": False, "tensorImageSize": {"0": "3D"}}
        if spatial_dims is not None and cohort.spatial_dims not in (None, spatial_dims):
            raise ValueError(f"cohort '{cohort.name}' is {cohort.spatial_dims}-D, spatial_dims is {spatial_dims}")
    if hold_out is not None and not cohort.validation:
        _set_aside(cohort, hold_out)
    if atlas is not None and atlas is not False:
        _register_to(cohort, atlas)
    # A cohort of pairs alone, such as the two phases of a heart, is made smaller by leaving out pairs.
    name = "training" if cohort.training or not cohort.training_pairs else "training_pairs"
    at_least = 2 if name == "training" and not cohort.atlas else 1
    subset = nested_subset(
        getattr(cohort, name), fraction=train_fraction, count=train_count, seed=seed, at_least=at_least
    )
    setattr(cohort, name, subset)
    if must_exist:
        require_files(cohort.name, cohort.files(), cohort.dataset_dir, cohort.meta)
    return cohort


def _embedded(name: str) -> Callable[..., Cohort]:
    """The maker of a cohort that needs no files; imported late, since it imports this module."""
    from common.data.cine import cine_cohort
    from common.data.contrast import contrast_cohort
    from common.data.sliding import sliding_cohort
    from common.data.synthetic import synthetic_cohort

    makers = {
        "synthetic": synthetic_cohort,
        "cine": cine_cohort,
        "sliding": sliding_cohort,
        "contrast": contrast_cohort,
    }
    return makers[name]


def _register_to(cohort: Cohort, wanted: str | bool) -> None:
    """Make one subject the atlas, and pairs with it of validation and test."""
    if not cohort.training:
        raise ValueError(f"cohort '{cohort.name}' has pairs of one subject's scans, of which none can be an atlas")
    others = split_pairs([*cohort.validation, *cohort.test])[0]
    suggested = cohort.meta.get("suggested_atlas")
    cohort.atlas = choose_atlas(wanted, cohort.atlas, suggested, [*cohort.training, *others], cohort.name)
    cohort.training = [entry for entry in cohort.training if entry["image"] != cohort.atlas["image"]]
    cohort.validation = pairs_to_atlas(cohort.validation, cohort.atlas)
    cohort.test = pairs_to_atlas(cohort.test, cohort.atlas)


def _set_aside(cohort: Cohort, fraction: float) -> None:
    """Make validation pairs of a part of the training data, always the same."""
    if cohort.training or not cohort.training_pairs:
        cohort.training, cohort.validation = hold_out_pairs(cohort.training, fraction, seed=0)  # type: ignore[assignment]
    else:
        cohort.training_pairs, cohort.validation = set_pairs_aside(cohort.training_pairs, fraction, seed=0)
    names = [pair["moving_id"] for pair in cohort.validation]
    logger.warning("cohort '%s' lists no validation pairs: %s are set aside for them", cohort.name, names)


def cohort_from_json(path: str | Path, dataset_dir: str | Path, *, test_list: str | None = None) -> Cohort:
    """Read any accepted dataset JSON; no image is opened.

    Where the JSON knows several ``layouts`` of its files, the first one whose files are there is taken. Where a list
    is a rule (``{"images": folder, "labels": folder, "count": n}``), the folder's files are listed in natural order.
    Lists of single images under ``validation`` or ``test`` become consecutive pairs (the second is registered to the
    first, the third to the second), which is Learn2Reg's custom.

    Args:
        path: of the JSON.
        dataset_dir: folder that its relative paths start from.
        test_list: key of the list to use as test.

    Raises:
        FileNotFoundError, ValueError: when the JSON is missing or unusable, or a folder has not the files it should.
    """
    content = read_json(path)
    if not {"training", "training_paired_images", "subject_folders"} & set(content):
        raise ValueError(f"{path}: expected a 'training' list, found the keys {list(content)}")
    if test_list is not None and test_list not in content:
        raise ValueError(
            f"{path} has no list '{test_list}'; it has {[k for k, v in content.items() if isinstance(v, list)]}"
        )
    root = Path(dataset_dir).expanduser().resolve()
    if content.get("folder") and (root / content["folder"]).is_dir():
        # What an archive unpacks to; both it and the folder around it are a fair answer to "where are the data?".
        root = root / content["folder"]
    content = use_layout(list_folders(list_subject_folders(content, root), root), root)
    training = content.get("training", [])
    raw_subjects = [entry for entry in training if not is_pair(entry)]
    raw_pairs = [entry for entry in training if is_pair(entry)] + content.get("training_paired_images", [])
    reader = EntryReader(content, root, str(path))
    subjects = parse_subjects(raw_subjects, f"{path}: training")
    pairs = {
        "training_pairs": parse_pairs(raw_pairs, f"{path}: training pairs"),
        "validation": reader.pairs(_first(content, _VALIDATION)),
        "test": reader.pairs((test_list, content[test_list]) if test_list else _first(content, _TEST)),
    }
    atlas = parse_subjects([content["atlas"]], f"{path}: atlas") if content.get("atlas") else []
    reader.name_files([*subjects, *atlas], [p for listed in pairs.values() for p in listed])
    labels = parse_labels(content.get("labels"))
    return Cohort(
        name=str(content.get("name", Path(path).stem)),
        training=[reader.subject(entry) for entry in subjects],
        labels=labels,
        evaluation_labels=list(content.get("evaluation_labels", [value for value in labels if value != 0])),
        shape=_per_image(content.get("shape", content.get("tensorImageShape")), int),
        spacing=_per_image(content.get("spacing"), float),
        orientation=content.get("orientation"),
        licence=str(content.get("licence", content.get("license", ""))),
        source=str(content.get("source", content.get("reference", ""))),
        dataset_dir=str(root),
        atlas=reader.subject(atlas[0]) if atlas else None,
        meta={key: value for key, value in content.items() if not isinstance(value, list)},
        **{name: [reader.pair(entry) for entry in listed] for name, listed in pairs.items()},
    )


def _first(content: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    return next(((name, content[name]) for name in names if content.get(name)), (names[0], []))


def _per_image(value: Any, kind: type) -> Any:
    """A shape or spacing as a tuple; Learn2Reg has one for each modality, and the same for all of them."""
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    return tuple(kind(number) for number in value) if value else None
