"""The store's format: what is written is read, nothing half-written is, and no subject leaks."""

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import content

from data import store
from data.bids import subject_id
from data.store import COLUMNS, Part, SliceStore

SIZE = 36  # five bytes of mask a row, the last one half used
HEADER = {"size": SIZE, "spacing_mm": 1.5, "min_brain_area": 0.25, "intensity": {"rule": "x"},
          "split": [0.8, 0.1, 0.1], "seed": 0, "sources": [], "versions": {}}


def part(name, n=3, session="", seed=None):
    """A part of random slices in a random brain, as `prepare` makes it."""
    draws = np.random.default_rng(sum(map(ord, name)) if seed is None else seed)
    mask = draws.random((n, SIZE, SIZE)) < 0.3
    t1w, t2w = (np.where(mask, draws.uniform(-1, 1, mask.shape), -1).astype(np.float16)
                for _ in range(2))
    row = {c: "0" for c in COLUMNS if c not in ("split", "first_row")}
    row.update(id=subject_id("ds", name, session), dataset="ds", subject=name, session=session,
               t1w_sha256=f"t1w-{name}-{session}", t2w_sha256=f"t2w-{name}-{session}",
               n_slices=str(n), note="", recipe=f"recipe-{name}-{seed}",
               rows_sha256=store.digest_rows(t1w, t2w, np.packbits(mask, axis=-1)))
    return Part(t1w, t2w, mask, row)


def build(folder, parts, splits=("train", "val", "test"), skipped=None, header=HEADER):
    """Pack parts on top of what the folder holds."""
    for each in parts:
        store.write_part(folder, each)
    fresh = {p.row["id"]: p.row for p in parts}
    rows = {r["id"]: r for r in store.read_table(folder / "subjects.tsv")} | fresh
    table = [{**row, "split": row.get("split") or splits[i % len(splits)]}
             for i, row in enumerate(rows.values())]
    store.pack(folder, header, table, skipped or {}, set(fresh))
    return SliceStore(folder)


# -------------------------------------------------------------------------------- writing, reading


def test_what_is_packed_is_read_row_by_row(tmp_path):
    parts = [part("b", 2), part("a", 4), part("c", 1)]
    opened = build(tmp_path, parts, skipped={"ds_sub-z": "no T2w\tat\nall"})
    assert [(s["id"], s["first_row"], s["n_slices"]) for s in opened.subjects] == [
        ("ds_sub-a", 0, 4), ("ds_sub-b", 4, 2), ("ds_sub-c", 6, 1)]
    assert len(opened) == 7 and opened.size == SIZE
    for subject, made in zip(opened.subjects, sorted(parts, key=lambda p: p.row["id"])):
        rows = slice(subject["first_row"], subject["first_row"] + subject["n_slices"])
        np.testing.assert_array_equal(opened.t1w[rows], made.t1w)
        np.testing.assert_array_equal(opened.t2w[rows], made.t2w)
        np.testing.assert_array_equal(opened.mask(rows), made.mask)
    assert isinstance(opened.t1w, np.memmap) and not opened.t1w.flags.writeable
    assert store.read_table(tmp_path / "skipped.tsv") == [
        {"id": "ds_sub-z", "reason": "no T2w at all"}]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*store.ARRAYS, *store.TABLES))
    assert store.check(tmp_path) == []


def test_arrays_and_tables_are_plain_files_that_other_programs_read(tmp_path):
    made = part("a", 2)
    build(tmp_path, [made], splits=("val",))
    np.testing.assert_array_equal(np.load(tmp_path / "t2w.npy"), made.t2w)
    bits = np.unpackbits(np.load(tmp_path / "mask.npy"), axis=-1)[..., :SIZE]
    np.testing.assert_array_equal(bits, made.mask)
    lines = (tmp_path / "subjects.tsv").read_text().splitlines()
    assert lines[0].split("\t") == list(COLUMNS) and len(lines) == 2
    header = json.loads((tmp_path / "store.json").read_text())
    assert header["format"] == "t1w-t2w-slices" and header["version"] == 1
    assert header["counts"]["slices"] == {"all": 2, "train": 0, "val": 2, "test": 0}


def test_rows_of_a_split_are_those_of_its_subjects(tmp_path):
    opened = build(tmp_path, [part("a", 2), part("b", 3), part("c", 1), part("d", 2)],
                   splits=("train", "val"))
    np.testing.assert_array_equal(opened.rows("train"), [0, 1, 5])
    np.testing.assert_array_equal(opened.rows("val"), [2, 3, 4, 6, 7])
    assert opened.rows("test").size == 0 and opened.rows("test").dtype == np.int64
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        opened.rows("dev")


