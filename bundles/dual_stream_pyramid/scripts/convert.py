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
"""The authors' checkpoints as ours.

    python bundles/dual_stream_pyramid/scripts/convert.py SRC DST.pt --network NETWORK

| NETWORK | of whom | ours |
|---|---|---|
| dual_stream | Unsupervised-DL-DIR-Revisited, the six ``fedd*`` configurations | ``pyramid.DualStreamPyramid`` |
| vfa | yihao6/vfa | ``vfa_network.VFANetwork`` |
| sitreg | honkamj/SITReg, LUMIR configurations | ``sitreg.SITReg`` |
| transmorph | TransMorph_Transformer_for_Medical_Image_Registration, folder OASIS | ``transmorph.TransMorph`` |
| voxelmorph | LUMIR_L2R, ``VxmDense_1`` and ``VxmDense_2`` | ``common.networks.VoxelMorph(integration_steps=0)`` |

``DST.pt`` is a plain state dict. Whatever stands before the names, such as ``module.`` or the ``unet_model.`` of a
wrapper, is taken off. Sampling grids, coordinate systems and index buffers are dropped: they tie a checkpoint to an
image size. A name that is not known, and a weight that should be there and is not, are errors.
Nothing but tensors and numbers is ever unpickled. In an unpacked bundle, which has no ``bundles`` folder and ``common``
beside ``scripts``, it is ``python -m scripts.convert``.

TransMorph differs by more than names: its last layer is halved, because its authors enlarge a field at half resolution
without doubling the values and ours doubles them (see ``transmorph.py`` for what else its weights carry); its bias
tables and patch mergings are laid out anew; ``c2``, which the authors' network never reads, is dropped.

The names are those of the authors' source code, for the dual-stream family of a list of all its parameters; no
checkpoint of theirs was at hand. SITReg's are those of its present code: files of its first release have others, and
are refused. Not seen was the wrapper in which Unsupervised-DL-DIR-Revisited trains VFA: it is taken to keep VFA's own
names behind a prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from common.io.published import read_checkpoint

if __package__:
    from .conversion import NETWORKS, check_network, to_published, to_warpzoo
else:  # as a script: its folder is on the path, no package is
    from conversion import NETWORKS, check_network, to_published, to_warpzoo  # type: ignore[no-redef]

__all__ = ["NETWORKS", "convert", "read_checkpoint", "to_published", "to_warpzoo"]

logger = logging.getLogger(__name__)


def convert(source: str, destination: str, network: str, window: Sequence[int] | None = None) -> None:
    """Convert a checkpoint file of the authors.

    Args:
        source: their file.
        destination: where our state dict goes.
        network: one of ``NETWORKS``.
        window: TransMorph's attention window a,b,c, where it is neither (5, 6, 7) nor a cube.

    Raises:
        FileNotFoundError, ValueError: see ``read_checkpoint`` and ``to_warpzoo``.
    """
    check_network(network)
    state = to_warpzoo(read_checkpoint(source), network, window)
    torch.save(state, destination)
    logger.info(
        "%s: %s, %d weights, %d numbers", destination, network, len(state), sum(map(Tensor.numel, state.values()))
    )


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(convert)
