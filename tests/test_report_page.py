"""Tests of report/page.py."""

import base64
from html.parser import HTMLParser

from report import page


class Elements(HTMLParser):
    """Collect tags with their attributes, and all text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_page_holds_its_parts_in_order_and_names_its_encoding():
    html = page.page("Title", [page.heading("One"), page.paragraph("two"), page.paragraph("three")])
    assert html.startswith("<!DOCTYPE html>")
    found = Elements(html)
    assert {"charset": "utf-8"} in found.all("meta")
    text = "".join(found.words)
    assert text.index("One") < text.index("two") < text.index("three")


def test_text_from_files_cannot_become_markup():
    evil = "<script>alert('x')</script> & \"quotes\""
    html = page.page(evil, [page.heading(evil), page.paragraph(evil, "note"),
                            page.table((evil,), [[evil]]), page.picture(b"png", evil)])
    found = Elements(html)
    assert not found.all("script")
    assert "".join(found.words).count(evil) == 6  # title twice, heading, paragraph, two cells
    assert found.all("img")[0]["alt"] == evil


def test_a_table_has_all_cells_in_their_rows():
    html = page.table(("a", "b"), [["1", "2"], ["3", "4"]])
    assert html.replace("\n", "") == (
        "<div class='wide'><table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr>"
        "<tr><td>3</td><td>4</td></tr></table></div>")


def test_further_lines_of_a_cell_are_small_and_no_markup():
    assert "<td>0.9<br><small>[0, &lt;1]</small></td>" in page.table(("a",), [["0.9\n[0, <1]"]])


def test_details_hold_their_parts_below_their_summary():
    found = Elements(page.details("more & more", [page.paragraph("inside")]))
    assert [name for name, _ in found.tags] == ["details", "summary", "p"]
    assert found.words == ["more & more", "\n", "inside", "\n"]


def test_a_picture_is_inside_the_page():
    source = Elements(page.picture(b"\x89PNG...", "what it shows")).all("img")[0]["src"]
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.split(",")[1]) == b"\x89PNG..."


def test_a_page_refers_to_nothing_outside_itself():
    html = page.page("T", [page.heading("h"), page.paragraph("p", "warning"),
                           page.picture(b"png", "d")])
    for _, attributes in Elements(html).tags:
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in html and "@import" not in html
