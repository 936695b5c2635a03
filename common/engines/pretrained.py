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
"""From pretraining to fine-tuning: only the encoder is carried over."""

from __future__ import annotations

from pathlib import Path

from common.handlers import load_checkpoint
from common.networks import Encoder, load_encoder_weights

__all__ = ["load_pretrained_encoder"]


def load_pretrained_encoder(encoder: Encoder | None, path: str | Path) -> Encoder:
    """Start an encoder from the weights that pretraining left; decoder and heads stay as initialised.

    Args:
        encoder: of the network to fine-tune, any window size (bias tables are resampled to it).
        path: ``model.pt`` or ``last.pt`` of pretraining, or a file of ``scripts/convert.py``.

    Returns:
        the same encoder.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the weights are of another encoder (names the first that differs), or the network has none.
    """
    if encoder is None:
        raise ValueError(f"this network has no encoder that {path} could start; leave `pretrained` out")
    content = load_checkpoint(path)
    weights = content["model"] if isinstance(content.get("model"), dict) else content
    try:
        load_encoder_weights(encoder, weights)
    except ValueError as error:
        raise ValueError(f"the encoder in {path} does not fit `encoder` and `preset` of this run: {error}") from error
    return encoder
