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

import itertools
from collections.abc import Sequence

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask
from torch import Tensor, nn

from common.networks import SwinEncoder
from common.networks.swin import SwinBlock, SwinStage, merge_windows, partition_windows, shift_mask


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _randomise(module: nn.Module) -> None:
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)


@pytest.mark.parametrize(("window", "count"), [((2, 3, 3), 11_853_528), (3, 11_858_728), (2, 11_848_536)])
def test_parameters_of_the_published_encoder(window: int | tuple[int, ...], count: int) -> None:
    assert _count(SwinEncoder(window_size=window)) == count


def test_windows_are_cut_row_major_and_put_back() -> None:
    x = torch.arange(24.0).view(1, 4, 6, 1)
    windows = partition_windows(x, (2, 3))
    assert windows[..., 0].tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]
    torch.testing.assert_close(merge_windows(windows, (2, 3), (4, 6)), x)


def test_cutting_and_merging_are_inverse_in_3d() -> None:
    x = torch.randn(2, 4, 6, 2, 5)
    windows = partition_windows(x, (2, 3, 1))
    assert windows.shape == (2 * 2 * 2 * 2, 6, 5)
    torch.testing.assert_close(merge_windows(windows, (2, 3, 1), (4, 6, 2)), x)


def test_shift_mask_by_hand() -> None:
    # Eight tokens, window 4, roll 2: the last window holds 6, 7 and, wrapped around, 0, 1.
    mask = shift_mask((8,), (4,), (2,), torch.device("cpu"))
    assert torch.count_nonzero(mask[0]) == 0
    expected = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]) * -100
    torch.testing.assert_close(mask[1], expected)


def _slow_block(block: SwinBlock, x: Tensor) -> Tensor:
    """A Swin block token by token: who meets whom is found from where the tokens come from."""
    size, window, channels = x.shape[:-1], block.window_size, x.shape[-1]
    shift = block.shift or (0,) * len(window)
    padded = [n + -n % w for n, w in zip(size, window, strict=True)]
    attn, heads = block.attn, block.attn.num_heads
    tokens: dict[tuple[int, ...], Tensor] = {}
    for p in itertools.product(*map(range, padded)):
        inside = all(c < n for c, n in zip(p, size, strict=True))
        tokens[p] = attn.qkv(block.norm1(x[p])) if inside else torch.zeros(3 * channels)
    out = x.clone()
    for p in itertools.product(*map(range, size)):
        rolled = [(c - s) % n for c, s, n in zip(p, shift, padded, strict=True)]
        scores, values = [], []
        for q in itertools.product(*map(range, padded)):
            other = [(c - s) % n for c, s, n in zip(q, shift, padded, strict=True)]
            if any(a // w != b // w for a, b, w in zip(rolled, other, window, strict=True)):
                continue
            # Both sides of the seam that the roll closed never meet.
            apart = any((a < n - s) != (b < n - s) for a, b, n, s in zip(rolled, other, padded, shift, strict=True))
            place = tuple(a - b + w - 1 for a, b, w in zip(rolled, other, window, strict=True))
            bias = attn.relative_position_bias_table[(slice(None), *place)]
            query, key = tokens[p][:channels].view(heads, -1), tokens[q][channels : 2 * channels].view(heads, -1)
            scores.append((query * key).sum(1) / key.shape[1] ** 0.5 + bias - (100.0 if apart else 0.0))
            values.append(tokens[q][2 * channels :].view(heads, -1))
        weights = torch.stack(scores).softmax(0)
        out[p] = x[p] + attn.proj((weights[..., None] * torch.stack(values)).sum(0).flatten())
    return out + block.mlp(block.norm2(out))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((4, 4), (2, 2)),
        ((5, 3), (2, 3)),
        ((2, 3), (4, 4)),
        ((4, 4), (4, 4)),
        ((3, 2, 5), (2, 3, 3)),
        ((1, 2, 2), (2, 2, 2)),
    ],
)
def test_a_block_is_what_the_definition_says(size: Sequence[int], window: Sequence[int], shifted: bool) -> None:
    """Also where the map is smaller than the window, or exactly one window."""
    block = SwinBlock(8, 2, window, shifted=shifted).eval()
    _randomise(block)
    x = torch.randn(2, *size, 8)
    stage = SwinStage(8, 2, window, [0.0], 4.0, False).eval()
    stage.blocks[0] = block
    with torch.no_grad():
        expected = torch.stack([_slow_block(block, item) for item in x])
        torch.testing.assert_close(stage(x), expected, atol=1e-4, rtol=1e-4)


