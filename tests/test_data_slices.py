"""Batches: unpaired, disjoint between processes, complete over a pass, and known in advance."""

import threading

import numpy as np
import pytest
import torch
from painted_store import change_rows, write_store

from data import slices as slices_module
from data.contrast import intensity_quantiles
from data.histogram import StandardRows, find_standard
from data.slices import (UnpairedBatches, halves, numbered, paired_slices, paired_subjects, scatter,
                         shown, to_tensor, training_sessions)
from data.store import SliceStore, rows_of, spans_of


@pytest.fixture(scope="module")
def slices(small_store):
    return SliceStore(small_store)


@pytest.fixture(params=["shuffled", "scattered"])
def drawn(request, monkeypatch):
    """Both ways to draw an order: as a whole, and a place at a time as large stores need it."""
    if request.param == "scattered":
        monkeypatch.setattr(slices_module, "SHUFFLED", 0)
        monkeypatch.setattr(slices_module, "PART", 10)


def a_pass(batches, epoch=0):
    """Rows of X and of Y of all steps of an epoch."""
    steps = [batches.rows(epoch, step) for step in range(batches.steps_per_epoch)]
    return tuple(np.concatenate(rows) for rows in zip(*steps))


def test_a_pass_shows_almost_all_training_slices_of_both_domains_once(slices, drawn):
    rows = slices.rows("train")
    for batch_size in (1, 4, 7):
        batches = UnpairedBatches(slices, batch_size=batch_size)
        for seen in a_pass(batches):
            assert len(seen) == len(set(seen)) == len(rows) - len(rows) % batch_size
            assert set(seen) <= set(rows)


@pytest.fixture
def uneven(tmp_path):
    """A store of three training subjects of 40, 6 and 17 slices, and one to validate."""
    return SliceStore(write_store(tmp_path / "uneven", {"train": ["01", "02", "03"], "val": ["04"]},
                                  n_slices={"01": 40, "02": 6, "03": 17, "04": 9}))


