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
"""What moves in a report: slices and views, drawn from the contact sheets that the page holds."""

from __future__ import annotations

__all__ = ["SCRIPT"]

SCRIPT = """
"use strict";
window.addEventListener("load", function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const view = { name: "", share: 0.5, blink: false, second: false };
  const slices = {};
  // Without this script they would do nothing.
  for (const part of document.querySelectorAll(".toolbar, .panes, .slider")) part.hidden = false;

  // The grey values of one slice, from its place on a contact sheet.
  function read(plane, name, number) {
    const sheet = plane.sheets[name];
    const canvas = document.createElement("canvas");
    canvas.width = sheet.width;
    canvas.height = sheet.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    put(context, sheet, number, canvas.width, canvas.height);
    return context.getImageData(0, 0, canvas.width, canvas.height);
  }

  function put(context, sheet, number, width, height) {
    const left = (number % sheet.columns) * sheet.width;
    const top = Math.floor(number / sheet.columns) * sheet.height;
    const picture = document.getElementById(sheet.id);
    // Voxels are shown as they are, but what was sent coarser than the image is smoothed.
    context.imageSmoothingEnabled = sheet.coarse;
    context.drawImage(picture, left, top, sheet.width, sheet.height, 0, 0, width, height);
  }

  // One pixel from the grey values a (moving) and b (fixed); x and y from 0 to 1, across and down.
  const mixes = {
    colours: (a, b) => [a, b, a],
    checkerboard: (a, b, x, y, cells) => {
      const grey = (Math.floor(x * cells[0]) + Math.floor(y * cells[1])) % 2 ? a : b;
      return [grey, grey, grey];
    },
    swipe: (a, b, x) => {
      const fixed = view.blink ? view.second : x < view.share;
      return fixed ? [b, b, b] : [a, a, a];
    },
    difference: (a, b) => {
      const shade = Math.min(255, Math.round((255 * Math.abs(a - b)) / data.difference));
      return data.colours[shade];
    },
  };

  function mix(plane, pane, number) {
    const a = read(plane, pane.images[0], number);
    const b = read(plane, pane.images[1], number);
    const target = new ImageData(a.width, a.height);
    const longest = Math.max(plane.millimetres[0], plane.millimetres[1]);
    const cells = plane.millimetres.map((size) => Math.max(1, Math.round((data.cells * size) / longest)));
    for (let row = 0, at = 0; row < a.height; row += 1) {
      for (let column = 0; column < a.width; column += 1, at += 4) {
        const place = [(column + 0.5) / a.width, (row + 0.5) / a.height];
        target.data.set(mixes[pane.how](a.data[at], b.data[at], place[0], place[1], cells), at);
        target.data[at + 3] = 255;
      }
    }
    return target;
  }

  function draw(plane, pane, canvas, number) {
    canvas.width = plane.width * plane.zoom;
    canvas.height = plane.height * plane.zoom;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    if (pane.how === "sheet") {
      put(context, plane.sheets[pane.images[0]], number, canvas.width, canvas.height);
    } else {
      const small = document.createElement("canvas");
      small.width = plane.width;
      small.height = plane.height;
      small.getContext("2d").putImageData(mix(plane, pane, number), 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
    }
    for (const name of pane.over) {
      if (plane.sheets[name]) put(context, plane.sheets[name], number, canvas.width, canvas.height);
    }
    for (const mark of pane.marks) mark_points(context, plane, mark, number);
  }

  function mark_points(context, plane, mark, number) {
    const size = Math.max(3, context.canvas.width / 70);
    context.strokeStyle = mark.colour;
    context.lineWidth = Math.max(1, size / 3);
    for (const [slice, row, column] of plane.points[mark.name] || []) {
      if (slice !== number) continue;
      const x = (column + 0.5) * plane.zoom;
      const y = (row + 0.5) * plane.zoom;
      context.beginPath();
      if (mark.shape === "circle") {
        context.arc(x, y, size, 0, 2 * Math.PI);
      } else {
        context.moveTo(x - size, y - size);
        context.lineTo(x + size, y + size);
        context.moveTo(x - size, y + size);
        context.lineTo(x + size, y - size);
      }
      context.stroke();
    }
  }

  // All panes in one row where there is room, and a slice with its slider on one screen.
  function width(plane, count) {
    const [across, up] = plane.millimetres;
    const share = "calc((100% - " + 0.7 * (count - 1) + "rem) / " + count + ")";
    return "min(30rem, 100%, max(10rem, " + share + "), max(10rem, " + (62 * across) / up + "vh))";
  }

  function show(plane) {
    const panes = data.views[view.name];
    const number = slices[plane.key];
    const section = document.getElementById(plane.key);
    const caption = plane.captions[number];
    section.querySelectorAll(".pane").forEach((figure, k) => {
      figure.hidden = k >= panes.length;
      if (figure.hidden) return;
      figure.style.width = width(plane, panes.length);
      const canvas = figure.querySelector("canvas");
      draw(plane, panes[k], canvas, number);
      let title = panes[k].title;
      if (panes[k].how === "swipe" && view.blink) title += view.second ? ": fixed" : ": moving";
      figure.querySelector("figcaption").textContent = title;
      canvas.setAttribute("aria-label", plane.name + (caption ? ", " + caption : "") + ": " + title);
    });
    const slider = section.querySelector("input");
    if (!slider) return;
    slider.setAttribute("aria-valuetext", caption);
    section.querySelector("output").textContent = (number + 1) + " of " + plane.captions.length + ": " + caption;
  }

  function show_all() {
    data.planes.forEach(show);
  }

  for (const plane of data.planes) {
    const slider = document.getElementById(plane.key).querySelector("input");
    slices[plane.key] = slider ? Number(slider.value) - 1 : 0;
    for (const frame of document.getElementById(plane.key).querySelectorAll(".frame")) {
      frame.style.aspectRatio = plane.millimetres.join(" / ");
    }
    if (!slider) continue;
    slider.addEventListener("input", function () {
      slices[plane.key] = Number(slider.value) - 1;
      show(plane);
    });
  }
  function choose(name) {
    view.name = name;
    for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== name;
    show_all();
  }
  for (const radio of document.querySelectorAll("input[name=view]")) {
    radio.addEventListener("change", () => choose(radio.value));
  }
  const share = document.getElementById("share");
  share.addEventListener("input", function () {
    view.share = Number(share.value) / 100;
    show_all();
  });
  const blink = document.getElementById("blink");
  blink.addEventListener("change", function () {
    view.blink = blink.checked;
    show_all();
  });
  window.setInterval(function () {
    if (!view.blink || view.name !== "swipe") return;
    view.second = !view.second;
    show_all();
  }, 800);
  view.share = Number(share.value) / 100;
  view.blink = blink.checked;
  choose(document.querySelector("input[name=view]:checked").value);
});
"""
