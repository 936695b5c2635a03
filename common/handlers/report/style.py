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
"""How a report looks, on light and dark screens and on paper."""

from __future__ import annotations

from common.handlers.views import LABEL_COLOURS

__all__ = ["STYLE"]

_SWATCHES = "\n".join(f".swatch-{k} {{ background: {colour}; }}" for k, colour in enumerate(LABEL_COLOURS))

STYLE = (
    """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --text: #1d1f21; --soft: #5b6167; --line: #d5d8db; --panel: #ffffff; --accent: #0b63a5;
  --note: #fff4d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --text: #e7e9ea; --soft: #a3abb2; --line: #363b41; --panel: #1d2024; --accent: #6cb6f0;
    --note: #3d3212;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.2rem clamp(0.7rem, 3vw, 2rem) 3rem; max-width: 80rem;
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; margin: 0 0 0.2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0.3rem 0; }
.soft, figcaption { color: var(--soft); }
.name { overflow-wrap: anywhere; }
.note { background: var(--note); border-radius: 0.4rem; padding: 0.6rem 1rem; margin: 1rem 0; }
.note ul { margin: 0.2rem 0; padding-left: 1.2rem; }
[hidden] { display: none !important; }

.toolbar {
  position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line);
  padding: 0.5rem 0; margin-bottom: 0.8rem;
}
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.35rem; }
legend { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.choice { position: relative; }
.choice input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer; }
.choice span {
  display: block; padding: 0.25rem 0.75rem; border: 1px solid var(--line); border-radius: 1rem;
  background: var(--panel);
}
.choice input:checked + span { background: var(--accent); border-color: var(--accent); color: var(--page); }
:focus-visible, .choice input:focus-visible + span { outline: 3px solid var(--accent); outline-offset: 2px; }
.explain { min-height: 3.2rem; padding-top: 0.5rem; font-size: 0.92rem; color: var(--soft); }
.explain > div { display: flex; flex-wrap: wrap; align-items: center; gap: 0.2rem 1.2rem; }
.explain label { color: var(--text); display: inline-flex; align-items: center; gap: 0.5rem; }
.scale { display: inline-flex; align-items: center; gap: 0.5rem; color: var(--text); }
.scale img { width: 11rem; height: 0.8rem; border: 1px solid var(--line); }
.swatch {
  display: inline-block; width: 0.8rem; height: 0.8rem; border: 1px solid var(--soft); vertical-align: -0.05rem;
  margin-right: 0.3rem;
}
.swatch-fold { background: #ff0000; }
.swatch-moving { background: #ff00ff; }
.swatch-fixed { background: #00ff00; }
"""
    + _SWATCHES
    + """
.plane { margin: 0 0 1.6rem; break-inside: avoid; }
.panes { display: flex; flex-wrap: wrap; gap: 0.7rem; margin: 0.4rem 0; }
.pane { margin: 0; flex: 0 1 auto; }
.frame { position: relative; background: #000; }
.frame canvas { display: block; width: 100%; height: 100%; }
.side {
  position: absolute; color: #ffd92f; font-size: 0.8rem; line-height: 1; text-shadow: 0 0 3px #000, 0 0 3px #000;
}
.side-0 { left: 0.3rem; top: calc(50% - 0.4rem); }
.side-1 { right: 0.3rem; top: calc(50% - 0.4rem); }
.side-2 { bottom: 0.3rem; left: 0; right: 0; text-align: center; }
.side-3 { top: 0.3rem; left: 0; right: 0; text-align: center; }
figcaption { font-size: 0.9rem; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: 0.2rem 0.8rem; }
input { accent-color: var(--accent); }
.slider input { flex: 1 1 14rem; max-width: 34rem; }
.slider output { font-variant-numeric: tabular-nums; font-size: 0.9rem; color: var(--soft); }
details summary { cursor: pointer; font-size: 0.9rem; color: var(--soft); }
.sheet { display: block; max-width: 100%; margin: 0.4rem 0; background: #000; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.95rem; }
th, td {
  padding: 0.25rem 1.4rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
}
thead th { color: var(--soft); font-weight: normal; }
tbody th { font-weight: normal; min-width: 7rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre {
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border: 1px solid var(--line);
  border-radius: 0.4rem; padding: 0.7rem 1rem; font-size: 0.9rem;
}

@media print {
  :root { --page: #fff; --text: #000; --soft: #444; --line: #bbb; --panel: #fff; --note: #eee; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .toolbar { position: static; }
  .toolbar fieldset, .toolbar label, .slider input, .plane details { display: none; }
  .frame, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2 { break-after: avoid; }
}
"""
)
