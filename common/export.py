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
"""Programs that run without this code: TorchScript, ``torch.export`` and ONNX files of a bundle's network.

``python -m common.export <bundle> --format onnx --spatial_size "[96, 96, 96]"`` builds the network of the bundle's
``inference.json`` with the weights it ships, exports it, and compares what the written file computes with what the
network does. A file that computes something else is not kept.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

__all__ = ["Exported", "FORMATS", "ExportError", "build_network", "export_network", "open_program", "random_pair"]

logger = logging.getLogger(__name__)

#: Formats and the ends of their files' names.
FORMATS = {"ts": ".ts", "pt2": ".pt2", "onnx": ".onnx"}

#: ONNX operator set for 2-D and 3-D: 20 is the first whose ``GridSample`` knows volumes; PyTorch writes planes in the
#: words of older ones.
OPSETS = {2: 18, 3: 20}

_DEFAULT_SIZE = {2: (96, 96), 3: (48, 48, 48)}
_SHORTEST, _LONGEST = 33, 1024  # voxels along an axis of a program for any size


class ExportError(RuntimeError):
    """A network that could not be exported, or a file that does not compute what its network does."""


@dataclass(frozen=True)
class Exported:
    """What an export yielded.

    Attributes:
        path: the file.
        format: "ts", "pt2" or "onnx".
        any_size: whether the program takes images of any size, or of the one it was made for only.
        differences: for each size that was compared, the largest difference between the fields of network and program,
            in voxels.
        magnitude: the largest displacement in those fields, in voxels.
        seconds: CPU time of one registration at the first size, by the network and by the program.
    """

    path: Path
    format: str
    any_size: bool
    differences: dict[tuple[int, ...], float]
    magnitude: float
    seconds: tuple[float, float]

    def __str__(self) -> str:
        compared = ", ".join(f"{difference:.2g} at {_text(size)}" for size, difference in self.differences.items())
        takes = (
            f"any size from {_SHORTEST} voxels an axis"
            if self.any_size
            else f"{_text(next(iter(self.differences)))} only"
        )
        return (
            f"{self.path}: {self.format}, takes {takes}; largest difference {compared} voxels, of displacements up to "
            f"{self.magnitude:.3g}; CPU time {self.seconds[0]:.2f} s by the network, "
            f"{self.seconds[1]:.2f} s by the file"
        )


def export_network(
    network: nn.Module,
    path: str | Path,
    format: str = "auto",
    spatial_size: Sequence[int] | None = None,
    *,
    channels: int = 2,
    any_size: bool = False,
    tolerance: float = 1e-3,
) -> Exported:
    """Export a registration network, and compare the file with it on random images.

    Args:
        network: maps (1, channels, *S) to a field (1, d, *S); it is put into evaluation mode, on the CPU.
        path: the file. It appears when the comparison succeeded.
        format: "ts", "pt2", "onnx", or "auto" for what the file's name ends in.
        spatial_size: the size to export at; 96 voxels an axis of a plane, 48 of a volume by default.
        channels: of both images together.
        any_size: have the program take other sizes too, which not every network allows.
        tolerance: largest difference that is no failure, in voxels, and relative where displacements exceed one voxel.

    Raises:
        ValueError: on an unknown format or a size that does not fit.
        ExportError: when the exporter fails or the program computes something else.
    """
    path, format = Path(path), _format_of(Path(path), format)
    dims = int(getattr(network, "spatial_dims", len(spatial_size or ())))
    size = tuple(spatial_size or _DEFAULT_SIZE[dims])
    if len(size) != dims or min(size) < 1:
        raise ValueError(f"spatial_size must be {dims} positive numbers, got {spatial_size}")
    if any_size and format == "ts":
        raise ValueError("a traced program (ts) takes one size only; choose 'pt2' or 'onnx', or any_size=False")
    network = network.cpu().eval()
    return _export_and_compare(network, path, format, size, channels, any_size, tolerance)


def _export_and_compare(
    network: nn.Module, path: Path, format: str, size: tuple[int, ...], channels: int, any_size: bool, tolerance: float
) -> Exported:
    image = random_pair(size, channels)
    sizes = [size, _another(size)] if any_size else [size]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, _frozen(network):
        written = Path(folder) / path.name
        try:
            _WRITERS[format](network, image, written, any_size)
            program = open_program(written, format)
        except Exception as error:
            raise ExportError(f"{type(network).__name__} cannot be exported as {format}: {error}") from error
        differences, seconds, magnitude = {}, [], 0.0
        for one in sizes:
            difference, largest, times = _compare(network, program, random_pair(one, channels, seed=1))
            if not difference <= tolerance * max(1.0, largest):
                raise ExportError(
                    f"the {format} program of {type(network).__name__} differs from it by {difference:.3g} voxels at "
                    f"{_text(one)}, of displacements up to {largest:.3g}; allowed are {tolerance:g}"
                )
            differences[one], magnitude = difference, max(magnitude, largest)
            seconds.append(times)
        os.replace(written, path)
    return Exported(path, format, any_size, differences, magnitude, seconds[0])


def random_pair(size: Sequence[int], channels: int = 2, seed: int = 0) -> Tensor:
    """Smooth random images (1, channels, *size) with values in [0, 1], as scans look to a network.

    Args:
        size: spatial size.
        channels: of both images together.
        seed: of their values.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, *(-(-n // 4) + 1 for n in size), generator=generator)
    return F.interpolate(coarse, size=tuple(size), mode="bilinear" if len(size) == 2 else "trilinear")


def _compare(
    network: nn.Module, program: Callable[[Tensor], Tensor], image: Tensor
) -> tuple[float, float, tuple[float, float]]:
    """Largest difference, largest displacement, and the CPU seconds of both."""
    start = time.process_time()
    with torch.no_grad():
        expected = network(image)
    middle = time.process_time()
    try:
        found = program(image)
    except Exception as error:
        raise ExportError(f"the program fails at {_text(image.shape[2:])}: {error}") from error
    end = time.process_time()
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"the program gives {tuple(found.shape)}, {found.dtype}; "
            f"the network {tuple(expected.shape)}, {expected.dtype}"
        )
    return float((found - expected).abs().max()), float(expected.abs().max()), (middle - start, end - middle)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Parameters that want no gradient, so that exporters meet plain operations and none of ours to differentiate."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class _OneSize(nn.Module):
    """A traced program that refuses other sizes than its own, at which it would compute nonsense without a word."""

    def __init__(self, program: nn.Module, size: list[int]) -> None:
        super().__init__()
        self.program = program
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        if list(image.shape) != self.size:
            raise ValueError("this program takes images of " + str(self.size) + ", got " + str(image.shape))
        field: Tensor = self.program(image)
        return field


def _write_torchscript(network: nn.Module, image: Tensor, path: Path, any_size: bool) -> None:
    with warnings.catch_warnings():
        # What the tracer warns of, that sizes become constants, is what the program checks.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, image, check_trace=False)
        torch.jit.script(_OneSize(traced, list(image.shape))).save(str(path))


def _dynamic(image: Tensor) -> tuple[dict[int, Any], ...]:
    axes = {2 + axis: torch.export.Dim(f"size{axis}", min=_SHORTEST, max=_LONGEST) for axis in range(image.ndim - 2)}
    return ({0: None, 1: None, **axes},)


def _write_exported(network: nn.Module, image: Tensor, path: Path, any_size: bool) -> None:
    program = torch.export.export(network, (image,), dynamic_shapes=_dynamic(image) if any_size else None)
    torch.export.save(program, path)


def _write_onnx(network: nn.Module, image: Tensor, path: Path, any_size: bool) -> None:
    program = torch.onnx.export(
        network,
        (image,),
        dynamo=True,
        opset_version=OPSETS[image.ndim - 2],
        input_names=["image"],
        output_names=["ddf"],
        dynamic_shapes=_dynamic(image) if any_size else None,
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, bool], None]] = {
    "ts": _write_torchscript,
    "pt2": _write_exported,
    "onnx": _write_onnx,
}


