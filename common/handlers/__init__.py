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
"""Pictures, tables, progress and checkpoints for Ignite engines."""

from __future__ import annotations

from common.handlers.checkpoint import CheckpointError, SafeCheckpoint, load_checkpoint, resume_from, save_checkpoint
from common.handlers.figures import figure_to_array, registration_figure
from common.handlers.learn2reg_writer import Learn2RegWriter
from common.handlers.pairs_table import PairsTable
from common.handlers.pictures import PictureSaver
from common.handlers.progress import LossProgressBar
from common.handlers.report import ReportInputs, write_report
from common.handlers.table import MetricsTable
from common.handlers.tensorboard import TensorBoardPictures, TensorBoardScalars
from common.handlers.tracking import attach_handlers
from common.handlers.weight_schedule import LossWeightSchedule
from common.handlers.writer import RegistrationWriter

__all__ = [
    "CheckpointError",
    "Learn2RegWriter",
    "LossProgressBar",
    "LossWeightSchedule",
    "MetricsTable",
    "PairsTable",
    "PictureSaver",
    "RegistrationWriter",
    "ReportInputs",
    "SafeCheckpoint",
    "TensorBoardPictures",
    "TensorBoardScalars",
    "attach_handlers",
    "figure_to_array",
    "load_checkpoint",
    "registration_figure",
    "resume_from",
    "save_checkpoint",
    "write_report",
]
