"""Batches: unpaired, disjoint between processes, complete over a pass, and known in advance."""

import numpy as np
import pytest
import torch
from painted_store import write_store

from data.slices import UnpairedBatches, halves, paired_slices, paired_subjects, to_tensor
from data.store import SliceStore


@pytest.fixture(scope="module")
def slices(small_store):
    return SliceStore(small_store)


def a_pass(batches, epoch=0):
    """Rows of X and of Y of all steps of an epoch."""
    steps = [batches.rows(epoch, step) for step in range(batches.steps_per_epoch)]
    return tuple(np.concatenate(rows) for rows in zip(*steps))


def test_a_pass_shows_almost_all_training_slices_of_both_domains_once(slices):
    rows = slices.rows("train")
    for batch_size in (1, 4, 7):
        batches = UnpairedBatches(slices, batch_size=batch_size)
        for seen in a_pass(batches):
            assert len(seen) == len(set(seen)) == len(rows) - len(rows) % batch_size
            assert set(seen) <= set(rows)


def test_each_domain_has_its_own_order_so_pairs_meet_by_chance_only(slices):
    batches = UnpairedBatches(slices, batch_size=1)
    met = [np.equal(*a_pass(batches, epoch)).sum() for epoch in range(40)]
    assert 0.4 < np.mean(met) < 2, "two random orders agree in one place on average"
    x, y = a_pass(batches)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.4


def test_every_epoch_and_every_pass_within_one_is_shuffled_anew(slices):
    steps = len(slices.rows("train")) // 4
    n = 4 * steps
    long = UnpairedBatches(slices, batch_size=4, steps_per_epoch=3 * steps)
    x, _ = a_pass(long)
    passes = [tuple(x[i * n:(i + 1) * n]) for i in range(3)] + [tuple(a_pass(long, 1)[0][:n])]
    assert len(set(passes)) == 4
    assert all(len(set(rows)) == n for rows in passes)


def test_processes_take_disjoint_rows_and_together_what_one_process_would(slices):
    one = UnpairedBatches(slices, batch_size=6)
    three = [UnpairedBatches(slices, batch_size=2, rank=r, world=3) for r in range(3)]
    assert one.steps_per_epoch == three[0].steps_per_epoch
    for step in range(one.steps_per_epoch):
        for domain in (0, 1):
            parts = [b.rows(2, step)[domain] for b in three]
            np.testing.assert_array_equal(np.concatenate(parts), one.rows(2, step)[domain])
    everything = np.concatenate([a_pass(b)[0] for b in three])
    assert len(everything) == len(set(everything))


def test_what_a_step_sees_depends_on_seed_epoch_and_step_alone(slices):
    asked = [(3, 1), (0, 0), (7, 2), (0, 5), (3, 1)]
    forwards = UnpairedBatches(slices, batch_size=3)
    backwards = UnpairedBatches(slices, batch_size=3)
    first = {key: forwards.rows(*key) for key in asked}
    for key in reversed(asked):
        np.testing.assert_array_equal(backwards.rows(*key), first[key])
    other_seed = UnpairedBatches(slices, batch_size=3, seed=1)
    assert any((other_seed.rows(*key)[0] != first[key][0]).any() for key in asked)


def test_batches_are_the_stores_slices_at_those_rows(slices):
    batches = UnpairedBatches(slices, batch_size=5)
    for step, (real_x, real_y) in enumerate(batches.batches(4, workers=0)):
        x, y = batches.rows(4, step)
        assert real_x.shape == (5, 1, 48, 48) and real_x.dtype == torch.float32
        np.testing.assert_array_equal(real_x[:, 0], slices.t1w[x].astype(np.float32))
        np.testing.assert_array_equal(real_y[:, 0], slices.t2w[y].astype(np.float32))
    assert step == batches.steps_per_epoch - 1


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_reading_ahead_changes_nothing(workers, slices):
    batches = UnpairedBatches(slices, batch_size=4, steps_per_epoch=40)
    for (x, y), (ahead_x, ahead_y) in zip(batches.batches(1, workers=0),
                                          batches.batches(1, workers=workers), strict=True):
        assert torch.equal(x, ahead_x) and torch.equal(y, ahead_y)


