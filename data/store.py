"""The slice store: memory-mapped arrays of T1w and T2w slices, and who is who.

A folder of `store.json`, `subjects.tsv`, `skipped.tsv`, `t1w.npy`, `t2w.npy` (N, H, W) float16 in
[-1, 1] and `mask.npy` (N, H, W/8) uint8, the brain as bits along W, most significant first. Row r
of all three is the same place in the same head; rows stand in the order of the subjects' ids, a
subject's from inferior to superior.

Owns the format: writer, reader and check. It imports neither nibabel nor torch. A subject
arrives as one file in `parts/` (written whole or not at all), and `pack` turns parts and the arrays
of before into new arrays behind one commit file, so a kill at any moment leaves either the old
store, or the new one, or a commit that the next writer completes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.atomic import sync_folder, write_atomically, write_synced
from data.splits import SPLITS

FORMAT = "t1w-t2w-slices"
VERSION = 1
ARRAYS = ("t1w.npy", "t2w.npy", "mask.npy")
TABLES = ("store.json", "subjects.tsv", "skipped.tsv")
COUNTED = ("subjects", "sessions", "slices")
_NEEDED = ("id", "split", "first_row", "n_slices")
_AGAIN = "delete the store and run preprocess.py again"
LAYOUT = "axial slices, inferior to superior; H anterior to posterior, W left to right"
COMMIT = "commit.json"
PARTS = "parts"
# Settings that all subjects of a store share; a run that asks for others is refused.
SHARED = ("size", "spacing_mm", "min_brain_area", "intensity", "split", "seed")
COLUMNS = (
    "id", "dataset", "subject", "session", "split", "first_row", "n_slices", "brain_ml", "t1w",
    "t2w", "t1w_sha256", "t2w_sha256", "brain_extraction", "registration", "translation_mm",
    "rotation_deg", "mi_before", "mi_after", "t2w_coverage", "cut_share", "slice_spacing_mm",
    "first_slice", "t1w_low", "t1w_high", "t2w_low", "t2w_high", "rows_sha256", "recipe", "note",
)


@dataclass(frozen=True)
class Part:
    """One subject's slices and its row of `subjects.tsv` (without split and first_row)."""

    t1w: np.ndarray  # (n, H, W) float16
    t2w: np.ndarray  # (n, H, W) float16
    mask: np.ndarray  # (n, H, W) bool
    row: dict[str, str]


# ---------------------------------------------------------------------------------------- reading


