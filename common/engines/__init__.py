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
"""The trainer and the evaluator of every bundle."""

from __future__ import annotations

from common.engines.affine import AffineResult, AffineStage, register_affine
from common.engines.detailed_measures import detailed_measures
from common.engines.evaluator import RegistrationEvaluator
from common.engines.measures import standard_measures
from common.engines.network import FieldsModule, autocast, distribute, seed_everything
from common.engines.pairs_evaluator import PairsEvaluator
from common.engines.pretrained import load_pretrained_encoder
from common.engines.ranks import join_ranks, leave_ranks
from common.engines.refinement import Refined, Refinement
from common.engines.trainer import NonFiniteLossError, RegistrationTrainer, prepare_pair
from common.engines.values import PairValues, stack_pair

__all__ = [
    "AffineResult",
    "AffineStage",
    "FieldsModule",
    "NonFiniteLossError",
    "PairValues",
    "PairsEvaluator",
    "Refined",
    "Refinement",
    "RegistrationEvaluator",
    "RegistrationTrainer",
    "autocast",
    "detailed_measures",
    "distribute",
    "join_ranks",
    "leave_ranks",
    "load_pretrained_encoder",
    "prepare_pair",
    "register_affine",
    "seed_everything",
    "stack_pair",
    "standard_measures",
]
