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
"""A bundle as one file to hand out: what goes in, how documents read there, and the same bytes wherever it is made."""

from __future__ import annotations

from common.packaging.archive import build_zip
from common.packaging.contents import bundle_names

__all__ = ["build_zip", "bundle_names"]
