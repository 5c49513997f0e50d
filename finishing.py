"""How preprocess.py ends: parts into the store, its splits, what is said of it, its report."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import platform
import sys
from collections.abc import Collection, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import console
from data import store
from data.atomic import write_atomically
from data.ledger import merge_sources
from data.shards import Record
from data.sources import Person
from data.splits import SPLITS, assign_splits, fitting
from report.preprocessing import look_at, preprocessing_page

log = logging.getLogger("preprocess.finishing")
TOOLS = ("numpy", "nibabel", "scipy", "SimpleITK", "torch", "HD-BET", "deepbet", "nilearn")


def finish(out: Path, record: Record, before: dict[str, Any] | None) -> dict[str, str]:
    """Assign splits, pack the store if anything is new, draw it, print the closing table.

    Returns id to reason of what is left out. Parts of other runs (another tree, other settings)
    stay aside, and so do those of subjects that are there under another name: the next run finds
    them made. A stored session that is refused now keeps its rows, hours of work perhaps, and that
    is said.
    """
    settled_rows = store.read_table(out / "subjects.tsv")
    stored = {row["id"] for row in settled_rows}
    fresh = {name: row for name, row in store.part_rows(out).items()
             if record.recipes.get(name) == row["recipe"]}
    twins = _twins(settled_rows, fresh, record.recipes)
    skipped = {name: f"{why}; its rows of before stay" if name in stored else why
               for name, why in {**record.skipped, **twins}.items()}
    fresh = {name: row for name, row in fresh.items() if name not in twins}
    rows = {row["id"]: row for row in settled_rows} | fresh
    if not rows:
        reason = next(iter(record.skipped.values()), "no subject was found")
        raise ValueError(f"no subject could be kept: {reason}"
                         + (f" (and {len(record.skipped) - 1} more)" if len(record.skipped) > 1
                            else ""))
    settled = {(r["dataset"], r["subject"]): r["split"] for r in settled_rows}
    people = [(r["dataset"], r["subject"]) for r in rows.values()]
    named, unused = _usable(record.choice, people, skipped)
    splits, said = assign_splits(people, record.choice["split"], **named, settled=settled)
    said = unused + said
    table = [{**row, "split": splits[row["dataset"], row["subject"]]} for row in rows.values()]
    ours = {*record.recipes, *record.skipped}
    reasons = {name: why for name, why in (store.read_skipped(out) if before else {}).items()
               if name not in ours}
    reasons.update(skipped)
    header = {**record.header,
              "sources": merge_sources((before or {}).get("sources", []), record.header["sources"],
                                       settled_rows, record.recipes)}
    if before and not fresh:
        header["versions"] = before.get("versions", {})
    if fresh or _differs(out, before, header, table, reasons):
        store.pack(out, header, table, reasons, fresh.keys())
    draw(out, again=False)
    print_table(out, skipped, said)
    return skipped


def _usable(choice: dict[str, Any], people: list[Person], skipped: Iterable[str],
            ) -> tuple[dict[str, list[str]], list[str]]:
    """Names for `--val` and `--test` less those of subjects that were left out; a line for each."""
    left_out = {tuple(name.split("_ses-")[0].rsplit("_sub-", 1)) for name in skipped}
    named: dict[str, list[str]] = {}
    said = []
    for split in ("val", "test"):
        named[split] = []
        for name in choice[split]:
            if fitting(name, people) or not fitting(name, left_out):
                named[split].append(name)
            else:
                said.append(f"--{split} {name}: was left out, see skipped.tsv")
    return named, said


def _twins(settled: list[dict[str, str]], fresh: dict[str, dict[str, str]],
           ours: Collection[str]) -> dict[str, str]:
    """Sessions of this run whose subject is there under another name: id to reason.

    Splits go by name, so that one person would be in two of them. Who is stored already stays.
    """
    people = {_person(row) for row in settled}
    rows = {row["id"]: row for row in settled} | fresh
    reasons: dict[Person, tuple[str, str]] = {}
    for row, first, kind in store.find_twins(sorted(
            rows.values(), key=lambda row: (_person(row) not in people, *_person(row), row["id"]))):
        why = (f"same scan as {first['id']} ({kind}); one person under two names would be in two "
               "splits")
        reasons.setdefault(_person(row), (row["id"], why))
    found = {}
    for name, row in rows.items():
        whose, why = reasons.get(_person(row), ("", ""))
        if why and name in ours:
            found[name] = why if whose == name else f"its session {whose} has the {why}"
    return found


def _person(row: dict[str, str]) -> Person:
    return row["dataset"], row["subject"]


def _differs(out: Path, before: dict[str, Any] | None, header: dict[str, Any],
             table: list[dict], reasons: dict[str, str]) -> bool:
    """Whether packing would change a table although no rows are new."""
    if before is None:
        return True
    splits = {r["id"]: r["split"] for r in store.read_table(out / "subjects.tsv")}
    skips = store.read_skipped(out)
    return (any(before.get(key) != header[key] for key in header)
            or splits != {r["id"]: r["split"] for r in table} or skips != reasons)


def versions() -> dict[str, str]:
    """Of Python and of what decides the slices."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def print_table(out: Path, skipped: dict[str, str], said: list[str]) -> None:
    """What is in a store, what its subjects' notes say, whom to cite, who was left out."""
    opened = store.SliceStore(out)
    counts = opened.header["counts"]
    log.info("\n%s", out)
    log.info("%-8s %9s %9s %9s", "split", "subjects", "sessions", "slices")
    for split in (*SPLITS, "all"):
        log.info("%-8s %9d %9d %9d", split, *(counts[what][split] for what in
                                              ("subjects", "sessions", "slices")))
    for line in said:
        log.info("note: %s", line)
    for subject in opened.subjects:
        if subject["note"]:
            log.info("note: %s: %s", subject["id"], subject["note"])
        if store.number(subject, "cut_share") > 0.005:
            log.info("note: %s: %.1f %% of the brain lies outside the frame; a larger --size "
                     "holds it", subject["id"], 100 * store.number(subject, "cut_share"))
    for source in opened.header["sources"]:
        log.info("cite %s: %s", source["dataset"], citation(source))
    if skipped:
        log.info("skipped %d (skipped.tsv):", len(skipped))
        for name in sorted(skipped):
            log.info("  %s: %s", name, skipped[name])


