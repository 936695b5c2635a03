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
"""Cost of an iteration of q(v) with a learnt similarity, beside the published way of computing it.

Run ``python -m benchmarks.similarity_learning [--size 48]`` for a Markdown table. Every figure is taken in a fresh
process on one thread: CPU seconds of an iteration (energies, gradients and Adam's step; the least of some), the peak of
resident memory above what the imports take, and what autograd keeps for the backward pass: the storage of all saved
tensors but those that are there anyway (parameters, images, weights).

The published form is written from the method's specification, operation for operation: each of the two samples by
itself, the fixed image encoded anew with either, positions and fields through normalised grids and ``grid_sample``
with one node a squaring, B-splines by grouped transposed convolutions, smoothing by grouped convolutions of a padded
field, energies by the formulas as they stand. It computes the same energies, which the tests compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.measure import cost_in_fresh_process, format_table
from bundles.similarity_learning.scripts.network import published_setting
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing, sobolev_kernel
from bundles.similarity_learning.scripts.transformation import build_transformation
from bundles.similarity_learning.scripts.variational import Draws, VariationalProblem

__all__ = ["Case", "PublishedProblem", "kept_megabytes", "measure"]

_STEPS, _NOISE, _SPACING = 12, 0.1, 2


class Case(NamedTuple):
    """What is measured: edge of the cubic images, how many pairs at once, the model."""

    size: int
    similarity: str
    transformation: str
    batch: int = 1


CASES = tuple(Case(48, similarity, name) for similarity in ("ssd", "lcc") for name in ("svf", "bspline"))


class _StraightThrough(torch.autograd.Function):
    """Sobolev smoothing whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, kernel: Tensor) -> Tensor:
        v = F.pad(v, (len(kernel) // 2,) * 6, mode="replicate")
        for axis in range(3):
            shape = [len(kernel) if k == axis else 1 for k in range(3)]
            v = F.conv3d(v, kernel.view(1, 1, *shape).repeat(3, 1, 1, 1, 1), groups=3)
        return v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class PublishedProblem:
    """The energies of q(v) as published, for 3-D images of equal sides; vectors are (x, y, z), along W, H and D.

    Args:
        similarity: a learnt one, whose weights are used.
        transformation: "svf" or "bspline".
        weight: of the regularisation.
        size: of the images.
    """

    def __init__(self, similarity: Similarity, transformation: str, weight: float, size: Sequence[int]) -> None:
        self.similarity, self.transformation, self.weight, self.size = similarity, transformation, weight, tuple(size)
        self.kernel = torch.tensor(sobolev_kernel())
        axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij")
        self.identity = torch.stack(axes).flip(0)[None]
        self.scale = torch.tensor([2 / (n - 1) for n in size]).flip(0).view(1, 3, 1, 1, 1)

    def loss(self, q: LowRankGaussian, moving: Tensor, fixed: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        """The summed loss of a batch; ``draws`` as for ours, but for the order of channels."""
        sigma = torch.exp(0.5 * q.log_var)
        deviation = draws.noise * sigma + draws.coefficients.view(-1, 1, 1, 1, 1) * q.factors[:, 0]
        assert draws.jitter is not None
        data, regularisation, entropy = [], [], []
        for sample, jitter in zip((q.mean + deviation, q.mean - deviation), draws.jitter.chunk(2), strict=True):
            v = _StraightThrough.apply(sample, self.kernel)
            places = self.identity + self._integrated(v if self.transformation == "svf" else self._dense(v))
            moved = _sample(moving, places + jitter * self.scale)
            data.append(self._data(fixed.expand_as(moved), moved, mask.expand_as(moved)))
            regularisation.append(self._roughness(v))
            entropy.append(_half_distance(q, sample, sigma))
        ratio = (q.factors[:, 0] / sigma).square().flatten(1).sum(1)
        half_determinant = 0.5 * (torch.log1p(ratio) + q.log_var.flatten(1).sum(1))
        total: Tensor = 0.5 * (data[0] + data[1]) + 0.5 * (regularisation[0] + regularisation[1]).sum()
        return total - (0.5 * (entropy[0] + entropy[1]) + half_determinant).sum()

    def _integrated(self, v: Tensor) -> Tensor:
        d = v * self.scale / 2**_STEPS
        for _ in range(_STEPS):
            d = d + _sample(d, self.identity + d)
        return d

    def _dense(self, v: Tensor) -> Tensor:
        position = (torch.arange(4 * _SPACING - 1) - (2 * _SPACING - 1)).abs() / _SPACING
        near, far = 2 / 3 + (position / 2 - 1) * position**2, (2 - position) ** 3 / 6
        kernel = torch.where(position < 1, near, far).float()
        for axis, n in enumerate(self.size, 2):
            shape = [len(kernel) if k == axis else 1 for k in range(2, 5)]
            weight = kernel.view(1, 1, *shape).repeat(3, 1, 1, 1, 1)
            at, pad = ([value if k == axis else other for k in range(2, 5)] for value, other in ((2, 1), (3, 0)))
            v = F.conv_transpose3d(v, weight, stride=at, padding=pad, groups=3)
            v = v.narrow(axis, _SPACING, n)
        return v

    def _encode(self, image: Tensor) -> Tensor:
        encoder = self.similarity.encoder
        assert encoder is not None
        for conv in encoder.convolutions:
            image = F.leaky_relu(F.conv3d(_padded(image), conv.weight, conv.bias), encoder.slope)
        return F.conv1d(image.flatten(2), encoder.aggregation.weight.flatten(2)).view(-1, 1, *self.size)

    def _data(self, fixed: Tensor, moved: Tensor, mask: Tensor) -> Tensor:
        f, m = self._encode(fixed), self._encode(moved)
        if self.similarity.kind == "ssd":
            return 0.5 * (f - m).square()[mask].sum()
        box = partial(F.conv3d, weight=torch.ones(1, 1, 3, 3, 3))
        f, m = f - box(_padded(f)) / 27, m - box(_padded(m)) / 27
        cross = box(_padded(f * m))
        z = cross.square() / (box(_padded(f.square())) * box(_padded(m.square())) + 1e-5)
        return -z[mask].sum()

    def _roughness(self, v: Tensor) -> Tensor:
        differences = []
        for axis in range(2, 5):
            step = v.diff(dim=axis)
            differences.append(torch.cat((step, step.narrow(axis, step.shape[axis] - 1, 1)), dim=axis))
        return 0.5 * self.weight * torch.stack(differences).square().flatten(2).sum((0, 2))


def _sample(image: Tensor, places: Tensor) -> Tensor:
    return F.grid_sample(image, places.permute(0, 2, 3, 4, 1), padding_mode="border", align_corners=True)


def _padded(image: Tensor) -> Tensor:
    return F.pad(image, (1,) * 6, mode="replicate")


def _half_distance(q: LowRankGaussian, sample: Tensor, sigma: Tensor) -> Tensor:
    s, r = ((x / sigma).flatten(1) for x in (sample - q.mean, q.factors[:, 0]))
    return 0.5 * (s.square().sum(1) - (s * r).sum(1).square() / (1 + r.square().sum(1)))


class Iteration:
    """One iteration of q(v), in one form or the other."""

    def __init__(self, form: str, case: Case) -> None:
        size = (case.size,) * 3
        setting = published_setting(case.transformation, case.similarity)
        similarity = Similarity(case.similarity, learnt=True).eval().requires_grad_(False)
        transformation = build_transformation(case.transformation, _STEPS, _SPACING)
        lattice = transformation.lattice(size)
        self.q = LowRankGaussian.initial(case.batch, lattice, 3)
        self.moving, self.fixed = torch.rand(case.batch, 1, *size), torch.rand(1, 1, *size)
        self.mask = torch.rand(1, 1, *size) > 0.4
        self.optimizer = torch.optim.Adam(self.q.parameters(), lr=setting.learning_rate, fused=form == "ours" or None)
        self.form = form
        self.published = PublishedProblem(similarity, case.transformation, setting.weight, size)
        regularisation = DifferenceEnergy(setting.weight, edge_weight=2.0)
        self.problem = VariationalProblem(similarity, transformation, SobolevSmoothing(), regularisation, _NOISE)
        self.reference = similarity.reference(self.fixed, self.mask)

    def draw(self) -> Draws:
        """The random numbers that the published form takes, one coefficient for the whole batch."""
        fields = 2 * len(self.moving), 3, *self.moving.shape[2:]
        jitter = _NOISE - 2 * _NOISE * torch.rand(fields)
        return Draws(torch.randn(self.q.mean.shape), torch.randn(1).expand(len(self.moving), 1), jitter)

    def loss(self) -> Tensor:
        """Up to the point where gradients begin."""
        if self.form == "ours":
            return self.problem.energies(self.q, self.moving, self.reference).loss.sum()
        return self.published.loss(self.q, self.moving, self.fixed, self.mask, self.draw())

    def __call__(self) -> None:
        """All of it."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def given(self) -> Iterator[Tensor]:
        """Tensors that are there whether or not gradients are asked for."""
        yield from self.q.parameters()
        yield from self.problem.similarity.parameters()
        yield from (self.moving, self.fixed, self.mask, self.published.identity)
        yield from (x for x in self.reference if x is not None)


def kept_megabytes(loss: Callable[[], Tensor], given: Sequence[Tensor]) -> float:
    """What a forward pass keeps for the backward one, MB of 2**20 bytes.

    Args:
        loss: the forward pass.
        given: tensors whose storage does not count.
    """
    kept: WeakSet[_Kept] = WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        handle = _Kept(tensor.detach())
        kept.add(handle)
        return handle

    with saved_tensors_hooks(pack, lambda handle: handle.tensor):
        total = loss()
    # The graph holds the handles: those of parts that no gradient will pass are gone already.
    storages = [handle.tensor.untyped_storage() for handle in kept]
    there = {tensor.untyped_storage().data_ptr() for tensor in given}
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in there}
    del total
    return sum(sizes.values()) / 2**20


class _Kept:
    """A saved tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure(cases: Sequence[Case] = CASES, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure both forms on all cases.

    Args:
        cases: what to measure.
        repeats: timed iterations, after one that the memory is read from.

    Returns:
        rows of what was measured: CPU seconds, peak MB and MB kept for the backward pass, and these three over those
        of the published form.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        first: tuple[float, ...] | None = None
        for form in ("published", "ours"):
            found = (*cost_in_fresh_process(Iteration, (form, case), repeats), _kept(form, case))
            first = first or found
            rows.append(
                {
                    "what": f"learnt {case.similarity}, {case.transformation}, {form}",
                    "size": f"{case.size}^3 x {case.batch}",
                    **dict(zip(("cpu_s", "mb", "kept_mb"), found, strict=True)),
                    **{
                        f"{name}_over_published": value / other if other else float("nan")
                        for name, value, other in zip(("cpu", "mb", "kept"), found, first, strict=True)
                    },
                }
            )
    return rows


def _kept(form: str, case: Case) -> float:
    torch.manual_seed(0)
    iteration = Iteration(form, case)
    return kept_megabytes(iteration.loss, list(iteration.given()))


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="edge of the images")
    parser.add_argument("--batch", type=int, default=1, help="pairs at once")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    cases = [case._replace(size=given.size, batch=given.batch) for case in CASES]
    print(format_table(measure(cases, given.repeats)))


if __name__ == "__main__":
    main()