class SliceStore:
    """Read a store without loading it: arrays are memory maps.

    Attributes
    ----------
    folder : Path
    header : dict, the content of `store.json`
    subjects : sequence of dict, the rows of `subjects.tsv` with `first_row`, `n_slices` as int
    t1w, t2w : (N, H, W) float16 memory maps in [-1, 1]
    packed_mask : (N, ceil(W / 8)) uint8 memory map of the brain's bits

    Raises
    ------
    FileNotFoundError : no store there
    ValueError : another format or version, an unfinished write, or files that do not fit together
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.header = _read_header(self.folder)
        if (self.folder / COMMIT).exists():
            raise ValueError(f"{self.folder}: a write was interrupted; run preprocess.py again")
        self.subjects = Subjects(self.folder / "subjects.tsv")
        self.t1w, self.t2w, self.packed_mask = (self._open(name) for name in ARRAYS)
        self._check_shapes()

    @property
    def size(self) -> int:
        """Pixels a side."""
        return int(self.header["size"])

    def __len__(self) -> int:
        return len(self.t1w)

    def rows(self, split: str) -> np.ndarray:
        """(n,) int64 rows of a split, in the store's order."""
        return rows_of(self.spans(split))

    def spans(self, split: str) -> np.ndarray:
        """(n, 2) int64: first row and number of slices of each subject of a split."""
        if split not in SPLITS:
            raise ValueError(f"split '{split}' is unknown; one of {', '.join(SPLITS)}")
        return self.subjects.spans[self.subjects.splits == split]

    def mask(self, rows: np.ndarray | slice) -> np.ndarray:
        """(n, H, W) bool: the brain in these rows."""
        bits = np.unpackbits(self.packed_mask[rows], axis=-1, count=self.size)
        return bits.astype(bool)

    def of_subject(self, subject: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """T1w, T2w (n, H, W) float16 in [-1, 1] and brain (n, H, W) bool of a row of `subjects`."""
        span = slice(subject["first_row"], subject["first_row"] + subject["n_slices"])
        return self.t1w[span], self.t2w[span], self.mask(span)

    def _open(self, name: str) -> np.ndarray:
        path = self.folder / name
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; {_AGAIN}") from None
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: damaged ({error}); {_AGAIN}") from None

    def _check_shapes(self) -> None:
        n, size = self.header["counts"]["slices"]["all"], self.size
        wanted = {"t1w.npy": ((n, size, size), "float16"), "t2w.npy": ((n, size, size), "float16"),
                  "mask.npy": ((n, size, (size + 7) // 8), "uint8")}
        for name, array in zip(ARRAYS, (self.t1w, self.t2w, self.packed_mask)):
            shape, dtype = wanted[name]
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{self.folder / name}: is {array.shape} {array.dtype}, "
                                 f"store.json says {shape} {dtype}; {_AGAIN}")
        first, counts = self.subjects.spans.T
        due = np.cumsum(counts) - counts
        for place in np.flatnonzero((first != due) | (counts < 1))[:1]:
            raise ValueError(f"{self.folder / 'subjects.tsv'}: {self.subjects[place]['id']} starts "
                             f"at row {first[place]} with {counts[place]} slices, row "
                             f"{due[place]} was due; {_AGAIN}")
        row = counts.sum()
        if row != n:
            raise ValueError(f"{self.folder / 'subjects.tsv'}: counts {row} slices, store.json "
                             f"{n}; {_AGAIN}")


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "store.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no slice store there; make one with preprocess.py --out "
                                f"{folder}, or point to one with --slices")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        kind, version = header["format"], header["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a slice store's header; choose another folder") from None
    if kind != FORMAT or version != VERSION:
        raise ValueError(f"{path}: format {kind} version {version}, this program reads {FORMAT} "
                         f"version {VERSION}; make the store again with preprocess.py")
    try:
        int(header["size"])
        [int(header["counts"][what][split]) for what in COUNTED for split in ("all", *SPLITS)]
        [str(source["dataset"]) + source["snapshot"] for source in header["sources"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: lacks size, counts or sources; {_AGAIN}") from None
    return header


class Subjects(Sequence[dict[str, Any]]):
    """The rows of `subjects.tsv`, each made into a dict when it is asked for.

    All at once, a million subjects would take each process 7 s and 2.4 GB.

    Attributes
    ----------
    spans : (n, 2) int64, first row and number of slices of each
    splits : (n,) of `SPLITS`

    Raises
    ------
    ValueError : a table without what a store needs
    """

    def __init__(self, path: Path) -> None:
        self._names, self._lines = _read_lines(path)
        shortest = min((line.count("\t") for line in self._lines), default=len(COLUMNS)) + 1
        lacking = [c for c in COLUMNS if c not in self._names[:shortest]]
        if lacking and self._lines:
            raise ValueError(f"{path}: lacks {', '.join(lacking)}; {_AGAIN}")
        self.spans = np.empty((len(self._lines), 2), np.int64)
        self.splits = np.empty(len(self._lines), "U5")
        wanted = [self._names.index(c) for c in _NEEDED] if self._lines else []
        for place, line in enumerate(self._lines):
            values = line.split("\t", max(wanted) + 1)
            name, split, first, count = (values[i] for i in wanted)
            try:
                self.spans[place] = int(first), int(count)
            except (ValueError, OverflowError):
                name = ""
            if not name or split not in SPLITS:
                raise ValueError(f"{path}: {values[wanted[0]]} has a wrong split, first_row or "
                                 f"n_slices; {_AGAIN}")
            self.splits[place] = split

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        row = _make_row(self._names, self._lines[place])
        row["first_row"], row["n_slices"] = self.spans[place].tolist()
        return row


def spans_of(subjects: Iterable[dict[str, Any]]) -> np.ndarray:
    """(n, 2) int64: first row and number of slices of each of these rows of `Subjects`."""
    pairs = (number for s in subjects for number in (s["first_row"], s["n_slices"]))
    return np.fromiter(pairs, np.int64).reshape(-1, 2)


def rows_of(spans: np.ndarray) -> np.ndarray:
    """(n,) int64: the rows of `spans_of`, one after the other."""
    first, counts = spans.T
    rows = np.ones(counts.sum(), np.int64)
    if len(rows):  # a step of one, but from span to span
        rows[np.cumsum(counts) - counts] = first - np.concatenate([[0], (first + counts - 1)[:-1]])
    return np.cumsum(rows, out=rows)


class RowReader:
    """Copy scattered rows out of an array of a store.

    Whoever touches rows of a memory map waits for the disk row by row. Here the system is told
    first which rows are needed, and reads them side by side: of a store that is larger than the
    memory that gives 10 to 20 times as many slices a second (benchmarks/loader.py).

    Parameters
    ----------
    array : of a `SliceStore`
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array.view(np.ndarray)
        self._file, self._begin = None, 0
        if isinstance(array, np.memmap) and array.filename and hasattr(os, "posix_fadvise"):
            self._file = open(array.filename, "rb", buffering=0)
            self._begin = array.offset

    def read_into(self, out: np.ndarray, rows: np.ndarray) -> None:
        """Fill `out` (n, H, W) with `rows` (n,), without holding Python's lock."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._array):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self._array)}")
        if self._file is not None:
            size = self._array[0].nbytes
            with contextlib.suppress(OSError):  # a file system that takes no advice
                for place in (self._begin + rows * size).tolist():
                    os.posix_fadvise(self._file.fileno(), place, size, os.POSIX_FADV_WILLNEED)
        np.take(self._array, rows, axis=0, out=out, mode="clip")  # "raise" fills a copy first


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a tab-separated table with a header line; [] where there is no such file.

    As `csv.DictReader` has it: a short line's last columns are None, what a long one has too much
    is a list under None, empty lines are left out.
    """
    names, lines = _read_lines(path)
    return [_make_row(names, line) for line in lines]


def _read_lines(path: Path) -> tuple[list[str], list[str]]:
    """Columns and lines of a table; none where there is no such file."""
    try:
        with open(path, encoding="utf-8") as table_file:
            header, *lines = table_file.read().split("\n")
    except FileNotFoundError:
        return [], []
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a table of text; {_AGAIN}") from None
    return header.split("\t") if header else [], [line for line in lines if line]


def _make_row(names: list[str], line: str) -> dict[Any, Any]:
    values: list[Any] = line.split("\t")
    row: dict[Any, Any] = dict(zip(names, values))
    if len(values) < len(names):
        row = dict(zip(names, values + [None] * len(names)))
    elif len(values) > len(names):
        row[None] = values[len(names):]
    return row


# ---------------------------------------------------------------------------------------- writing


def check_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The header of the store in `folder` (None if there is none), if it was built with `settings`.

    Raises
    ------
    ValueError : the store was built otherwise; names the setting and both values
    """
    if not (folder / "store.json").exists():
        return None
    header = _read_header(folder)
    for name in SHARED:
        if header.get(name) != json.loads(json.dumps(settings[name])):
            raise ValueError(f"{folder / 'store.json'}: built with {name} {header.get(name)}, now "
                             f"asked for {settings[name]}; choose another --out, or delete this "
                             "store")
    return header


def recover(folder: Path) -> None:
    """Complete or forget what an interrupted run left, before anything is read or written."""
    if (folder / COMMIT).exists():
        _complete(folder)
    _refuse_others(folder)
    ours = [*(f"{name}.new" for name in (*ARRAYS, *TABLES)), f"{COMMIT}.*.tmp",
            f"{PARTS}/*.npz.*.tmp", "shards/*.json.*.tmp", "report.html.*.tmp"]
    for leftover in [path for pattern in ours for path in folder.glob(pattern)]:
        leftover.unlink()


def _refuse_others(folder: Path) -> None:
    """Raise ValueError where a store's names are taken by files that are none."""
    taken = [name for name in (*ARRAYS, *TABLES[1:], "report.html") if (folder / name).exists()]
    if taken and not (folder / "store.json").exists():
        raise ValueError(f"{folder}: has a {taken[0]} but no store.json, so it is no slice store, "
                         "or a damaged one; choose another --out, or delete what is of the store")
    if (folder / "store.json").exists():
        SliceStore(folder)
        read_skipped(folder)


def scans_of(session: dict[str, Any]) -> list[str]:
    """A session's T1w and T2w by the beginnings of their SHA-256, where the store has them.

    So that a training subject is known again under another name.
    """
    return [digest[:16] for name in ("t1w_sha256", "t2w_sha256") if (digest := session.get(name))]


def find_twins(rows: Iterable[dict[str, Any]],
               ) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Rows of `subjects.tsv` that share a scan with a row of another subject before them.

    Yields
    ------
    row, the first row with that scan, and what they share: T1w, T2w or slices (of scans that were
    compressed anew, whose files differ); rows without hashes have no twins
    """
    owners: dict[str, dict[str, Any]] = {}
    for row in rows:
        for kind in ("T1w", "T2w", "slices"):
            column = "rows_sha256" if kind == "slices" else f"{kind.lower()}_sha256"
            if digest := row.get(column):
                first = owners.setdefault(digest, row)
                if (first["dataset"], first["subject"]) != (row["dataset"], row["subject"]):
                    yield row, first, kind


def number(row: Mapping[str, Any], column: str) -> float:
    """A figure of a row of `subjects.tsv`.

    Raises
    ------
    ValueError : it is none
    """
    try:
        return float(row[column])
    except (KeyError, ValueError):
        raise ValueError(f"subjects.tsv: {row['id']}: {column} is {row.get(column)!r}, no number; "
                         f"{_AGAIN}") from None


def read_skipped(folder: Path) -> dict[str, str]:
    """Id to reason from `skipped.tsv`.

    Raises
    ------
    ValueError : the table is not there, or none
    """
    path = folder / "skipped.tsv"
    rows = read_table(path)
    if not path.is_file() or path.read_bytes().split(b"\n")[0] != b"id\treason" or any(
            None in row.values() or None in row for row in rows):
        raise ValueError(f"{path}: missing or damaged; {_AGAIN}")
    return {row["id"]: row["reason"] for row in rows}


def read_header(folder: Path) -> dict[str, Any]:
    """The content of `store.json`, {} where there is none; see `SliceStore` for errors."""
    return _read_header(folder) if (folder / "store.json").exists() else {}


def write_part(folder: Path, part: Part, *, snapshot: str = "") -> None:
    """Keep one finished subject until the next `pack`; whole or not at all.

    `snapshot` is the version of the dataset that its files are from, where that is known.
    """
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, t1w=part.t1w, t2w=part.t2w, mask=np.packbits(part.mask, axis=-1),
             row=np.array(json.dumps({**part.row, "snapshot": snapshot})))
    write_atomically(parts / f"{part.row['id']}.npz", buffer.getvalue())


def part_rows(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of all parts by id, without their arrays; a damaged part counts for none."""
    rows = {}
    for path in sorted((folder / PARTS).glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as stored:
                row = json.loads(str(stored["row"]))
            rows[row["id"]] = row
        except Exception:  # zipfile, numpy and json each raise their own
            continue
    return rows


def digest_rows(t1w: np.ndarray, t2w: np.ndarray, packed_mask: np.ndarray) -> str:
    """Hash of a subject's rows of the three arrays."""
    digest = hashlib.sha256()
    for array in (t1w, t2w, packed_mask):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def pack(folder: Path, header: dict[str, Any], subjects: list[dict[str, Any]],
         skipped: dict[str, str], fresh: Collection[str]) -> None:
    """Write the store anew from its parts and from the arrays that it has.

    Parameters
    ----------
    folder : the store
    header : `store.json` without format, version and counts
    subjects : the table's rows with `split`. A subject that is not among them leaves the store.
    skipped : id to reason
    fresh : ids whose slices come from their parts, the others' come from the present arrays; parts
        of other ids stay where they are

    Raises
    ------
    OSError : a part is damaged (it is deleted, and the next run makes it anew)
    """
    subjects = sorted(subjects, key=lambda s: s["id"])
    old = SliceStore(folder) if (folder / "store.json").exists() else None
    spans = {s["id"]: slice(s["first_row"], s["first_row"] + s["n_slices"])
             for s in (old.subjects if old else ())}
    first = 0
    rows = []
    for subject in subjects:
        rows.append({**subject, "first_row": first})
        first += int(subject["n_slices"])
    size = int(header["size"])
    shapes = [(first, size, size), (first, size, size), (first, size, (size + 7) // 8)]
    dtypes = ["float16", "float16", "uint8"]
    for index, (name, attribute) in enumerate(zip(ARRAYS, ("t1w", "t2w", "packed_mask"))):
        blocks = (_fresh_block(folder, s["id"], name) if s["id"] in fresh
                  else getattr(old, attribute)[spans[s["id"]]] for s in rows)
        _write_array(folder / f"{name}.new", shapes[index], dtypes[index], blocks)
    full = {"format": FORMAT, "version": VERSION, **header, "layout": LAYOUT,
            "mask": "bits along W, most significant first", "counts": counts(rows)}
    write_synced(folder / "store.json.new", [(json.dumps(full, indent=1) + "\n").encode()])
    write_synced(folder / "subjects.tsv.new", [table(COLUMNS, rows)])
    write_synced(folder / "skipped.tsv.new", [table(
        ("id", "reason"), [{"id": i, "reason": skipped[i]} for i in sorted(skipped)])])
    done = [f"{s['id']}.npz" for s in rows if s["id"] in fresh]
    write_atomically(folder / COMMIT, json.dumps({"format": FORMAT, "parts": done}).encode())
    _complete(folder)


def _fresh_block(folder: Path, name: str, array: str) -> np.ndarray:
    """One array of a part."""
    path = folder / PARTS / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored[array.removesuffix(".npy")]
    except Exception as error:  # as in part_rows
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: damaged ({error}); run the same command again") from None


def counts(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many subjects, sessions and slices there are, in all and in each split, of such rows."""
    found = {what: dict.fromkeys(("all", *SPLITS), 0) for what in COUNTED}
    seen = set()
    for row in rows:
        for split in ("all", row["split"]):
            found["sessions"][split] += 1
            found["slices"][split] += int(row["n_slices"])
            found["subjects"][split] += (row["dataset"], row["subject"]) not in seen
        seen.add((row["dataset"], row["subject"]))
    return found


def _write_array(path: Path, shape: tuple[int, ...], dtype: str,
                 blocks: Iterator[np.ndarray]) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False,
                 "shape": shape})
    content = (np.ascontiguousarray(block, dtype=dtype).tobytes() for block in blocks)
    write_synced(path, itertools.chain([header.getvalue()], content))


def _complete(folder: Path) -> None:
    """Carry out a commit; may be interrupted and begun again at any point."""
    try:
        commit = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        parts = [str(name) for name in commit["parts"]]
        if commit["format"] != FORMAT or any(Path(name).name != name for name in parts):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder / COMMIT}: not a slice store's file; choose another --out") from None
    for name in (*ARRAYS, *TABLES):
        new = folder / f"{name}.new"
        if new.exists():
            os.replace(new, folder / name)
    for name in parts:
        (folder / PARTS / name).unlink(missing_ok=True)
    if (folder / PARTS).is_dir() and not any((folder / PARTS).iterdir()):
        (folder / PARTS).rmdir()
    sync_folder(folder)
    (folder / COMMIT).unlink()


def table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> bytes:
    """A tab-separated table; tabs and line ends inside a value become spaces."""
    lines = ["\t".join(columns)]
    for row in rows:
        lines.append("\t".join(re.sub(r"[\t\r\n]+", " ", str(row.get(c, ""))) for c in columns))
    return ("\n".join(lines) + "\n").encode()


# ------------------------------------------------------------------------------------------ check


def check(folder: Path) -> list[str]:
    """Verify a store from end to end.

    Returns
    -------
    What is wrong, one line each with the subject and its rows; [] for a sound store

    Raises
    ------
    FileNotFoundError, ValueError : as `SliceStore`
    """
    store = SliceStore(folder)
    problems = [f"store.json: lacks {name}; {_AGAIN}" for name in SHARED
                if name not in store.header]
    try:
        read_skipped(folder)
    except ValueError as error:
        problems.append(str(error))
    owner: dict[tuple[str, str], str] = {}
    for subject in store.subjects:
        person = (subject["dataset"], subject["subject"])
        if owner.setdefault(person, subject["split"]) != subject["split"]:
            problems.append(f"{subject['id']}: in split {subject['split']}, another session of the "
                            f"same subject in {owner[person]}")
        problems += _check_rows(store, subject)
    problems += [f"{row['id']}: in split {row['split']} with the same scan ({kind}) as "
                 f"{first['id']} in {first['split']}; {_AGAIN}"
                 for row, first, kind in find_twins(store.subjects)
                 if row["split"] != first["split"]]
    ids = [s["id"] for s in store.subjects]
    if ids != sorted(set(ids)):
        problems.append("subjects.tsv: ids are not unique and in order")
    if (found := counts(store.subjects)) != store.header["counts"]:
        problems.append(f"store.json: counts {store.header['counts']}, subjects.tsv has {found}")
    return problems


def _check_rows(store: SliceStore, subject: dict[str, Any]) -> list[str]:
    first, n = subject["first_row"], subject["n_slices"]
    span = slice(first, first + n)
    where = f"{subject['id']} (rows {first} to {first + n - 1})"
    mask = store.mask(span)
    problems = []
    for name, array in (("t1w", store.t1w), ("t2w", store.t2w)):
        values = np.asarray(array[span], dtype=np.float32)
        bad = ~np.isfinite(values)
        if bad.any():
            problems.append(f"{where}: {name} has NaN in rows {_rows_of(bad, first)}")
            continue
        beyond = np.abs(values) > 1
        if beyond.any():
            problems.append(f"{where}: {name} leaves [-1, 1] in rows {_rows_of(beyond, first)}")
        stray = (values != -1) & ~mask
        if stray.any():
            problems.append(f"{where}: {name} is not -1 outside the brain in rows "
                            f"{_rows_of(stray, first)}")
        flat = np.all(values == values[:, :1, :1], axis=(1, 2))
        if flat.any():
            problems.append(f"{where}: {name} is empty in rows {_rows_of(flat, first)}")
    empty = np.logical_not(mask.any(axis=(1, 2)))
    if empty.any():
        problems.append(f"{where}: no brain in rows {_rows_of(empty, first)}")
    if digest_rows(store.t1w[span], store.t2w[span], store.packed_mask[span]) \
            != subject["rows_sha256"]:
        problems.append(f"{where}: content differs from its hash in subjects.tsv")
    return problems


def _rows_of(bad: np.ndarray, first: int) -> str:
    rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1)) + first
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