def test_tokens_from_both_ends_of_the_image_do_not_meet() -> None:
    block = SwinBlock(8, 2, (4, 4), shifted=True).eval()
    _randomise(block)
    mask = shift_mask((8, 8), (4, 4), (2, 2), torch.device("cpu"))
    x = torch.randn(1, 8, 8, 8)
    changed = x.clone()
    changed[0, 7, 7] = torch.randn(8)
    with torch.no_grad():
        moved = (block(changed, mask) - block(x, mask)).abs().sum(-1)[0] > 1e-6
        unmasked = (block(changed, torch.zeros_like(mask)) - block(x, torch.zeros_like(mask))).abs().sum(-1)[0] > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[6:, 6:] = True
    assert torch.equal(moved, expected)
    assert unmasked[0, 0]  # the corner across the seam: what the mask is for


@pytest.mark.parametrize(("window", "shift"), [((2, 3, 3), (1, 1, 1)), ((5, 6, 7), (2, 3, 3)), ((1, 3, 3), None)])
def test_shift_is_half_a_window_or_none(window: Sequence[int], shift: tuple[int, ...] | None) -> None:
    assert SwinBlock(8, 2, window, shifted=True).shift == shift
    assert SwinBlock(8, 2, window, shifted=False).shift is None


@pytest.mark.parametrize(("size", "window"), [((8, 6), (2, 3)), ((6, 7, 8), (2, 3, 3))])
def test_a_stage_is_monais_where_the_map_is_larger_than_the_window(size: Sequence[int], window: Sequence[int]) -> None:
    ours = SwinStage(12, 3, window, [0.0] * 3, 4.0, False).eval()
    _randomise(ours)
    shift = tuple(w // 2 for w in window)
    mask = compute_mask([n + -n % w for n, w in zip(size, window, strict=True)], window, shift, "cpu")
    x = torch.randn(2, *size, 12)
    expected = x
    for j, block in enumerate(ours.blocks):
        theirs = SwinTransformerBlock(12, 3, window, shift if j % 2 else (0,) * len(size), qkv_bias=False).eval()
        state = {k: v.flatten(1).T if "table" in k else v for k, v in block.state_dict().items()}
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert missing == ["attn.relative_position_index"]
        assert not unexpected
        with torch.no_grad():
            expected = theirs(expected, mask)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 32, 32), (17, 30, 5), (4, 4, 4), (1, 9, 3), (33, 20), (16, 48)])
def test_any_size_runs(size: Sequence[int], device: torch.device) -> None:
    encoder = SwinEncoder(len(size), embed_dim=8, depths=(2, 2, 1), num_heads=(2, 2, 2)).to(device)
    maps = encoder(torch.rand(2, 2, *size, device=device))
    expected = [-(-n // 4) for n in size]
    for i, level in enumerate(maps):
        assert level.shape == (2, 8 * 2**i, *expected)
        assert torch.isfinite(level).all()
        expected = [(n + 1) // 2 for n in expected]


def test_every_parameter_learns() -> None:
    encoder = SwinEncoder(2, embed_dim=8, depths=(2, 2, 2), num_heads=(2, 2, 2), window_size=2, drop_path=0.0)
    sum(level.cos().sum() for level in encoder(torch.rand(1, 2, 32, 32))).backward()
    without = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_weights_do_not_depend_on_the_image_size() -> None:
    encoder = SwinEncoder(2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=3)
    encoder(torch.rand(1, 2, 32, 32))
    encoder(torch.rand(1, 2, 19, 45))
    assert set(encoder.state_dict()) == {n for n, _ in encoder.named_parameters()}


def test_checkpointing_changes_nothing() -> None:
    x = torch.rand(1, 2, 32, 32)
    options = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "drop_path": 0.0}
    plain, frugal = SwinEncoder(2, **options), SwinEncoder(2, use_checkpoint=True, **options)
    frugal.load_state_dict(plain.state_dict())
    for encoder in (plain, frugal):
        sum(level.cos().sum() for level in encoder(x)).backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_stochastic_depth_grows_over_all_blocks() -> None:
    encoder = SwinEncoder()
    rates = [block.drop_path.drop_prob for stage in encoder.stages for block in stage.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, 13))


def test_items_of_a_batch_do_not_meet() -> None:
    encoder = SwinEncoder(2, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=3).eval()
    x = torch.rand(3, 2, 40, 24)
    with torch.no_grad():
        for together, alone in zip(encoder(x), encoder(x[1:2]), strict=True):
            torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_bfloat16_autocast_is_close(device: torch.device) -> None:
    encoder = SwinEncoder(3, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=2).to(device).eval()
    x = torch.rand(1, 2, 16, 24, 16, device=device)
    with torch.no_grad():
        exact = encoder(x)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            rough = encoder(x)
    for a, b in zip(exact, rough, strict=True):
        torch.testing.assert_close(a, b.float(), atol=0.15, rtol=0)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        SwinEncoder(depths=(2, 2), num_heads=(2,))
    with pytest.raises(ValueError, match="10 channels cannot be divided among 4 heads"):
        SwinEncoder(embed_dim=10, num_heads=(4, 4, 4))
    with pytest.raises(ValueError, match="window_size needs"):
        SwinEncoder(2, window_size=(2, 3, 3))
