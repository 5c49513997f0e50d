"""A viewer inside a page: all slices of a subject, with sliders for the slice and for a blend.

One picture a stack, slices beside each other; the page's own script draws them. No network.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLUMNS = 10  # of slices in a picture: some browsers refuse very wide ones


@dataclass(frozen=True)
class Stack:
    """A session's slices both ways, and their figures.

    Attributes
    ----------
    title : the session
    t1w, t2w, to_t2w, to_t1w : (n, H, W) in [0, 1]: real, and translated into T2w, into T1w
    mask : (n, H, W) bool
    captions : direction to a line a slice
    """

    title: str
    t1w: np.ndarray
    t2w: np.ndarray
    to_t2w: np.ndarray
    to_t1w: np.ndarray
    mask: np.ndarray
    captions: Mapping[str, Sequence[str]]


def viewer(stacks: Sequence[Stack]) -> str:
    """The viewer as a part of a page; stacks are offered in their order."""
    data = []
    for stack in stacks:
        pictures = {name: _sheet(getattr(stack, name)) for name in
                    ("t1w", "t2w", "to_t2w", "to_t1w", "mask")}
        data.append({"title": stack.title, "count": len(stack.t1w),
                     "size": list(stack.t1w.shape[1:]), "pictures": pictures,
                     "captions": {key: list(lines) for key, lines in stack.captions.items()}})
    # "</script" would end the script early, and "<!-- <script" hide its end, wherever they stood
    text = json.dumps({"columns": COLUMNS, "stacks": data}).replace("<", "\\u003c")
    return _HTML.replace("@DATA@", text)


def _sheet(slices: np.ndarray) -> str:
    """Slices beside and below each other, as the address of a PNG."""
    count, height, width = slices.shape
    rows = -(-count // COLUMNS)
    sheet = np.zeros((rows * COLUMNS, height, width), np.uint8)
    sheet[:count] = np.clip(np.round(slices.astype(np.float32) * 255), 0, 255)
    sheet = sheet.reshape(rows, COLUMNS, height, width).swapaxes(1, 2)
    out = io.BytesIO()
    Image.fromarray(sheet.reshape(rows * height, COLUMNS * width)).save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


_HTML = """<div class='viewer' id='viewer'>
<label>subject <select id='viewer-subject'></select>
 <select id='viewer-direction'><option value='t1w-to-t2w'>T1w to T2w</option>
 <option value='t2w-to-t1w'>T2w to T1w</option></select></label>
<label>slice <input type='range' id='viewer-slice' min='0' value='0'>
 <output id='viewer-number'></output></label>
<label>real <input type='range' id='viewer-blend' min='0' max='100' value='100'> translated</label>
<figure><canvas id='viewer-input'></canvas><figcaption id='viewer-input-name'></figcaption></figure>
<figure><canvas id='viewer-result'></canvas>
<figcaption id='viewer-result-name'></figcaption></figure>
<figure><canvas id='viewer-error'></canvas><figcaption>absolute error in the brain (0 to 0.5)
</figcaption></figure>
<p class='note' id='viewer-caption'></p>
</div>
<script type='application/json' id='viewer-data'>@DATA@</script>
<script>
'use strict';
(() => {
  const data = JSON.parse(document.getElementById('viewer-data').textContent);
  const at = name => document.getElementById('viewer-' + name);
  const names = {t1w: 'T1w', t2w: 'T2w'};
  let shown = null, images = {}, turn = 0;     // the stack whose pictures are loaded

  data.stacks.forEach((stack, i) => at('subject').add(new Option(stack.title, i)));

  async function load() {                       // the subject's pictures
    const mine = ++turn, stack = data.stacks[at('subject').value], found = {};
    await Promise.all(Object.entries(stack.pictures).map(async ([name, address]) => {
      const image = new Image();
      image.src = address;
      await image.decode();
      found[name] = image;
    }));
    if (mine !== turn) return;                  // another subject was chosen meanwhile
    [shown, images] = [stack, found];
    at('slice').max = stack.count - 1;
    at('slice').value = Math.floor(stack.count / 2);
    draw();
  }

  function levels(name, stack, k) {             // one slice's pixels, 0 to 255
    const [height, width] = stack.size, canvas = document.createElement('canvas');
    canvas.width = width; canvas.height = height;
    const pen = canvas.getContext('2d', {willReadFrequently: true});
    pen.drawImage(images[name], -(k % data.columns) * width,
                  -Math.floor(k / data.columns) * height);
    return pen.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 === 0);
  }

  function paint(name, stack, colour) {         // colour: pixel to [red, green, blue]
    const [height, width] = stack.size, canvas = at(name);
    canvas.width = width; canvas.height = height;
    const pen = canvas.getContext('2d'), picture = pen.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      picture.data.set([...colour(i), 255], 4 * i);
    }
    pen.putImageData(picture, 0, 0);
  }

  function draw() {
    if (!shown) return;                         // a slider was moved before the first is there
    const stack = shown, k = Number(at('slice').value);
    const direction = at('direction').value, [source, target] = direction.split('-to-');
    const given = levels(source, stack, k), real = levels(target, stack, k);
    const made = levels('to_' + target, stack, k), inside = levels('mask', stack, k);
    const share = at('blend').value / 100;
    paint('input', stack, i => [given[i], given[i], given[i]]);
    paint('result', stack, i => Array(3).fill((1 - share) * real[i] + share * made[i]));
    paint('error', stack, i => {                // black, red, yellow, white
      const e = inside[i] ? Math.min(2 * Math.abs(real[i] - made[i]), 255) * 3 : 0;
      return [e, e - 255, e - 510];
    });
    at('number').textContent = (k + 1) + ' of ' + stack.count;
    at('input-name').textContent = names[source] + ' (input)';
    at('result-name').textContent = names[target] + (share === 1 ? ' translated'
      : share === 0 ? ' real' : ' ' + at('blend').value + ' % translated, rest real');
    at('caption').textContent = stack.captions[direction][k];
  }

  at('subject').addEventListener('change', load);
  for (const name of ['slice', 'blend', 'direction']) at(name).addEventListener('input', draw);
  load();
})();
</script>"""
