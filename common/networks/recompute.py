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
"""Recompute a module in the backward pass instead of keeping what it computed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


def recomputed(module: nn.Module, *args: Any) -> Any:
    """``module(*args)``, of which nothing but the arguments and the parameters is kept for the backward pass.

    The second run uses the parameters of the first. Plain checkpointing uses those that the module holds by then, which
    are others where weights are made for one call and put in by ``torch.func.functional_call``.

    Args:
        module: what to run.
        args: its arguments.
    """
    parameters = dict(module.named_parameters())

    def run(*inputs: Any) -> Any:
        return functional_call(module, parameters, inputs)

    return checkpoint(run, *args, use_reentrant=False)