def citation(source: dict[str, Any]) -> str:
    """How to cite a dataset, as far as it says."""
    authors = source.get("authors") or []
    names = ", ".join(authors[:3]) + (" et al." if len(authors) > 3 else "")
    version, doi, licence = (source.get(key) for key in ("snapshot", "doi", "license"))
    said = (names, source.get("name") or source["dataset"], version and f"version {version}",
            doi and f"https://doi.org/{doi}", licence and f"licence {licence}")
    return ". ".join(part.rstrip(".") for part in said if part) + "."


def check(out: Path) -> int:
    """`--check`: print counts, then every fault with its rows."""
    problems = store.check(out)
    print_table(out, {}, [])
    _print_slices(store.SliceStore(out))
    for problem in problems:
        print(f"error: {out}: {problem}", file=sys.stderr)
    if problems:
        return console.WRONG_INPUT
    log.info("sound: every row was read and agrees with its hash")
    return console.DONE


def _print_slices(opened: store.SliceStore) -> None:
    """Slices a session, by dataset."""
    log.info("\n%-20s %9s %9s %7s %5s %5s", "slices a session", "sessions", "mean", "SD", "min",
             "max")
    for dataset in sorted({s["dataset"] for s in opened.subjects}):
        n = np.array([s["n_slices"] for s in opened.subjects if s["dataset"] == dataset])
        log.info("%-20s %9d %9.1f %7.1f %5d %5d", dataset, len(n), n.mean(),
                 n.std(ddof=1) if len(n) > 1 else 0.0, n.min(), n.max())


def draw(out: Path, *, again: bool = True) -> int:
    """Write the store's `report.html`: masks, alignment and figures of its subjects.

    Not `again`: only if the page shows another state of the store.
    """
    opened = store.SliceStore(out)
    state = hashlib.sha256(b"".join((out / name).read_bytes() for name in store.TABLES[1:]))
    mark = f"<!-- {state.hexdigest()} -->\n"
    page = out / "report.html"
    if not again and page.is_file():
        with open(page, encoding="utf-8", errors="replace") as html:
            if html.readline() == mark:
                return console.DONE
    shown = [look_at(row, functools.partial(opened.of_subject, subject)) for row, subject in zip(
        store.read_table(out / "subjects.tsv"), opened.subjects)]
    skipped = store.read_skipped(out)
    datasets = ", ".join(sorted({s["dataset"] for s in opened.subjects}))
    text = preprocessing_page(shown, skipped, f"Slices of {datasets}")
    write_atomically(page, (mark + text).encode())
    log.info("report: %s", page)
    return console.DONE
