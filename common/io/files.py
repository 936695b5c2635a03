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
"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["writing"]


@contextmanager
def writing(path: str | Path, extensions: Sequence[str], overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to, and rename it when the block ends well.

    Args:
        path: of the file in the end; its folder is made.
        extensions: those that the format allows.
        overwrite: replace an existing file.

    Yields:
        the temporary path, with the same extension, for writers that choose the format by it.

    Raises:
        ValueError: for another extension.
        FileExistsError: when the file exists and ``overwrite`` is false.
        OSError: when the folder cannot be written to; the message names it.
    """
    path = Path(path)
    extension = next((e for e in sorted(extensions, key=len, reverse=True) if path.name.lower().endswith(e)), None)
    if extension is None:
        raise ValueError(f"{path}: expected a name that ends in one of {list(extensions)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".partial-", suffix=extension, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes files that only their owner reads; results should be as readable as any other file.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
