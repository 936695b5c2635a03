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
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image

from common.handlers import PictureSaver
from common.handlers.pictures import _item
from common.spatial import warp


def output(dims: int = 2, **more: Any) -> dict[str, Any]:
    shape = (14, 12, 10)[:dims]
    moving, ddf = torch.rand(2, 1, *shape), torch.ones(2, dims, *shape)
    return {"moving": moving, "fixed": moving, "moved": warp(moving, ddf), "ddf": ddf, **more}


def test_names_counts_and_epochs(tmp_path: Path) -> None:
    ids = {"moving_id": ["sub-01/a", "b"], "fixed_id": ["c d", "../e"]}
    engine = Engine(lambda e, b: output(**ids))
    PictureSaver(tmp_path / "pictures", every=2, count=3).attach(engine)
    engine.run([0, 1], max_epochs=2)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["epoch_0002_b_to_e.png", "epoch_0002_sub-01_a_to_c_d.png"]
    pixels = np.asarray(Image.open(tmp_path / "pictures" / names[0]))
    assert pixels.shape[2] == 3 and pixels.std() > 10


def test_pairs_without_ids(tmp_path: Path) -> None:
    engine = Engine(lambda e, b: output())
    PictureSaver(tmp_path, count=3).attach(engine)
    engine.run([0, 1])
    assert len(list(tmp_path.iterdir())) == 3


def test_no_pictures_when_none_are_asked_for(tmp_path: Path) -> None:
    engine = Engine(lambda e, b: output())
    PictureSaver(tmp_path, count=0).attach(engine)
    engine.run([0, 1])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="got 1 and -1"):
        PictureSaver(tmp_path, count=-1)


def test_affine_of_the_batch(tmp_path: Path) -> None:
    saver = PictureSaver(tmp_path)
    meta = {"affine": torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])).repeat(2, 1, 1)}
    found = saver._affine(output(3, fixed_meta=meta), 1)
    assert np.array_equal(found, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert saver._affine(output(3), 0) is None
    assert PictureSaver(tmp_path, affine=np.eye(4))._affine(output(3, fixed_meta=meta), 0)[0, 0] == 1.0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    engine = Engine(lambda e, b: {"moving": torch.zeros(1, 1, 4, 4)})
    PictureSaver(tmp_path).attach(engine)
    with pytest.raises(KeyError, match=r"\['fixed', 'ddf'\].*\['moving'\]"):
        engine.run([0])


def test_other_ranks_draw_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.handlers.pictures.is_first_rank", lambda: False)
    engine = Engine(lambda e, b: output())
    PictureSaver(tmp_path).attach(engine)
    engine.run([0])
    assert not list(tmp_path.iterdir())


def test_a_trainer_need_not_have_warped_anything(tmp_path: Path) -> None:
    given = output(2, moving_label=torch.ones(2, 1, 14, 12, dtype=torch.uint8))
    whole = _item(given, 1)
    bare = _item({name: value for name, value in given.items() if name != "moved"}, 1)
    assert torch.equal(whole["moved"], bare["moved"]) and torch.equal(bare["moved_label"], bare["moving_label"])


@pytest.mark.parametrize("kind", ["weight_map", "uncertainty"])
def test_a_map_is_drawn_where_there_is_one(kind: str, tmp_path: Path) -> None:
    for name, more in (("without", {}), ("with", {kind: torch.rand(2, 1, 14, 12)})):
        engine = Engine(lambda e, b, more=more: output(2, **more))
        PictureSaver(tmp_path / name, count=1).attach(engine)
        engine.run([0])
    plain, wider = (Image.open(next((tmp_path / name).iterdir())) for name in ("without", "with"))
    assert wider.width > plain.width and wider.height == plain.height
