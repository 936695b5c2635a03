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
"""Every bundle's network leaves in the formats its documentation names, and computes the same from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles.commands import succeed
from tests.processes import run_python

_COMPARE = """
from pathlib import Path
import torch
from common import bundle_root, networks
from common.export import export_network, open_program, random_pair

bundle_root({bundle!r})
torch.manual_seed(0)
{make}
for name, weight in network.named_parameters():
    if name.endswith(("head.conv.weight", "flow.conv.weight")):
        torch.nn.init.normal_(weight, std=0.3)
for format in {formats}:
    for size in {sizes}:
        path = Path("network." + format)
        exported = export_network(network, path, format, size)
        image = random_pair(size, seed=5)
        with torch.no_grad():
            expected = network(image)
        found = open_program(path)(image)
        assert found.shape == expected.shape == (1, len(size), *size)
        assert float(expected.abs().max()) > 0.1, "nothing moves, so nothing is compared"
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=5e-3)
        print(exported)
"""

_SIZES = [(19, 22), (13, 17)]

_TVF = """
encoder = networks.SwinEncoder(2, embed_dim=8, depths=(2, 2), num_heads=(2, 2))
network = networks.TransMorphTVF(encoder, steps=2, step_channels=4, integration_steps=2)
"""

_PYRAMID = """
from scripts.pyramid import DualStreamPyramid
network = DualStreamPyramid(2, {decoder!r}, encoder_channels=(4, 4), decoder_channels=(4, 4))
# Two solvers agree within the tolerance of the inversion, here strict: these weights make fields that nearly fold.
network.decoder.tolerance = 1e-4
"""


def run(folder: Path, repository: Path, code: str) -> str:
    return succeed(run_python(["-c", code], folder, {"PYTHONPATH": str(repository)}))


@pytest.mark.parametrize(
    ("bundle", "size"),
    [
        ("ssl_pretrain", "[13, 17, 11]"),
        ("dual_stream_pyramid", "[19, 22]"),
        ("gradirn", "[19, 22]"),
        ("spatially_varying_reg", "[19, 22]"),
    ],
)
def test_the_command_exports_what_a_bundle_ships(tmp_path: Path, repository: Path, bundle: str, size: str) -> None:
    command = ["-m", "common.export", bundle, "--output", "network.ts", "--spatial_size", size]
    text = succeed(run_python(command, tmp_path, {"PYTHONPATH": str(repository)}))
    assert "network.ts: ts" in text and "largest difference" in text
    assert (tmp_path / "network.ts").stat().st_size > 1e4


def test_a_time_varying_network_is_the_same_in_every_format(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("onnxruntime")
    formats = ["ts", "pt2", "onnx"]
    text = run(tmp_path, repository, _COMPARE.format(bundle="ssl_pretrain", make=_TVF, formats=formats, sizes=_SIZES))
    assert text.count("largest difference") == 6


@pytest.mark.parametrize(
    ("decoder", "formats"), [("conv_mfc", ["ts", "pt2"]), ("vfa", ["pt2"]), ("convic_c", ["pt2", "onnx"])]
)
def test_a_pyramid_is_the_same_in_every_format(
    tmp_path: Path, repository: Path, decoder: str, formats: list[str]
) -> None:
    pytest.importorskip("onnxruntime")
    make = _PYRAMID.format(decoder=decoder)
    code = _COMPARE.format(bundle="dual_stream_pyramid", make=make, formats=formats, sizes=_SIZES)
    assert run(tmp_path, repository, code).count("largest difference") == 2 * len(formats)


def test_a_traced_program_refuses_another_size(tmp_path: Path, repository: Path) -> None:
    make = "network = networks.VoxelMorph(2)"
    code = _COMPARE.format(bundle="ssl_pretrain", make=make, formats=["ts"], sizes=_SIZES[:1])
    code += """
try:
    open_program(path)(random_pair((20, 22)))
except Exception as error:
    assert "this program takes images of" in str(error), error
    print("refused")
"""
    assert "refused" in run(tmp_path, repository, code)


def test_a_program_that_differs_leaves_no_file(tmp_path: Path, repository: Path) -> None:
    code = """
from pathlib import Path
from common.export import ExportError, export_network
from common.networks import VoxelMorph
from common.spatial.exporting import exporting

class Other(VoxelMorph):
    def forward(self, image):
        return super().forward(image) + (1.0 if exporting() else 0.0)

try:
    export_network(Other(2), "other.ts", "ts", (16, 16))
except ExportError as error:
    assert "differs from it by 1 voxels" in str(error), error
    assert list(Path().iterdir()) == []
    print("refused")
"""
    assert "refused" in run(tmp_path, repository, code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--decodr", "vfa"], "--decodr is no key of"), (["--output", "network.bin"], "ends in none of")],
)
def test_an_unknown_option_or_format_is_refused(
    tmp_path: Path, repository: Path, arguments: list[str], message: str
) -> None:
    command = ["-m", "common.export", "dual_stream_pyramid", "--spatial_size", "[16, 16]", *arguments]
    result = run_python(command, tmp_path, {"PYTHONPATH": str(repository)})
    assert result.returncode and message in result.stderr
