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
"""The table of a list of pairs: what was measured now, what was measured before, and what went wrong."""

from __future__ import annotations

import logging

from ignite.engine import Engine, Events

from common.handlers.output import engine_output, is_first_rank
from common.handlers.table import MetricsTable
from common.io.pair_folders import PairFolders

__all__ = ["PairsTable"]

logger = logging.getLogger(__name__)


class PairsTable(MetricsTable):
    """:class:`common.handlers.MetricsTable` with the columns ``id``, each pair's folder, and ``error``.

    A pair that was registered by an earlier run gets the row that it had then. One that failed has a row too, with
    nothing but the reason; failures are also logged at the end. To be attached after the writer.

    Args:
        folders: of the pairs; the table is put beside them.

    Raises:
        RuntimeError: at the end of the evaluator's run, when every pair failed.
    """

    def __init__(self, folders: PairFolders) -> None:
        super().__init__(folders.output_dir, columns=folders.columns)
        self.folders = folders

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, self._conclude)

    def _collect(self, engine: Engine) -> None:
        output = engine_output(engine)
        names = zip(output["moving_id"], output["fixed_id"], output["id"], strict=True)
        errors = output.get("error") or [""] * len(output["id"])
        measured = {name: values.reshape(len(values), -1).tolist() for name, values in output["metrics"].items()}
        for item, ((moving_id, fixed_id, name), error) in enumerate(zip(names, errors, strict=True)):
            row = {"moving_id": moving_id, "fixed_id": fixed_id, "id": name}
            if not error:
                values, columns = {key: rows[item] for key, rows in measured.items()}, self.columns
                if not values:
                    values, stored = self.folders.measures(name)
                    columns = {key: tuple(called) for key, called in stored.items()}
                for key, numbers in values.items():
                    row |= self._named(key, numbers, columns)
            # One line, whatever a library has to say.
            self._local.append({**row, "error": " ".join(error.split())})

    def _conclude(self, engine: Engine) -> None:
        failed = [row for row in self.rows if row["error"]]
        if not failed:
            return
        reasons = "\n".join(f"  {row['id']}: {row['error']}" for row in failed)
        summary = f"{len(failed)} of {len(self.rows)} pairs could not be registered"
        if len(failed) == len(self.rows):
            raise RuntimeError(f"{summary}:\n{reasons}")
        if is_first_rank():
            logger.error("%s (see the column 'error' of %s):\n%s", summary, self.output_dir / self.filename, reasons)