def test_going_on_from_a_step_gives_the_rest_of_the_epoch(slices):
    batches = UnpairedBatches(slices, batch_size=4)
    whole = list(batches.batches(2, workers=2))
    rest = list(batches.batches(2, first_step=3, workers=2))
    assert len(rest) == len(whole) - 3
    for (x, y), (rest_x, rest_y) in zip(whole[3:], rest):
        assert torch.equal(x, rest_x) and torch.equal(y, rest_y)


def test_a_batch_larger_than_the_training_split_is_refused_with_both_numbers(slices):
    n = len(slices.rows("train"))
    with pytest.raises(ValueError, match=rf"split has {n} slices, a step of 2 x {n}.*{2 * n}"):
        UnpairedBatches(slices, batch_size=n, world=2)


def test_only_training_subjects_are_drawn_and_only_the_splits_own_are_paired(slices):
    held_out = np.concatenate([slices.rows("val"), slices.rows("test")])
    batches = UnpairedBatches(slices, batch_size=2, steps_per_epoch=200)
    for seen in a_pass(batches):
        assert not set(seen) & set(held_out)
    assert [s["subject"] for s in paired_subjects(slices, "val")] == ["04"]
    assert [s["subject"] for s in paired_subjects(slices, "test")] == ["05"]
    assert [s["subject"] for s in paired_subjects(slices, "train")] == ["01", "02", "03"]
    with pytest.raises(ValueError, match="unknown"):
        paired_subjects(slices, "dev")


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_paired_slices_are_a_subjects_rows_in_order_each_once(batch_size, slices):
    subject = paired_subjects(slices, "val")[0]
    span = slice(subject["first_row"], subject["first_row"] + subject["n_slices"])
    parts = list(paired_slices(slices, subject, batch_size))
    assert all(len(part[0]) <= batch_size for part in parts)
    real_x, real_y, mask = (torch.cat(each) for each in zip(*parts))
    np.testing.assert_array_equal(real_x[:, 0], slices.t1w[span])
    np.testing.assert_array_equal(real_y[:, 0], slices.t2w[span])
    np.testing.assert_array_equal(mask[:, 0], slices.mask(span))
    assert mask.dtype == torch.bool and real_x.shape[1:] == (1, 48, 48)


def test_a_tensor_is_a_copy_that_may_be_written(slices):
    tensor = to_tensor(slices.t1w[:2])
    tensor.fill_(7)
    assert slices.t1w[:2].max() <= 1


def test_strictly_unpaired_no_head_is_seen_in_both_domains(tmp_path):
    store = SliceStore(write_store(tmp_path / "slices", {
        "train": ["01_ses-a", "01_ses-b", "02", "03", "04", "05"], "val": ["06"]}))
    loader = UnpairedBatches(store, batch_size=2, strict=True)
    people = {row: (s["dataset"], s["subject"]) for s in store.subjects
              for row in range(s["first_row"], s["first_row"] + s["n_slices"])}
    seen_x, seen_y = set(), set()
    for epoch in range(3):
        for step in range(loader.steps_per_epoch):
            x, y = loader.rows(epoch, step)
            seen_x |= {people[r] for r in x}
            seen_y |= {people[r] for r in y}
    assert not seen_x & seen_y
    assert len(seen_x) == 2 and len(seen_y) == 3
    assert all(label != "06" for _, label in seen_x | seen_y)
    x, y = halves(store)
    assert sorted([*x, *y]) == store.rows("train").tolist()
    assert loader.steps_per_epoch == min(len(x), len(y)) // 2


def test_strictly_unpaired_needs_two_subjects(tmp_path):
    store = SliceStore(write_store(tmp_path / "slices", {"train": ["01_ses-a", "01_ses-b"]}))
    with pytest.raises(ValueError, match="has 1 training subjects, --strict-unpaired needs two"):
        UnpairedBatches(store, batch_size=1, strict=True)
