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
"""Both sides of the spatial comparisons compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import spatial


@pytest.mark.parametrize(
    ("ours", "theirs", "args"),
    [
        (spatial.our_warp, spatial.their_warp, (24, True)),
        (spatial.our_warp, spatial.their_warp, (24, False)),
        (spatial.our_integrate, spatial.their_integrate, (24,)),
    ],
)
def test_both_sides_compute_the_same(ours, theirs, args):
    """A comparison of speed is one only between equal results, forward and backward."""
    torch.manual_seed(1)
    (mine, my_gradients) = ours(*args)()
    torch.manual_seed(1)
    (other, their_gradients) = theirs(*args)()
    torch.testing.assert_close(mine, other, atol=2e-5, rtol=0)
    for a, b in zip(my_gradients, their_gradients, strict=True):
        assert (a - b).abs().mean() < 1e-2 * b.abs().mean()


def test_both_sides_move_labels_alike():
    agree = spatial.our_labels(24, 35)() == spatial.their_labels(24, 35)()
    assert agree.float().mean() > 0.999  # ties and rounding aside
