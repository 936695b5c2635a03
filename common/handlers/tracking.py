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
"""What MONAI's ``--tracking mlflow`` does not know of our engines, whose output is a dictionary of named values."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

__all__ = ["attach_handlers"]

# MONAI adds the file's name to `output_dir` as if that were an expression: "runs/x + '/config_20261231_235959.json'".
_NO_EXPRESSION = re.compile(r"(.+) \+ '(/config_\d+_\d+\.json)'", re.DOTALL)
_MONAIS_OWN = {"tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0"}


def attach_handlers(engine: Engine, handlers: Iterable[Any] | None) -> None:
    """Attach handlers to an engine; those of MLflow also log what they would miss.

    MONAI's handler expects one loss. Here it logs ``train_loss`` and each term as ``train_<term>``, an iteration each;
    at the start the options of the run as parameters and the executed config as an artifact; a run that fails is marked
    so. Every process makes a run of its own: MONAI would go on with one that was killed.

    Args:
        engine: a trainer or an evaluator whose output is a dictionary.
        handlers: with ``attach``; None entries, which are disabled, are dropped.
    """
    for handler in handlers or ():
        if handler is None:
            continue
        if isinstance(handler, MLFlowHandler):
            _complete(handler, engine)
        else:
            handler.attach(engine)


def _complete(handler: MLFlowHandler, engine: Engine) -> None:
    paths = [_repaired(str(path)) for path in handler.artifacts if path]
    handler.artifacts = tuple(Path(path) for path in paths)
    handler.run_name = handler.run_name or _run_name()
    handler.output_transform = _losses_as(handler.tag_name)
    handler.attach(engine)
    config = next((Path(path) for path in paths if Path(path).suffix == ".json"), None)
    engine.add_event_handler(Events.STARTED, lambda: _describe(handler, config))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: _fail(handler, error))


def _losses_as(tag: str) -> Callable[[Mapping[str, Any]], dict[str, float] | None]:
    """The loss under ``tag`` and its terms under their names; nothing of an evaluator, which has none."""

    def named(output: Mapping[str, Any]) -> dict[str, float] | None:
        if output.get("loss") is None:
            return None
        terms = {f"train_{name}": value for name, value in (output.get("losses") or {}).items()}
        return {name: float(value) for name, value in {tag: output["loss"], **terms}.items()}

    return named


def _describe(handler: MLFlowHandler, config: Path | None) -> None:
    """Log options and config at the start, so that a run that does not end has them too."""
    if config is None or not config.is_file():
        return
    run_id = handler.cur_run.info.run_id
    known = handler.client.get_run(run_id).data.params
    for name, value in _options(json.loads(config.read_text(encoding="utf-8"))).items():
        if name not in known:
            handler.client.log_param(run_id, name, value)
    handler.client.log_artifact(run_id, str(config))


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The bundle, and the top level's plain values; what is made of them is in the config itself."""
    meta = config.get("_meta_") or {}
    options = {f"bundle_{key}": meta[key] for key in ("name", "version") if key in meta}
    plain = {key: value for key, value in config.items() if key not in _MONAIS_OWN and _is_plain(value)}
    return {**options, **plain}


def _is_plain(value: Any) -> bool:
    """Whether a value stands for itself; objects, references, expressions and lists with them do not."""
    if isinstance(value, list):
        return all(_is_plain(entry) for entry in value)
    return not isinstance(value, dict) and not (isinstance(value, str) and value[:1] in ("$", "@", "%"))


def _fail(handler: MLFlowHandler, error: BaseException) -> None:
    if handler.cur_run is not None:
        handler.client.set_terminated(handler.cur_run.info.run_id, "FAILED")
    raise error


def _repaired(path: str) -> str:
    match = _NO_EXPRESSION.fullmatch(path)
    return match[1] + match[2] if match else path


@cache
def _run_name() -> str:
    """One name for the trainer and its validator, and another for every process."""
    return f"run_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"