def test_scattered_rows_are_read_as_they_stand_and_none_beyond_the_end(tmp_path):
    opened = build(tmp_path, [part("a", 5), part("b", 4)])
    rows = np.array([8, 0, 3, 3, 7])
    for array in (opened.t1w, opened.t2w, opened.packed_mask, np.asarray(opened.t1w)):
        out = np.empty((5, *array.shape[1:]), array.dtype)
        store.RowReader(array).read_into(out, rows)
        np.testing.assert_array_equal(out, array[rows])
    for wrong in (9, -1):
        with pytest.raises(IndexError, match=f"{wrong}.* of 9"):
            store.RowReader(opened.t1w).read_into(np.empty((1, SIZE, SIZE), np.float16),
                                                  np.array([wrong]))


def test_subjects_are_a_sequence_whose_rows_are_made_when_asked_for(tmp_path):
    opened = build(tmp_path, [part("a", 5), part("b", 4), part("c", 2)])
    table = store.read_table(tmp_path / "subjects.tsv")
    wanted = [row | {"first_row": first, "n_slices": n}
              for row, first, n in zip(table, (0, 5, 9), (5, 4, 2))]
    subjects = opened.subjects
    assert list(subjects) == wanted and len(subjects) == 3 and subjects[1:] == wanted[1:]
    assert subjects[-1] == wanted[-1] and subjects[np.int64(1)] == wanted[1]
    assert all(type(subjects[0][c]) is int for c in ("first_row", "n_slices"))
    with pytest.raises(IndexError):
        subjects[3]
    np.testing.assert_array_equal(opened.spans("val"), [[5, 4]])
    np.testing.assert_array_equal(store.rows_of(np.array([[9, 2], [0, 3]])), [9, 10, 0, 1, 2])


@pytest.mark.parametrize("column, value", [
    ("first_row", "1.5"), ("n_slices", ""), ("first_row", "9" * 30), ("split", "dev"), ("id", "")])
def test_a_wrong_cell_of_the_table_is_refused(column, value, tmp_path):
    build(tmp_path, [part("a", 5), part("b", 4)])
    lines = [line.split("\t") for line in (tmp_path / "subjects.tsv").read_text().splitlines()]
    lines[2][lines[0].index(column)] = value
    (tmp_path / "subjects.tsv").write_text("\n".join(map("\t".join, lines)) + "\n")
    with pytest.raises(ValueError, match="subjects.tsv: .* has a wrong split, first_row or n_sli"):
        SliceStore(tmp_path)


def test_a_table_is_read_as_csv_reads_it(tmp_path):
    draws = np.random.default_rng(0)
    pieces = ["a", "b", "\t", "\t", "\n", "\r\n", " ", '"', "é", "\\", "a\tb\n", "\n\n"]
    for _ in range(500):
        text = "".join(draws.choice(pieces, draws.integers(25)))
        (tmp_path / "table.tsv").write_bytes(text.encode())
        with open(tmp_path / "table.tsv", encoding="utf-8", newline="") as lines:
            wanted = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert store.read_table(tmp_path / "table.tsv") == wanted, repr(text)


def test_counts_are_of_subjects_sessions_and_slices(tmp_path):
    opened = build(tmp_path, [part("a", 2, "1"), part("a", 3, "2"), part("b", 4)],
                   splits=("train",))
    assert opened.header["counts"] == {
        "subjects": {"all": 2, "train": 2, "val": 0, "test": 0},
        "sessions": {"all": 3, "train": 3, "val": 0, "test": 0},
        "slices": {"all": 9, "train": 9, "val": 0, "test": 0}}


def test_a_second_pack_keeps_old_rows_takes_new_ones_in_order_and_replaces_changed_ones(tmp_path):
    old_b, old_d, new_a, new_d = part("b", 2), part("d", 3), part("a", 1), part("d", 4, seed=99)
    build(tmp_path / "grown", [old_b, old_d])
    grown = build(tmp_path / "grown", [new_a, new_d])
    assert [s["id"] for s in grown.subjects] == ["ds_sub-a", "ds_sub-b", "ds_sub-d"]
    np.testing.assert_array_equal(grown.t1w, np.concatenate([new_a.t1w, old_b.t1w, new_d.t1w]))
    np.testing.assert_array_equal(grown.mask(slice(None)),
                                  np.concatenate([new_a.mask, old_b.mask, new_d.mask]))
    assert store.check(tmp_path / "grown") == []


