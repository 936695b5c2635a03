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
"""What networks do with fields, recorded at one size and run at another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.spatial import (
    affine_to_ddf,
    bspline_displacement,
    compose,
    integrate,
    jacobian_determinant,
    resample_field,
    warp,
)
from common.spatial.exporting import exporting

_SIZES = {2: ((13, 10), (7, 17)), 3: ((13, 10, 9), (7, 8, 15))}


class _Moves(nn.Module):
    """All that depends on the padding, for both of them."""

    def forward(self, image: Tensor, ddf: Tensor) -> list[Tensor]:
        results = []
        for padding in ("border", "zeros"):
            results += [warp(image, ddf, padding=padding), warp(image, ddf, mode="nearest", padding=padding)]
            results += [compose(ddf, 0.5 * ddf, padding=padding), integrate(ddf, 1, padding=padding)]
        return results


class _Grids(nn.Module):
    """All that changes or asks for grids; the field's own size has to come back."""

    def forward(self, image: Tensor, ddf: Tensor) -> list[Tensor]:
        size = ddf.shape[2:]
        results = [jacobian_determinant(ddf), ddf + affine_to_ddf(1.5 * torch.eye(ddf.shape[1] + 1), size)]
        for align_corners in (True, False):
            half = resample_field(ddf, [(n + 1) // 2 for n in size], align_corners=align_corners)
            results.append(resample_field(half, size, align_corners=align_corners))
        results.append(resample_field(ddf, [n // 2 for n in size], align_corners=True, scale=0.5))
        return [*results, bspline_displacement(ddf, 1), bspline_displacement(ddf, 2)]


def _arguments(size: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image and a field that leaves it on all sides."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 2, *size, generator=generator)
    return image, 3 * torch.randn(1, len(size), *size, generator=generator)


def _open(dims: int) -> tuple[dict[int, torch.export.Dim], ...]:
    """The spatial axes of both arguments."""
    axes = {2 + axis: torch.export.Dim.DYNAMIC for axis in range(dims)}
    return axes, axes


def _assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("kind", "dims", "strict"), [(_Moves, 2, True), (_Moves, 3, False), (_Grids, 3, False)])
def test_an_exported_program_takes_any_size(kind: type[nn.Module], dims: int, strict: bool) -> None:
    module = kind().eval()
    first, second = (_arguments(size) for size in _SIZES[dims])
    program = torch.export.export(module, first, dynamic_shapes=_open(dims), strict=strict)
    for arguments in (first, second):
        _assert_same(program.module()(*arguments), module(*arguments))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", [_Moves, _Grids])
def test_a_trace_computes_the_same(kind: type[nn.Module], dims: int) -> None:
    module = kind().eval()
    first, other = _arguments(_SIZES[dims][0]), _arguments(_SIZES[dims][0], seed=1)
    with pytest.warns(torch.jit.TracerWarning):  # sizes become constants
        traced = torch.jit.trace(module, first, check_trace=False)
    for arguments in (first, other):
        _assert_same(traced(*arguments), module(*arguments))


@pytest.mark.parametrize(("kind", "dims"), [(_Moves, 2), (_Moves, 3), (_Grids, 2)])
def test_onnx_takes_any_size(kind: type[nn.Module], dims: int, tmp_path: Path) -> None:
    module = kind().eval()
    onnxruntime = pytest.importorskip("onnxruntime")
    first, second = (_arguments(size) for size in _SIZES[dims])
    program = torch.onnx.export(
        module,
        first,
        dynamo=True,
        opset_version=20,  # the first whose GridSample knows volumes
        dynamic_shapes=_open(dims),
        input_names=["image", "ddf"],
        verbose=False,
    )
    assert program is not None
    program.save(str(tmp_path / "moves.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "moves.onnx"), providers=["CPUExecutionProvider"])
    for image, ddf in (first, second):
        found = session.run(None, {"image": image.numpy(), "ddf": ddf.numpy()})
        _assert_same([torch.from_numpy(array) for array in found], module(image, ddf))


def test_parameters_that_want_gradients_are_no_obstacle() -> None:
    class Learnt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ddf = nn.Parameter(torch.randn(1, 2, 6, 7))

        def forward(self, image: Tensor) -> Tensor:
            return warp(image, integrate(self.ddf, 2))

    network, image = Learnt(), torch.rand(1, 1, 6, 7)
    program = torch.export.export(network, (image,))
    torch.testing.assert_close(program.module()(image), network(image), rtol=0, atol=1e-5)


def test_nothing_is_recorded_when_code_merely_runs() -> None:
    assert not exporting()
    with torch.inference_mode():
        assert not exporting()
