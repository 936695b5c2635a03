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

from common.engines.evaluator import RegistrationEvaluator

__all__ = ["PairsEvaluator"]

logger = logging.getLogger(__name__)

_NAMES = ("moving_id", "fixed_id", "id")


class PairsEvaluator(RegistrationEvaluator):
    """Register what there is to register.

    A batch without images, which is how :class:`common.data.ScanPairs` says that a pair was registered before or cannot
    be loaded, passes through as output with no ``metrics``. Its other arguments are those of the class it extends.

    Args:
        keep_going: when a pair fails in the network, go on with the next; the output has the reason as ``error``.
    """

    def __init__(self, *arguments: Any, keep_going: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.keep_going = keep_going

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        if "moving" not in batchdata:
            output = {**batchdata, "metrics": {}}
        else:
            try:
                return super()._iteration(engine, batchdata)
            except Exception as error:
                if not self.keep_going:
                    raise
                logger.debug("a pair failed", exc_info=True)
                names = {key: batchdata[key] for key in _NAMES if key in batchdata}
                output = {**names, "metrics": {}, "error": [str(error) or repr(error)] * len(batchdata["moving"])}
        self.state.output = output
        return output