def test_parts_that_are_not_asked_for_stay_aside(tmp_path):
    build(tmp_path, [part("a", 2)])
    store.write_part(tmp_path, part("a", 5, seed=7))
    store.write_part(tmp_path, part("z", 5))
    again = build(tmp_path, [part("b", 1)])
    assert [(s["id"], s["n_slices"]) for s in again.subjects] == [("ds_sub-a", 2), ("ds_sub-b", 1)]
    np.testing.assert_array_equal(again.t1w[:2], part("a", 2).t1w)
    assert sorted(store.part_rows(tmp_path)) == ["ds_sub-a", "ds_sub-z"]


def test_a_reader_of_the_old_arrays_is_not_disturbed_by_a_new_pack(tmp_path):
    opened = build(tmp_path, [part("b", 3)])
    build(tmp_path, [part("a", 3)])
    np.testing.assert_array_equal(opened.t1w, part("b", 3).t1w)


# ---------------------------------------------------------------------------- interrupted writes


def commit_state(tmp_path, renamed):
    """A store in the middle of a commit that adds a subject, `renamed` files being in place."""
    before, after, torn = tmp_path / "before", tmp_path / "after", tmp_path / "torn"
    build(before, [part("b", 3)])
    shutil.copytree(before, after)
    build(after, [part("a", 2)], skipped={"ds_sub-z": "why"})
    shutil.copytree(before, torn)
    store.write_part(torn, part("a", 2))
    for i, name in enumerate((*store.ARRAYS, *store.TABLES)):
        shutil.copy(after / name, torn / (name if i < renamed else f"{name}.new"))
    return before, after, torn


@pytest.mark.parametrize("renamed", range(7))
def test_a_commit_interrupted_between_any_two_renames_is_completed(renamed, tmp_path):
    _, after, torn = commit_state(tmp_path, renamed)
    (torn / store.COMMIT).write_text(
        json.dumps({"format": store.FORMAT, "parts": ["ds_sub-a.npz"]}))
    with pytest.raises(ValueError, match="interrupted; run preprocess.py again"):
        SliceStore(torn)
    store.recover(torn)
    assert content(torn) == content(after)
    store.recover(torn)
    assert content(torn) == content(after)


def test_without_its_commit_file_a_write_is_forgotten_but_not_the_parts(tmp_path):
    before, after, torn = commit_state(tmp_path, 0)
    (torn / "t1w.npy.new").write_bytes((after / "t1w.npy").read_bytes()[:500])
    (torn / "commit.json.77.tmp").write_text('{"par')
    (torn / "parts" / "ds_sub-c.npz.77.tmp").write_bytes(b"PK")
    store.recover(torn)
    assert list(store.part_rows(torn)) == ["ds_sub-a"]
    shutil.rmtree(torn / "parts")
    assert content(torn) == content(before)


