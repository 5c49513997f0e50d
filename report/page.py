"""One-file HTML pages: they open from disk, without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } .warning { background: #fff3cd; padding: .5rem 1rem; }
details > summary { cursor: pointer; margin-top: 1rem; } .wide { overflow-x: auto; }
.wide small { color: #777; white-space: nowrap; } .wide td { white-space: nowrap; }
.viewer figure { display: inline-block; margin: 0 .6% .6% 0; width: 31%; vertical-align: top; }
.viewer canvas { width: 100%; image-rendering: pixelated; background: #000; }
.viewer figcaption { font-size: .85rem; color: #444; } .viewer label { margin-right: 1.5rem; }
.note { color: #666; font-size: .9rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page from parts made by the functions below."""
    return (f"<!DOCTYPE html>\n<html lang='en'>\n<meta charset='utf-8'>\n"
            f"<meta name='viewport' content='width=device-width'>\n<title>{escape(title)}</title>\n"
            f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
            + "\n".join(parts) + "\n</html>\n")


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is "", "note" or "warning"."""
    return f"<p class='{kind}'>{escape(text)}</p>" if kind else f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; further lines of a cell are small."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_lines(v)}</td>" for v in row) + "</tr>"
                     for row in rows)
    return f"<div class='wide'><table>\n<tr>{head}</tr>\n{body}\n</table></div>"


def _lines(text: str) -> str:
    first, *others = escape(text).split("\n")
    return first + "".join(f"<br><small>{line}</small>" for line in others)


def details(summary: str, parts: Sequence[str]) -> str:
    """Parts that open on a click."""
    inside = "\n".join(parts)
    return f"<details><summary>{escape(summary)}</summary>\n{inside}\n</details>"


def picture(png: bytes, description: str) -> str:
    """A picture inside the page."""
    code = base64.b64encode(png).decode("ascii")
    return f"<img alt='{escape(description, quote=True)}' src='data:image/png;base64,{code}'>"
