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
"""Inference over a list of pairs, of which one may fail."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.engines.evaluator import RegistrationEvaluator
from common.engines.refinement import Refinement
from common.spatial import warp_labels, warp_points

__all__ = ["PairsEvaluator"]

logger = logging.getLogger(__name__)

_NAMES = ("moving_id", "fixed_id", "id")


class PairsEvaluator(RegistrationEvaluator):
    """Register what there is to register, and go on from the network's field where that is asked for.

    A batch without images, which is how :class:`common.data.ScanPairs` says that a pair was registered before or cannot
    be loaded, passes through as output with no ``metrics``. Its other arguments are those of the class it extends.

    The output has ``timings``, a dictionary of seconds: those that the batch came with (means over its pairs), of the
    ``network`` and, with refinement, of ``refine``. Then it also has ``refinement``, a dictionary of numbers
    (:meth:`common.engines.Refined.numbers`), and all that is measured and written is of the refined field. The measure
    ``seconds`` remains that of the network, and ``network_label`` and ``network_points`` are where the network alone
    has brought labels and landmarks, for measures of it (``stages`` of :func:`common.engines.standard_measures`).

    Args:
        keep_going: when a pair fails in the network, go on with the next; the output has the reason as ``error``.
        refine: iterations of instance optimisation on each pair, at most; 0 takes the network's field as it is.
        refinement: how; by default with the loss and the settings of :class:`common.engines.Refinement`.

    Raises:
        ValueError: when ``refine`` is negative or no whole number.
    """

    def __init__(
        self,
        *arguments: Any,
        keep_going: bool = False,
        refine: int = 0,
        refinement: Refinement | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
            raise ValueError(f"refine must be a whole number of iterations, 0 for none, got {refine!r}")
        self.keep_going, self.refine = keep_going, refine
        self.refinement = Refinement() if refinement is None else refinement

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        if "moving" not in batchdata:
            output = {**batchdata, "metrics": {}}
        else:
            try:
                output = super()._iteration(engine, batchdata)
            except Exception as error:
                if not self.keep_going:
                    raise
                logger.debug("a pair failed", exc_info=True)
                names = {key: batchdata[key] for key in _NAMES if key in batchdata}
                output = {**names, "metrics": {}, "error": [str(error) or repr(error)] * len(batchdata["moving"])}
            else:
                output["timings"] = _timings(batchdata, output)
        self.state.output = output
        return output

    def _continued(self, fields: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        if not self.refine:
            return fields
        refined = self.refinement(fields, batch, self.refine)
        return {**refined.fields, **_reached(fields["ddf"], batch), "refinement": refined.numbers()}


def _reached(ddf: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Labels (B, 1, *S) and landmarks (B, N, d) of a batch that has them, moved by a field."""
    found = {}
    if "moving_label" in batch:
        found["network_label"] = warp_labels(batch["moving_label"], ddf)
    if "fixed_points" in batch:
        found["network_points"] = warp_points(batch["fixed_points"], ddf)
    return found


def _timings(batch: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage, those before the network first."""
    timings = {name: _mean(seconds) for name, seconds in batch.get("timings", {}).items()}
    timings["network"] = _mean(output["seconds"])
    if "refinement" in output:
        timings["refine"] = output["refinement"]["seconds"] / len(output["seconds"])
    return timings


def _mean(seconds: Tensor | float) -> float:
    return float(seconds.double().mean()) if isinstance(seconds, Tensor) else float(seconds)