def test_recovering_touches_no_file_that_is_not_a_stores(tmp_path):
    for name in ("notes.tmp", "thesis.new", "parts/sketch.tmp", "parts/data.npz", "t1w.npy.bak",
                 "sub/t1w.npy.new"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    kept = content(tmp_path)
    store.recover(tmp_path)
    assert store.part_rows(tmp_path) == {}
    build(tmp_path, [part("a")])
    assert kept.items() <= content(tmp_path).items()


@pytest.mark.parametrize("name", ["t1w.npy", "subjects.tsv", "report.html"])
def test_a_folder_with_somebody_elses_files_of_our_names_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has a {name} but no store.json, so it is no slice"):
        store.recover(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_damaged_list_of_the_skipped_is_named(tmp_path):
    build(tmp_path, [part("a")])
    for text in (None, "noise", "id\tother\na\tb\n", "id\treason\na\tb\tc\n"):
        (tmp_path / "skipped.tsv").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "skipped.tsv").write_text(text)
        assert "skipped.tsv: missing or damaged" in store.check(tmp_path)[0]
        with pytest.raises(ValueError, match="skipped.tsv: missing or damaged"):
            store.recover(tmp_path)


def test_somebody_elses_commit_file_is_refused_and_kept(tmp_path):
    for text in ("[]", '{"sha": 1}', "hello", '{"parts": []}',
                 json.dumps({"format": store.FORMAT, "parts": ["../notes.npz"]})):
        (tmp_path / "commit.json").write_text(text)
        with pytest.raises(ValueError, match="commit.json: not a slice store's file"):
            store.recover(tmp_path)
        assert (tmp_path / "commit.json").read_text() == text


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_part_cut_short_counts_for_none(share, tmp_path):
    store.write_part(tmp_path, part("a"))
    store.write_part(tmp_path, part("b"))
    path = tmp_path / "parts" / "ds_sub-a.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * share)])
    assert list(store.part_rows(tmp_path)) == ["ds_sub-b"]
    store.write_part(tmp_path, part("a"))
    assert path.read_bytes() == whole


def test_a_part_with_a_flipped_byte_stops_the_pack_and_leaves_the_store_as_it_was(tmp_path):
    build(tmp_path, [part("b")])
    kept = content(tmp_path)
    store.write_part(tmp_path, part("a"))
    path = tmp_path / "parts" / "ds_sub-a.npz"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(OSError, match="ds_sub-a.npz: damaged .*run the same command again"):
        store.pack(tmp_path, HEADER, [{**part("a").row, "split": "val"}], {}, {"ds_sub-a"})
    store.recover(tmp_path)
    assert not path.exists()
    path.parent.rmdir()
    assert content(tmp_path) == kept


# -------------------------------------------------------------------------------------- refusing


def edit_json(folder, **changes):
    header = json.loads((folder / "store.json").read_text())
    header.update(changes)
    (folder / "store.json").write_text(json.dumps(header))


def edit_table(folder, **changes):
    rows = store.read_table(folder / "subjects.tsv")
    rows[-1].update(changes)
    (folder / "subjects.tsv").write_bytes(store.table(COLUMNS, rows))


def save_as(name, make):
    return lambda f: np.save(f / name, make(np.load(f / name)))


REFUSED = {
    "another version": (lambda f: edit_json(f, version=2), "version 2, this program reads"),
    "another format": (lambda f: edit_json(f, format="zarr"), "format zarr version 1"),
    "no JSON": (lambda f: (f / "store.json").write_text("hello"), "not a slice store's header"),
    "a JSON list": (lambda f: (f / "store.json").write_text("[1]"), "not a slice store's header"),
    "no counts": (lambda f: edit_json(f, counts={}), "lacks size, counts or sources"),
    "other counts": (lambda f: edit_json(f, size=SIZE + 4), r"t1w.npy: is \(7, 36, 36\)"),
    "too few rows": (save_as("t2w.npy", lambda a: a[:-1]), r"t2w.npy: is \(6, 36, 36\)"),
    "another type": (save_as("t1w.npy", lambda a: a.astype("f4")), "float32, store.json says"),
    "another mask": (save_as("mask.npy", lambda a: a[..., 1:]), r"mask.npy: is \(7, 36, 4\)"),
    "a cut array": (lambda f: (f / "t1w.npy").write_bytes((f / "t1w.npy").read_bytes()[:-9]),
                    "t1w.npy: damaged"),
    "an empty array": (lambda f: (f / "t1w.npy").write_bytes(b""), "t1w.npy: damaged"),
    "no numbers": (lambda f: edit_table(f, n_slices="many"), "subjects.tsv: ds_sub-c has a wrong"),
    "another split": (lambda f: edit_table(f, split="dev"), "subjects.tsv: ds_sub-c has a wrong"),
    "another row": (lambda f: edit_table(f, first_row="5"), "row 5 with 1 slices, row 6 was due"),
    "more slices": (lambda f: edit_table(f, n_slices="2"), "counts 8 slices, store.json 7"),
    "no columns": (lambda f: (f / "subjects.tsv").write_text("id\tsplit\nds_sub-a\ttrain\n"),
                   "lacks dataset, subject"),
    "a binary table": (lambda f: (f / "subjects.tsv").write_bytes(b"\xff\xfe\x00"), "not a table"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_store_that_does_not_fit_together_is_refused_by_name(what, tmp_path):
    build(tmp_path, [part("a", 4), part("b", 2), part("c", 1)])
    spoil, message = REFUSED[what]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        SliceStore(tmp_path)
    assert str(tmp_path) in str(caught.value) and ";" in str(caught.value)


@pytest.mark.parametrize("name", [*store.ARRAYS, "store.json"])
def test_a_missing_file_is_named(name, tmp_path):
    build(tmp_path, [part("a")])
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        SliceStore(tmp_path)


@pytest.mark.parametrize("name, value", [("size", 64), ("spacing_mm", 2.0), ("seed", 1),
                                         ("min_brain_area", 0.5), ("split", [0.6, 0.2, 0.2]),
                                         ("intensity", {"rule": "y"})])
def test_other_settings_than_the_stores_are_refused_with_both_values(name, value, tmp_path):
    assert store.check_settings(tmp_path, HEADER) is None
    build(tmp_path, [part("a")])
    assert store.check_settings(tmp_path, HEADER)["size"] == SIZE
    with pytest.raises(ValueError) as caught:
        store.check_settings(tmp_path, {**HEADER, name: value})
    for said in (name, str(HEADER[name]), str(value), "another --out"):
        assert said in str(caught.value)


# ------------------------------------------------------------------------------------------ check


def spoil_row(name, row, change):
    def spoil(folder):
        array = np.load(folder / name)
        change(array, row)
        np.save(folder / name, array)
    return spoil


def background_pixel(folder, row):
    return tuple(np.argwhere(~SliceStore(folder).mask(slice(row, row + 1))[0])[0])


def flip_bit(array, row):
    array.view(np.uint16)[row, 3, 3] ^= 1


def set_value(value):
    def change(array, row):
        inside = np.argwhere(array[row] != -1)[0]
        array[(row, *inside)] = value
    return change


FAULTS = {
    "a flipped bit of T1w": (spoil_row("t1w.npy", 5, flip_bit), "ds_sub-b (rows 4 to 5): content"),
    "a flipped bit of T2w": (spoil_row("t2w.npy", 0, flip_bit), "ds_sub-a (rows 0 to 3): content"),
    "a flipped bit of the mask's padding": (
        spoil_row("mask.npy", 6, lambda a, row: a[row].__setitem__((0, -1), a[row, 0, -1] ^ 1)),
        "ds_sub-c (rows 6 to 6): content differs"),
    "NaN": (spoil_row("t2w.npy", 5, set_value(np.nan)),
            "ds_sub-b (rows 4 to 5): t2w has NaN in rows 5"),
    "infinity": (spoil_row("t1w.npy", 2, set_value(np.inf)),
                 "ds_sub-a (rows 0 to 3): t1w has NaN in rows 2"),
    "a value above 1": (spoil_row("t1w.npy", 1, set_value(1.001)),
                        "ds_sub-a (rows 0 to 3): t1w leaves [-1, 1] in rows 1"),
    "a value below -1": (spoil_row("t1w.npy", 1, set_value(-1.001)),
                         "ds_sub-a (rows 0 to 3): t1w leaves [-1, 1] in rows 1"),
    "background that is not -1": (
        lambda f: spoil_row("t2w.npy", 4, lambda a, row: a.__setitem__(
            (row, *background_pixel(f, row)), -0.999))(f),
        "ds_sub-b (rows 4 to 5): t2w is not -1 outside the brain in rows 4"),
    "an empty slice": (spoil_row("t2w.npy", 3, lambda a, row: a[row].fill(-1)),
                       "ds_sub-a (rows 0 to 3): t2w is empty in rows 3"),
    "no brain": (spoil_row("mask.npy", 3, lambda a, row: a[row].fill(0)),
                 "ds_sub-a (rows 0 to 3): no brain in rows 3"),
    "wrong counts": (lambda f: edit_json(f, counts={
        **SliceStore(f).header["counts"], "subjects": {"all": 9, "train": 1, "val": 1, "test": 1}}),
        "store.json: counts"),
    "a subject in two splits": (lambda f: edit_table(f, subject="b", dataset="ds"),
                                "ds_sub-c: in split test, another session"),
    "rows in no order": (lambda f: edit_table(f, id="ds_sub-0"), "ids are not unique and in order"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_check_finds_a_fault_and_names_subject_and_rows(what, tmp_path):
    build(tmp_path, [part("a", 4), part("b", 2), part("c", 1)])
    assert store.check(tmp_path) == []
    spoil, message = FAULTS[what]
    spoil(tmp_path)
    problems = store.check(tmp_path)
    assert any(message in problem for problem in problems), problems
    accused = {name for name in ("ds_sub-a", "ds_sub-b") if any(name in p for p in problems)}
    assert accused == {n for n in ("ds_sub-a", "ds_sub-b") if n in message}, "only the guilty"


def test_quotes_in_a_reason_do_not_join_the_lines_of_a_table(tmp_path):
    rows = [{"id": "a", "reason": '"unfinished'}, {"id": "b", "reason": 'it says "no"'}]
    (tmp_path / "t.tsv").write_bytes(store.table(("id", "reason"), rows))
    assert store.read_table(tmp_path / "t.tsv") == rows


def test_check_finds_one_scan_under_two_names_in_two_splits(tmp_path):
    twins = [part(name) for name in ("01", "02", "03", "04", "05", "06")]
    for one, other in ((0, 1), (0, 3)):  # train and val; both train
        twins[other].row["t2w_sha256"] = twins[one].row["t2w_sha256"]
    for unknown in (4, 5):  # val and test
        twins[unknown].row["t1w_sha256"] = ""
    build(tmp_path, twins)
    problem, = store.check(tmp_path)
    assert problem.startswith("ds_sub-02: in split val with the same scan (T2w) as ds_sub-01 in "
                              "train; ")
