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
"""Changes of intensity that a network has not seen in training: what is left of it on another scanner?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from torch import Tensor

__all__ = ["IntensityShift"]

STRENGTHS = {"gamma": 2.0, "inverted": 0.0, "noise": 0.1}
_SIDES = {"both": ("moving", "fixed"), "moving": ("moving",), "fixed": ("fixed",)}


class IntensityShift(Transform):
    """Change the intensities of a finished pair, always in the same way.

    ``"gamma"`` raises images in [0, 1] to a power, ``"inverted"`` turns x into 1 - x, the background included, and
    ``"noise"`` adds Gaussian noise and clips to [0, 1]. The noise follows from the seed and the scan's id, so a scan
    looks the same in every pair and every run. Labels and geometry stay.

    Args:
        kind: "gamma", "inverted", "noise", or None for no change.
        of: "both" images, or one of them, "moving" or "fixed".
        strength: the power (2 by default) or the standard deviation of the noise (0.1).
        seed: of the noise.

    Raises:
        ValueError: for an unknown kind or side, or a strength that is not positive.

    Example:
        >>> pair = {"moving": torch.full((1, 2, 2), 0.5), "fixed": torch.ones(1, 2, 2)}
        >>> IntensityShift("gamma", of="moving")(pair)["moving"].unique()
        tensor([0.2500])
    """

    def __init__(self, kind: str | None = None, of: str = "both", strength: float | None = None, seed: int = 0) -> None:
        if kind is not None and kind not in STRENGTHS:
            raise ValueError(f"shift must be one of {sorted(STRENGTHS)} or None, got {kind!r}")
        if of not in _SIDES:
            raise ValueError(f"the shift must be of one of {sorted(_SIDES)}, got {of!r}")
        if strength is not None and not strength > 0:
            raise ValueError(f"the strength of a shift must be positive, got {strength}")
        self.kind, self.of, self.seed = kind, of, int(seed)
        self.strength = STRENGTHS.get(kind or "", 0.0) if strength is None else float(strength)

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return the item with shifted images (C, *S)."""
        if self.kind is None:
            return dict(item)
        shifted = {role: self._shift(item[role], str(item.get(f"{role}_id", role))) for role in _SIDES[self.of]}
        return {**item, **shifted}

    def _shift(self, image: Tensor, name: str) -> Tensor:
        if self.kind == "gamma":
            return image.clamp_min(0) ** self.strength
        if self.kind == "inverted":
            return 1 - image
        draw = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        noise = torch.from_numpy(draw.standard_normal(tuple(image.shape), dtype=np.float32)).to(image)
        return (image + self.strength * noise).clamp(0, 1)
