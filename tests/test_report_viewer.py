"""Tests of report/viewer.py: what it puts into a page, to the pixel."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import CHROMIUM, open_page
from PIL import Image

from report import page
from report.viewer import COLUMNS, Stack, viewer

SHAPE = (23, 6, 8)  # slices in three rows of a sheet, the last not full


def stack(title="sub-01", shape=SHAPE, seed=0):
    draws = np.random.default_rng(seed)
    slices = [draws.uniform(0, 1, shape).astype(np.float32) for _ in range(4)]
    return Stack(title, *slices, draws.uniform(size=shape) < 0.5,
                 {d: [f"{d} {k}" for k in range(shape[0])] for d in ("t1w-to-t2w", "t2w-to-t1w")})


class Scripts(HTMLParser):
    """Collect the content of scripts by id, and the tags."""

    def __init__(self, html):
        super().__init__()
        self.scripts, self.tags, self._inside = {}, [], None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "script":
            self._inside = dict(attributes).get("id", "")
            self.scripts[self._inside] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._inside = None

    def handle_data(self, data):
        if self._inside is not None:
            self.scripts[self._inside] += data


def data_of(html):
    return json.loads(Scripts(html).scripts["viewer-data"])


def slices_of(address, shape):
    """(n, H, W) uint8 of a sheet, and the rest of it."""
    count, height, width = shape
    prefix = "data:image/png;base64,"
    assert address.startswith(prefix)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix(prefix)))))
    assert sheet.shape == (-(-count // COLUMNS) * height, COLUMNS * width)
    tiles = [sheet[height * (k // COLUMNS):, width * (k % COLUMNS):][:height, :width]
             for k in range(sheet.size // (height * width))]
    return np.array(tiles[:count]), np.array(tiles[count:])


@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 5), (10, 4, 4), (11, 4, 4)])
def test_a_sheet_holds_each_slice_to_the_pixel(shape):
    given = stack(shape=shape)
    found, = data_of(viewer([given]))["stacks"]
    assert found["count"] == shape[0] and found["size"] == list(shape[1:])
    for name in ("t1w", "t2w", "to_t2w", "to_t1w"):
        slices, rest = slices_of(found["pictures"][name], shape)
        assert np.array_equal(slices, np.round(getattr(given, name) * 255).astype(np.uint8)), name
        assert not rest.any()
    mask, _ = slices_of(found["pictures"]["mask"], shape)
    assert np.array_equal(mask, given.mask * np.uint8(255))


def test_values_beyond_the_range_are_clipped_not_wrapped():
    given = stack()
    given.to_t2w[0, 0, :2] = (-0.2, 1.3)
    slices, _ = slices_of(data_of(viewer([given]))["stacks"][0]["pictures"]["to_t2w"], SHAPE)
    assert list(slices[0, 0, :2]) == [0, 255]


def test_stacks_keep_their_order_and_captions():
    found = data_of(viewer([stack("b"), stack("a", seed=1)]))
    assert [s["title"] for s in found["stacks"]] == ["b", "a"] and found["columns"] == COLUMNS
    assert found["stacks"][1]["captions"]["t2w-to-t1w"][22] == "t2w-to-t1w 22"


def test_a_title_cannot_end_the_script_or_begin_another():
    evil = "</script><script>alert(1)</script><!-- <script> \u2028 </SCRIPT>"
    html = page.page("title", [viewer([stack(evil)])])
    assert data_of(html)["stacks"][0]["title"] == evil
    assert Scripts(html).tags.count("script") == 2
    text = html[html.index("id='viewer-data'>"):html.index("'use strict'")]
    # a comment and a "<script" inside a script keep a browser from seeing its end
    assert "<!--" not in text and text.count("<script") == 1


def test_it_is_bytes_of_the_same_slices_and_refers_to_nothing():
    assert viewer([stack()]) == viewer([stack()])
    html = viewer([stack()])
    assert "http" not in html and "import" not in html and "fetch" not in html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_reads_a_title_that_looks_like_markup_as_text(tmp_path):
    evil = "</script><script>alert(1)</script><!-- <script> \u2028"
    (tmp_path / "page.html").write_text(page.page("title", [viewer([stack(evil)])]))
    with open_page(tmp_path / "page.html", tmp_path / "profile") as opened:
        opened.wait_for("document.getElementById('viewer-number').textContent === '12 of 23'")
        assert opened.run("document.getElementById('viewer-subject').options[0].label") == evil
        assert opened.run("document.scripts.length") == 2 and not opened.complaints