@pytest.mark.parametrize("batch_size, world", [(1, 1), (4, 1), (2, 2)])
def test_balanced_each_volume_is_shown_equally_often_and_by_and_by_each_of_its_slices(
        batch_size, world, uneven):
    loaders = [UnpairedBatches(uneven, batch_size=batch_size, balanced=True, rank=r, world=world)
               for r in range(world)]
    a_third = loaders[0].steps_per_epoch * batch_size * world / 3
    spans = uneven.spans("train")
    for domain in (0, 1):
        passes = [np.concatenate([a_pass(loader, epoch)[domain] for loader in loaders])
                  for epoch in range(30)]
        for seen in passes:
            for first, count in spans:
                own = seen[(seen >= first) & (seen < first + count)]
                assert abs(len(own) - a_third) <= 3  # a pass leaves out what fills no step
                times = np.bincount(own - first, minlength=count)
                assert times.max() <= -(-21 // count) + 1  # spread over all its slices
        often = np.bincount(np.concatenate(passes))
        assert set(np.flatnonzero(often)) == set(uneven.rows("train"))
        for first, count in spans:
            own = often[first:first + count]
            assert own.min() > 0.5 * own.mean() and own.max() < 1.6 * own.mean()


def test_balanced_no_process_of_a_step_sees_the_slice_of_another(uneven):
    loaders = [UnpairedBatches(uneven, batch_size=3, balanced=True, rank=r, world=4)
               for r in range(4)]
    again = 0
    for epoch in range(40):
        for step in range(loaders[0].steps_per_epoch):
            of_all = (loader.rows(epoch, step) for loader in loaders)
            for rows in map(np.concatenate, zip(*of_all)):
                counts = [np.isin(rows, np.arange(first, first + n)).sum()
                          for first, n in uneven.spans("train")]
                few = counts[1]  # of the volume of six slices
                assert len(set(rows)) == len(rows) - max(0, few - 6)
                again += few > 2
    assert again > 50  # such a step did happen


def test_balanced_draws_too_depend_on_seed_epoch_and_step_alone(uneven):
    forwards, again = (UnpairedBatches(uneven, batch_size=3, balanced=True) for _ in range(2))
    rows = a_pass(forwards, 2)
    list(again.rows(2, step) for step in reversed(range(again.steps_per_epoch)))
    np.testing.assert_array_equal(a_pass(again, 2), rows)
    other = UnpairedBatches(uneven, batch_size=3, balanced=True, seed=1)
    assert not np.array_equal(a_pass(other, 2), rows)
    assert not np.array_equal(*rows)  # each domain in its own order


def test_each_domain_has_its_own_order_so_pairs_meet_by_chance_only(slices, drawn):
    batches = UnpairedBatches(slices, batch_size=1)
    met = [np.equal(*a_pass(batches, epoch)).sum() for epoch in range(40)]
    assert 0.4 < np.mean(met) < 2, "two random orders agree in one place on average"
    x, y = a_pass(batches)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.4


def test_every_epoch_and_every_pass_within_one_is_shuffled_anew(slices, drawn):
    steps = len(slices.rows("train")) // 4
    n = 4 * steps
    long = UnpairedBatches(slices, batch_size=4, steps_per_epoch=3 * steps)
    x, _ = a_pass(long)
    passes = [tuple(x[i * n:(i + 1) * n]) for i in range(3)] + [tuple(a_pass(long, 1)[0][:n])]
    assert len(set(passes)) == 4
    assert all(len(set(rows)) == n for rows in passes)


def test_processes_take_disjoint_rows_and_together_what_one_process_would(slices, drawn):
    one = UnpairedBatches(slices, batch_size=6)
    three = [UnpairedBatches(slices, batch_size=2, rank=r, world=3) for r in range(3)]
    assert one.steps_per_epoch == three[0].steps_per_epoch
    for step in range(one.steps_per_epoch):
        for domain in (0, 1):
            parts = [b.rows(2, step)[domain] for b in three]
            np.testing.assert_array_equal(np.concatenate(parts), one.rows(2, step)[domain])
    everything = np.concatenate([a_pass(b)[0] for b in three])
    assert len(everything) == len(set(everything))


def test_what_a_step_sees_depends_on_seed_epoch_and_step_alone(slices, drawn):
    asked = [(3, 1), (0, 0), (7, 2), (0, 5), (3, 1)]
    forwards = UnpairedBatches(slices, batch_size=3)
    backwards = UnpairedBatches(slices, batch_size=3)
    first = {key: forwards.rows(*key) for key in asked}
    for key in reversed(asked):
        np.testing.assert_array_equal(backwards.rows(*key), first[key])
    other_seed = UnpairedBatches(slices, batch_size=3, seed=1)
    assert any((other_seed.rows(*key)[0] != first[key][0]).any() for key in asked)


def test_the_order_is_numpys_permutation_of_the_rows_so_that_old_runs_go_on_as_they_began(slices):
    rows = slices.rows("train")
    batches = UnpairedBatches(slices, batch_size=5, seed=3, rank=1, world=2)
    steps = len(rows) // 10
    for epoch, step in ((0, 0), (2, 1), (2, steps), (7, 2 * steps + 1)):
        turn, place = divmod(step, steps)
        for domain, found in enumerate(batches.rows(epoch, step)):
            order = np.random.default_rng([3, epoch, turn, domain]).permutation(rows)
            np.testing.assert_array_equal(found, order[10 * place + 5:10 * place + 10])
            assert found.dtype == np.int64


def test_a_scattered_order_holds_every_place_once_whatever_its_length():
    for n in (1, 2, 3, 17, 256, 1000, 5000):
        order = scatter(np.arange(n), n, [0, 1])
        assert sorted(order) == list(range(n))
        places = np.arange(n)[::-3]
        np.testing.assert_array_equal(scatter(places, n, [0, 1]), order[places])


def test_a_scattered_order_is_as_random_as_a_shuffle():
    n = 40_000
    order, other = (scatter(np.arange(n), n, [0, 0, 0, domain]) for domain in (0, 1))
    for a, b in ((order, np.arange(n)), (order, other), (order[1:], order[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / n ** 0.5
        assert (a == b).sum() < 8, "one on average"
    # where the first tenth lands: a chi-square of 99 degrees of freedom
    counts = np.bincount(order[:n // 10] * 100 // n, minlength=100)
    assert 55 < ((counts - n / 1000) ** 2 / (n / 1000)).sum() < 155
    steps = np.diff(order)
    assert len(np.unique(steps)) > 0.4 * n, "no stride repeats"
    # of 200 orders of 7, each place holds each value about as often
    small = np.array([scatter(np.arange(7), 7, [seed]) for seed in range(2000)])
    shares = np.stack([(small == value).mean(axis=0) for value in range(7)])
    np.testing.assert_allclose(shares, 1 / 7, atol=0.035)


@pytest.mark.parametrize("workers", [0, 2])
def test_half_gives_the_stored_bits_and_float32_the_same_values(workers, slices):
    batches = UnpairedBatches(slices, batch_size=3)
    wide = list(batches.batches(1, workers=workers))
    half = list(batches.batches(1, workers=workers, half=True))
    assert len(wide) == len(half) == batches.steps_per_epoch
    for step, (pair, stored) in enumerate(zip(wide, half)):
        for rows, array, a, b in zip(batches.rows(1, step), (slices.t1w, slices.t2w), pair, stored):
            assert b.dtype == torch.float16 and a.dtype == torch.float32
            assert a.shape == b.shape == (3, 1, 48, 48) and b.is_contiguous()
            np.testing.assert_array_equal(b[:, 0].numpy().view(np.uint16),
                                          array[rows].view(np.uint16))
            assert torch.equal(a, b.float())


@pytest.mark.parametrize("half", [True, False])
def test_slices_are_shown_with_the_standard_histogram_of_their_volumes(slices, half):
    standard = StandardRows(slices, find_standard(slices))
    plain = UnpairedBatches(slices, batch_size=3)
    batches = UnpairedBatches(slices, batch_size=3, standard=standard)
    for step, pair in enumerate(batches.batches(1, workers=2, half=half)):
        for rows, array, contrast, found in zip(plain.rows(1, step), (slices.t1w, slices.t2w),
                                                ("t1w", "t2w"), pair):
            wanted = shown(to_tensor(array[rows]).half(), rows, contrast, standard)
            assert torch.equal(found.half(), wanted)
            assert not torch.equal(found.half(), to_tensor(array[rows]).half())
    assert step == plain.steps_per_epoch - 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_targets_come_beside_what_is_shown(slices, half, workers):
    standard = StandardRows(slices, find_standard(slices, ["t1w"]))
    targets = StandardRows(slices, find_standard(slices, ["t2w"]))
    plain = UnpairedBatches(slices, batch_size=3)
    batches = UnpairedBatches(slices, batch_size=3, standard=standard, targets=targets)
    for step, (x, y) in enumerate(batches.batches(1, workers=workers, half=half)):
        t1w, t2w = (to_tensor(array[rows]).half()
                    for array, rows in zip((slices.t1w, slices.t2w), plain.rows(1, step)))
        rows_x, rows_y = plain.rows(1, step)
        assert torch.equal(x.half(), shown(t1w, rows_x, "t1w", standard))
        assert torch.equal(y[:, :1].half(), t2w)
        assert torch.equal(y[:, 1:].half(), shown(t2w, rows_y, "t2w", targets))
        assert y.dtype == (torch.float16 if half else torch.float32) and y.shape[:2] == (3, 2)
        assert not torch.equal(y[:, :1], y[:, 1:])


def test_strictly_unpaired_halves_are_told_by_contrast_and_no_other_head_is_looked_at(tmp_path):
    folder = write_store(tmp_path / "slices", {"train": ["01", "02", "03", "04"]})
    store = SliceStore(folder)
    both, seen = training_sessions(store), training_sessions(store, strict=True)
    assert both["t1w"] == both["t2w"] and len(both["t1w"]) == 4
    assert [rows_of(spans_of(seen[name])).tolist() for name in ("t1w", "t2w")] == [
        half.tolist() for half in halves(store)]
    before = find_standard(store, sessions=seen), intensity_quantiles(store, sessions=seen)
    for name, others in (("t1w", seen["t2w"]), ("t2w", seen["t1w"])):
        for s in others:  # whose scans of this contrast are in no batch
            rows = slice(s["first_row"], s["first_row"] + s["n_slices"])
            change_rows(folder, f"{name}.npy", rows, 0.9)
    store = SliceStore(folder)
    after = find_standard(store, sessions=seen), intensity_quantiles(store, sessions=seen)
    assert before[0].record() == after[0].record() != find_standard(store).record()
    for name in ("t1w", "t2w"):
        np.testing.assert_array_equal(before[1][name], after[1][name])


def test_what_is_shown_is_a_copy_and_without_a_standard_the_same(slices):
    rows = slices.rows("train")[:4]
    real = to_tensor(slices.t1w[rows])
    before = real.clone()
    changed = shown(real, rows, "t1w", StandardRows(slices, find_standard(slices)))
    assert torch.equal(real, before) and not torch.equal(changed, before)
    assert shown(real, rows, "t1w", None) is real


def test_a_subjects_slices_come_with_their_rows(slices):
    for subject in slices.subjects:
        found = list(numbered(slices, subject))
        rows = np.concatenate([rows for rows, _ in found])
        first = subject["first_row"]
        np.testing.assert_array_equal(rows, np.arange(first, first + subject["n_slices"]))
        for part, (real_x, real_y, mask) in found:
            np.testing.assert_array_equal(real_x[:, 0].numpy(), slices.t1w[part])
            assert len(real_y) == len(mask) == len(part)


def test_a_batch_belongs_to_who_asked_for_it(slices):
    batches = UnpairedBatches(slices, batch_size=2)
    for (x, y), (x_again, y_again) in zip(batches.batches(0, workers=2, half=True),
                                          batches.batches(0, workers=0, half=True), strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
        x.fill_(7)  # of no consequence to any later batch
        y.fill_(7)
    assert max(slices.t1w.max(), slices.t2w.max()) <= 1


def test_threads_end_with_the_loop_even_where_it_is_left_early(slices):
    before = threading.active_count()
    batches = UnpairedBatches(slices, batch_size=1, steps_per_epoch=500).batches(0, workers=3)
    next(batches)
    assert before < threading.active_count() <= before + 3
    batches.close()
    assert threading.active_count() == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_pinned_batches_reach_the_gpu_unharmed(slices):
    batches = UnpairedBatches(slices, batch_size=4, steps_per_epoch=60)
    on_gpu = []
    for x, y in batches.batches(0, workers=2, half=True, pin=True):
        assert x.is_pinned() and y.is_pinned()
        on_gpu.append([v.to("cuda", non_blocking=True) for v in (x, y)])
        del x, y
    for (x, y), (gpu_x, gpu_y) in zip(batches.batches(0, workers=0, half=True), on_gpu,
                                      strict=True):
        assert torch.equal(x, gpu_x.cpu()) and torch.equal(y, gpu_y.cpu())


def test_batches_are_the_stores_slices_at_those_rows(slices):
    batches = UnpairedBatches(slices, batch_size=5)
    for step, (real_x, real_y) in enumerate(batches.batches(4, workers=0)):
        x, y = batches.rows(4, step)
        assert real_x.shape == (5, 1, 48, 48) and real_x.dtype == torch.float32
        np.testing.assert_array_equal(real_x[:, 0], slices.t1w[x].astype(np.float32))
        np.testing.assert_array_equal(real_y[:, 0], slices.t2w[y].astype(np.float32))
    assert step == batches.steps_per_epoch - 1


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_reading_ahead_changes_nothing(workers, slices, drawn):
    batches = UnpairedBatches(slices, batch_size=4, steps_per_epoch=40)
    for (x, y), (ahead_x, ahead_y) in zip(batches.batches(1, workers=0),
                                          batches.batches(1, workers=workers), strict=True):
        assert torch.equal(x, ahead_x) and torch.equal(y, ahead_y)


def test_going_on_from_a_step_gives_the_rest_of_the_epoch(slices, drawn):
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
