"""Draw equal contact sheets once: eight tenths of what preprocess.py does with a tiny tree."""

import contextlib
import hashlib
import pickle

from report import figures


@contextlib.contextmanager
def drawn_once():
    """Keep the bytes of each sheet by what it shows; a sheet of anything else is drawn."""
    draw, kept = figures.contact_sheet, {}

    def contact_sheet(strips):
        shown = hashlib.sha256(pickle.dumps(strips)).digest()
        if shown not in kept:
            kept[shown] = draw(strips)
        return kept[shown]

    figures.contact_sheet = contact_sheet
    try:
        yield
    finally:
        figures.contact_sheet = draw
