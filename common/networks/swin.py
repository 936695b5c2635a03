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
"""The Swin transformer encoder of TransMorph, for 2-D and 3-D pairs of any size.

The pyramid of Chen et al., "TransMorph: Transformer for unsupervised medical image registration" (Medical Image
Analysis 2022), in the three-level form of Chen et al., arXiv 2505.24167. Patch embedding, patch merging and the MLP are
MONAI's. Its window attention is not used: it shrinks the window, and drops the shift, where a feature map is no larger
than the window, while the published encoder pads; the two differ on small images.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.blocks.mlp import MLPBlock
from monai.networks.blocks.patchembedding import PatchEmbed
from monai.networks.layers.drop_path import DropPath
from monai.networks.nets.swin_unetr import PatchMergingV2
from torch import Tensor, nn

from common.networks.base import Encoder, as_tuple
from common.networks.recompute import recomputed

__all__ = ["SwinBlock", "SwinEncoder", "WindowAttention", "merge_windows", "partition_windows", "shift_mask"]


def partition_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """Cut (B, *S, C) into windows: (B * number of windows, tokens of a window, C), row-major in both.

    Every axis of S must be a multiple of the window's.
    """
    batch, *size, channels = x.shape
    dims = len(size)
    split = [n for s, w in zip(size, window, strict=True) for n in (s // w, w)]
    outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
    return x.reshape(batch, *split, channels).permute(0, *outer, *inner, 2 * dims + 1).flatten(0, dims).flatten(1, dims)


def merge_windows(windows: Tensor, window: Sequence[int], size: Sequence[int]) -> Tensor:
    """Undo ``partition_windows``: (B * windows, tokens, C) to (B, *size, C)."""
    dims = len(window)
    counts = [s // w for s, w in zip(size, window, strict=True)]
    x = windows.reshape(-1, *counts, *window, windows.shape[-1])
    order = [axis for k in range(dims) for axis in (1 + k, 1 + dims + k)]
    return x.permute(0, *order, 2 * dims + 1).reshape(-1, *size, windows.shape[-1])


def shift_mask(size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Which tokens of a shifted window may see each other, as an additive mask: 0, or -100 where they may not.

    After the cyclic roll a window at the end of an axis holds tokens from both ends of the image. Tokens are labelled
    by where they come from, and only those with the same label meet.

    Args:
        size: padded size of the feature map, multiples of the window.
        window: window size.
        shift: the roll of each axis, at least 1.
        device: where the mask is made.

    Returns:
        (number of windows, tokens, tokens), float32.
    """
    label = torch.zeros(tuple(size), dtype=torch.long, device=device)
    for axis, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        position = torch.arange(n, device=device)
        region = (position >= n - w).long() + (position >= n - s).long()
        label = 3 * label + region.view([-1 if k == axis else 1 for k in range(len(size))])
    tokens = partition_windows(label[None, ..., None], window).squeeze(-1)
    return (tokens[:, :, None] != tokens[:, None, :]).float() * -100.0


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a relative position bias.

    The bias table has the shape (heads, 2 w_0 - 1, 2 w_1 - 1[, 2 w_2 - 1]), so that a checkpoint tells its window.

    Args:
        dim: channels of a token.
        num_heads: number of heads.
        window_size: window, one number an axis.
    """

    def __init__(self, dim: int, num_heads: int, window_size: Sequence[int]) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels cannot be divided among {num_heads} heads")
        self.num_heads = num_heads
        self.window_size = tuple(window_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_heads, *(2 * w - 1 for w in window_size)))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", self._index(), persistent=False)
        self.relative_position_index: Tensor

    def _index(self) -> Tensor:
        """Row-major place in the table of the offset from key to query, (tokens, tokens)."""
        tokens = torch.tensor(list(itertools.product(*(range(w) for w in self.window_size))))
        offset = tokens[:, None] - tokens[None] + torch.tensor(self.window_size) - 1
        index = offset[..., 0]
        for axis in range(1, len(self.window_size)):
            index = index * (2 * self.window_size[axis] - 1) + offset[..., axis]
        return index

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B * windows, N, C) to the same; ``mask`` (windows, N, N) is added to the scores."""
        count, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table.flatten(1)[:, self.relative_position_index].unsqueeze(0)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(count // mask.shape[0], 1, 1, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(count, tokens, channels))
        return projected


class SwinBlock(nn.Module):
    """Window attention and an MLP, each behind a LayerNorm and around a residual.

    Args:
        dim: channels of a token.
        num_heads: heads of the attention.
        window_size: window, one number an axis.
        shifted: roll the map by half a window first. As in the published encoder, a window that is one token wide along
            any axis is never shifted.
        mlp_ratio: hidden over input channels of the MLP.
        drop_path: probability to drop a residual branch in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        *,
        shifted: bool,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.shift = tuple(w // 2 for w in window_size) if shifted and min(window_size) > 1 else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio), act="GELU", dropout_mode="swin")
        self.drop_path = DropPath(drop_path)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        size = x.shape[1:-1]
        axes = tuple(range(1, len(size) + 1))
        missing = [-n % w for n, w in zip(size, self.window_size, strict=True)]
        x = F.pad(x, [0, 0] + [amount for m in reversed(missing) for amount in (0, m)])
        padded = x.shape[1:-1]
        if self.shift is not None:
            x = torch.roll(x, [-s for s in self.shift], axes)
        windows = self.attn(partition_windows(x, self.window_size), mask if self.shift is not None else None)
        x = merge_windows(windows, self.window_size, padded)
        if self.shift is not None:
            x = torch.roll(x, list(self.shift), axes)
        return x[(slice(None), *(slice(n) for n in size))]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, *S, C) to the same; ``mask`` from ``shift_mask`` for a shifted block."""
        x = x + self.drop_path(self._attend(self.norm1(x), mask))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class SwinStage(nn.Module):
    """Blocks at one resolution, every second one shifted; the mask is made once for all of them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        drop_paths: Sequence[float],
        mlp_ratio: float,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window_size, shifted=j % 2 == 1, mlp_ratio=mlp_ratio, drop_path=p)
            for j, p in enumerate(drop_paths)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, *S, C) to the same."""
        padded = [n + -n % w for n, w in zip(x.shape[1:-1], self.window_size, strict=True)]
        shift = next((block.shift for block in self.blocks if block.shift is not None), None)
        mask = None if shift is None else shift_mask(padded, self.window_size, shift, x.device)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = recomputed(block, x, mask)
            else:
                x = block(x, mask)
        return x


class SwinEncoder(Encoder):
    """TransMorph's Swin encoder of a concatenated pair.

    Level ``i`` has ``embed_dim * 2**i`` channels at stride ``patch_size * 2**i``; it is taken before the patch merging
    and passes its own LayerNorm. Any image size runs: the image is padded to whole patches, maps to whole windows and
    to even sizes before merging.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        embed_dim: channels of the finest level.
        depths: blocks of each level, fine to coarse.
        num_heads: attention heads of each level.
        window_size: window in tokens, one number or one an axis; (2, 3, 3) in 3-D and (3, 3) in 2-D when None.
        patch_size: side of a patch in voxels, a power of two.
        mlp_ratio: hidden over input channels of the MLPs.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        use_checkpoint: recompute blocks in the backward pass to save memory.

    Raises:
        ValueError: when depths and heads differ in number, or channels do not divide among heads.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 2,
        embed_dim: int = 96,
        depths: Sequence[int] = (4, 4, 5),
        num_heads: Sequence[int] = (8, 8, 8),
        window_size: int | Sequence[int] | None = None,
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.3,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} differ in length")
        default = (2, 3, 3) if spatial_dims == 3 else (3, 3)
        self.window_size = as_tuple(default if window_size is None else window_size, spatial_dims, "window_size")
        self.spatial_dims, self.in_channels, self.pairing = spatial_dims, in_channels, "joint"
        self.feature_channels = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.strides = tuple(patch_size * 2**i for i in range(len(depths)))
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, nn.LayerNorm, spatial_dims)
        # One rate a block, over all levels.
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            SwinStage(dim, heads, self.window_size, [next(rates) for _ in range(depth)], mlp_ratio, use_checkpoint)
            for dim, depth, heads in zip(self.feature_channels, depths, num_heads, strict=True)
        )
        self.merges = nn.ModuleList(
            PatchMergingV2(dim, nn.LayerNorm, spatial_dims) for dim in self.feature_channels[:-1]
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.feature_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pair (B, in_channels, *S) to maps (B, embed_dim * 2**i, *s_i), fine to coarse."""
        tokens = self.patch_embed(x).movedim(1, -1)
        features = []
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            tokens = stage(tokens)
            features.append(norm(tokens).movedim(-1, 1).contiguous())
            if i < len(self.merges):
                tokens = self.merges[i](tokens)
        return features