def open_program(path: str | Path, format: str = "auto") -> Callable[[Tensor], Tensor]:
    """Load a file that :func:`export_network` wrote: a function from (1, 2C, *S) to the field (1, d, *S).

    Args:
        path: the file.
        format: "ts", "pt2", "onnx", or "auto" for what the file's name ends in.
    """
    path, format = Path(path), _format_of(Path(path), format)
    if format == "ts":
        script: Callable[[Tensor], Tensor] = torch.jit.load(str(path))
        return script
    if format == "pt2":
        program: Callable[[Tensor], Tensor] = torch.export.load(path).module()
        return program
    return _onnx_program(path)


def _onnx_program(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        (field,) = session.run(None, {"image": image.numpy()})
        return torch.from_numpy(field)

    return run


def _format_of(path: Path, format: str) -> str:
    if format == "auto":
        format = next((name for name, end in FORMATS.items() if path.suffix == end), "")
        if not format:
            raise ValueError(f"{path} ends in none of {list(FORMATS.values())}: name the file so, or give a format")
    if format not in FORMATS:
        raise ValueError(f"format must be 'auto' or one of {list(FORMATS)}, got {format!r}")
    return format


def _another(size: tuple[int, ...]) -> tuple[int, ...]:
    """A size that has no divisor in common with what networks pad to, one axis longer and the others shorter."""
    steps = (5, -7, -3)
    return tuple(max(1, (n + step) | 1) for n, step in zip(size, steps, strict=False))


def _text(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def build_network(
    bundle: str, spatial_dims: int | None = None, overlays: Sequence[str] = (), **options: Any
) -> tuple[nn.Module, int]:
    """The network of a bundle's ``inference.json`` with its weights, and the channels of a pair of images.

    Args:
        bundle: the bundle's name.
        spatial_dims: 2 or 3; those of the bundle's metadata by default.
        overlays: configs of the bundle that come after ``inference.json``, such as ``vm`` for ``vm.json``.
        options: values for keys of the config.

    Raises:
        ValueError: when the config has no such key.
    """
    from monai.bundle import ConfigParser

    root = Path(common.bundle_root(bundle))
    inputs = json.loads((root / "configs/metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    parser = ConfigParser()
    parser.read_config([str(root / f"configs/{name}.json") for name in ("inference", *overlays)])
    options = {"spatial_dims": spatial_dims or len(inputs["spatial_shape"]), "device": torch.device("cpu"), **options}
    for key, value in options.items():
        if key.split("#")[0].split("::")[0] not in parser.config:
            raise ValueError(f"--{key} is no key of {root / 'configs/inference.json'}")
        parser[key] = value
    network: nn.Module = parser.get_parsed_content("network_def")
    if parser.get_parsed_content("checkpoint"):
        parser.get_parsed_content("loaded" if "loaded" in parser.config else "weights")
    channels = parser.config.get("channels")
    return network, 2 * channels if isinstance(channels, int) else inputs["num_channels"]


def export(
    bundle: str,
    format: str = "auto",
    output: str | None = None,
    spatial_size: Sequence[int] | None = None,
    any_size: bool = False,
    overlay: str | Sequence[str] = (),
    tolerance: float = 1e-3,
    **options: Any,
) -> None:
    """Export the network of a bundle.

    Args:
        bundle: its name.
        format: "ts", "pt2" or "onnx"; by default what the output's name ends in, and "pt2" without one.
        output: the file; ``runs/<bundle>/network.<format>`` by default.
        spatial_size: such as "[160, 192, 160]", which the program then takes.
        any_size: have it take other sizes too, which not every network allows.
        overlay: another config of the bundle after ``inference.json``, or several, such as ``vm``.
        tolerance: largest difference between network and file, in voxels.
        options: any option of the bundle's ``inference.json``, such as ``checkpoint``.
    """
    if output is None:
        format = "pt2" if format == "auto" else format
        output = f"runs/{bundle}/network{FORMATS.get(format, '')}"
    overlays = (overlay,) if isinstance(overlay, str) else overlay
    network, channels = build_network(bundle, len(spatial_size) if spatial_size else None, overlays, **options)
    exported = export_network(
        network, output, format, spatial_size, channels=channels, any_size=any_size, tolerance=tolerance
    )
    print(exported)


if __name__ == "__main__":
    import fire

    fire.Fire(export)
