"""Tests of ceiling.py on painted stores: pairs, schedule, stops, refusals, and that it learns."""

import os
import signal
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
from painted_store import write_store

import ceiling
from ceiling import Paired, train_ceiling
from config import TrainConfig, plain
from data.histogram import StandardRows, find_standard
from data.slices import shown
from data.store import SliceStore
from measuring import Method, measure_session, over_slices, select
from models import checkpoint
from models.baseline import LookUpTable

CPU, FP32 = torch.device("cpu"), torch.float32
DIRECTIONS = ("t1w-to-t2w", "t2w-to-t1w")


def state_of(slices_seen=20, **options):
    """As much of a checkpoint as a ceiling looks at."""
    config = {**plain(asdict(TrainConfig())), "deform": 0.0, "features": 4, "blocks": 1,
              "batch_size": 2, "epochs": 3, "epochs_decay": 1, **options}
    preprocessing = {"size": 32, "spacing_mm": 4.0, "intensity": {}, "subjects": {}}
    return {"config": config, "preprocessing": preprocessing, "step": slices_seen // 2,
            "slices_seen": slices_seen}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceiling") / "slices"
    return SliceStore(write_store(folder, {"train": ["01", "02", "03"], "test": ["04"]}))


def run(path, store, state=None, **options):
    return train_ceiling(path, state or state_of(), store, CPU, FP32, **options)


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """The file that one go leaves; read only."""
    path = tmp_path_factory.mktemp("done") / "ceiling.pt"
    run(path, store)
    return path


def equal(first, second):
    """Whether two checkpoints hold the same, to the last bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


# ---------------------------------------------------------------------------- what it learns from


def test_there_are_as_many_steps_as_make_the_checkpoints_slices(store, done):
    for seen, batch, steps in ((20, 2, 10), (21, 2, 11), (5, 1, 5), (0, 2, 0)):
        assert Paired(state_of(seen, batch_size=batch), store, CPU, FP32).steps == steps
    state = checkpoint.load(done)
    assert state["step"] == 10 and state["slices_seen"] == 20


def batches(paired, n):
    return [paired._batch_of(step) for step in range(n)]


def row_of(array, image):
    """The row of a store's array that an image is, -1 for none."""
    same = (np.asarray(array, np.float32) == image.numpy()).all(axis=(1, 2))
    return int(same.argmax()) if same.any() else -1


def test_both_contrasts_of_a_batch_are_the_same_rows_of_the_training_split(store):
    seen = []
    for real_x, real_y in batches(Paired(state_of(flip=False), store, CPU, FP32), 9):
        rows = [row_of(store.t1w, image) for image in real_x[:, 0]]
        assert rows == [row_of(store.t2w, image) for image in real_y[:, 0]]
        seen += rows
    assert sorted(seen) == list(store.rows("train"))  # nine batches of two are one pass


@pytest.mark.parametrize("balance, shares", [(True, (8, 8)), (False, (12, 4))])
def test_volumes_count_alike_where_they_do_in_the_checkpoints_training(balance, shares, tmp_path):
    uneven = SliceStore(write_store(tmp_path / "slices", {"train": ["01", "02"], "val": ["03"]},
                                    n_slices={"01": 12, "02": 4, "03": 4}))
    paired = Paired(state_of(flip=False, balance=balance), uneven, CPU, FP32)
    for first in (0, 8):  # two passes of eight batches of two
        rows = [row_of(uneven.t1w, image) for step in range(first, first + 8)
                for image in paired._batch_of(step)[0][:, 0]]
        large, small = sum(row < 12 for row in rows), sum(12 <= row < 16 for row in rows)
        assert (large, small) == shares


def test_pairs_are_shown_with_the_histograms_of_the_checkpoints_training(store):
    standard = find_standard(store)
    state = state_of(flip=False)
    state["preprocessing"]["standard"] = standard.record()
    by_row = StandardRows(store, standard)
    plain, paired = Paired(state_of(flip=False), store, CPU, FP32), Paired(state, store, CPU, FP32)
    for (raw_x, raw_y), (real_x, real_y) in zip(batches(plain, 9), batches(paired, 9)):
        rows = np.array([row_of(store.t1w, image) for image in raw_x[:, 0]])
        assert torch.equal(real_x, shown(raw_x, rows, "t1w", by_row))
        assert torch.equal(real_y, shown(raw_y, rows, "t2w", by_row))
        assert not torch.equal(real_x, raw_x)


def test_passes_are_in_different_orders(store):
    taken = batches(Paired(state_of(flip=False), store, CPU, FP32), 18)
    first, second = (torch.cat([x for x, _ in part]) for part in (taken[:9], taken[9:]))
    assert not torch.equal(first, second)


def test_a_flip_turns_both_contrasts_of_a_pair_alike(store):
    upright = batches(Paired(state_of(flip=False), store, CPU, FP32), 18)
    flipped = batches(Paired(state_of(flip=True), store, CPU, FP32), 18)
    turned = []
    for (x, y), (x_flipped, y_flipped) in zip(upright, flipped):
        for i in range(len(x)):
            turned.append(not torch.equal(x[i], x_flipped[i]))
            expected = [v[i].flip(-1) if turned[-1] else v[i] for v in (x, y)]
            assert torch.equal(x_flipped[i], expected[0]), "only mirrored"
            assert torch.equal(y_flipped[i], expected[1]), "as its T1w is"
    assert 8 < sum(turned) < 28  # of 36


def test_a_deformation_moves_both_contrasts_of_a_pair_alike(store):
    still = batches(Paired(state_of(flip=False), store, CPU, FP32), 4)
    deformed = batches(Paired(state_of(flip=False, deform=1.0), store, CPU, FP32), 4)
    for (x, y), (x_deformed, y_deformed) in zip(still, deformed):
        assert float((x - x_deformed).abs().mean()) > 0.02
        inside = (x_deformed > -1) & (y_deformed > -1)
        # painted T2w are a function of the T1w, so the pair still fits, but for interpolation
        wanted = 0.1 - 0.8 * x_deformed + 0.5 * x_deformed ** 2
        assert float((y_deformed - wanted)[inside].abs().median()) < 0.03
        assert torch.equal(x_deformed > -1, y_deformed > -1)


def test_the_learning_rate_is_the_checkpoints_then_falls_to_nothing(store):
    paired = Paired(state_of(16, lr=0.01), store, CPU, FP32)  # 8 steps over 3 + 1 epochs
    rates = []
    while paired.step < paired.steps:
        paired.learn()
        rates.append(paired._adam.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01] * 7 + [0.005])
    paired = Paired(state_of(16, lr=0.01, epochs=1, epochs_decay=3), store, CPU, FP32)
    paired.step = 5
    assert paired._share_of_rate() == pytest.approx((1 - 5 / 8) * 4 / 3)
    paired = Paired(state_of(16, epochs_decay=0), store, CPU, FP32)
    paired.step = 7
    assert paired._share_of_rate() == 1


def test_the_loss_is_the_distance_to_the_real_pair(store):
    paired = Paired(state_of(), store, CPU, FP32)
    real_x, real_y = batches(paired, 1)[0]
    with torch.no_grad():
        fake_y, fake_x = paired._nets["G"](real_x), paired._nets["F"](real_y)
    wanted = (fake_y - real_y).abs().mean() + (fake_x - real_x).abs().mean()
    assert float(paired.learn()) == pytest.approx(float(wanted), rel=1e-5)


def test_it_learns_what_belongs_together(store, tmp_path):
    state = state_of(500, lr=2e-3, ema=0.98)
    untrained = run(tmp_path / "0.pt", store, state_of(0))
    trained = run(tmp_path / "1.pt", store, state)
    tables = LookUpTable(), LookUpTable()
    for subject in (s for s in store.subjects if s["split"] == "train"):
        x, y, mask = (torch.from_numpy(np.asarray(v, t))[:, None] for v, t in zip(
            store.of_subject(subject), (np.float32, np.float32, bool)))
        tables[0].update(x, y, mask)
        tables[1].update(y, x, mask)

    def ssim(translators):
        with torch.no_grad():
            records, *_ = measure_session(store, store.subjects[-1], [
                Method("ceiling", dict(zip(DIRECTIONS, translators)))], CPU)
        return [next(select(over_slices(records), direction=d, protocol="brain"))["ssim"]
                for d in DIRECTIONS]

    start, end = (ssim(checkpoint.load_generators(state)) for state in (untrained, trained))
    table = ssim(tables)
    for before, after, best in zip(start, end, table):
        assert after > before + 0.3 and after > 0.6 * best, (start, end, table)


# ------------------------------------------------------------------------- stopped, and run again


@pytest.mark.parametrize("place", ["forward", "adam"])
def test_stopped_anywhere_and_run_again_it_equals_one_go_to_the_bit(
        store, done, tmp_path, monkeypatch, place):
    path = tmp_path / "ceiling.pt"
    monkeypatch.setattr(ceiling, "SAVE_MINUTES", 0)  # a file after each step
    real, calls = ceiling.Paired.learn, []

    def stopping(self):
        calls.append(self.step)
        if len(calls) == 4:  # in the middle of a step
            def interrupt(*_):
                raise KeyboardInterrupt
            if place == "adam":
                self._ema.update = interrupt  # the weights have moved, the averages have not
            else:
                self._nets["F"].register_forward_pre_hook(interrupt)
        return real(self)

    monkeypatch.setattr(ceiling.Paired, "learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(path, store)
    assert checkpoint.load(path)["step"] == 3
    run(path, store)
    assert calls == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert equal(checkpoint.load(path), checkpoint.load(done))


def test_a_signal_leaves_the_steps_that_were_taken(store, tmp_path, monkeypatch):
    path, long = tmp_path / "ceiling.pt", state_of(20_000)
    monkeypatch.setattr(ceiling, "SAVE_MINUTES", 0)
    real = ceiling.Paired.learn

    def learn(self):
        if self.step == 2:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return real(self)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ceiling.Paired, "learn", learn)
    before = signal.signal(signal.SIGTERM, interrupt)  # as console.run does
    try:
        with pytest.raises(KeyboardInterrupt):
            run(path, store, long)
    finally:
        signal.signal(signal.SIGTERM, before)
    found, fresh = checkpoint.load(path), Paired(long, store, CPU, FP32)
    assert 2 <= found["step"] < 10_000
    while fresh.step < found["step"]:
        real(fresh)
    for part in ("generators", "optimizers", "ema"):
        assert equal(fresh.state()[part], found[part])


def test_a_finished_one_is_taken_as_it_is(store, done, monkeypatch):
    content, when = done.read_bytes(), done.stat().st_mtime_ns
    monkeypatch.setattr(ceiling.Paired, "learn", lambda self: pytest.fail("learns"))
    state = run(done, store)
    assert state["step"] == 10 and equal(state, checkpoint.load(done))
    assert (done.read_bytes(), done.stat().st_mtime_ns) == (content, when)


def test_one_of_many_processes_takes_a_finished_one_and_trains_none(store, done, tmp_path):
    assert run(done, store, alone=False)["step"] == 10
    with pytest.raises(ValueError, match="is not there or not finished.*without torchrun"):
        run(tmp_path / "ceiling.pt", store, alone=False)
    half = checkpoint.load(done)
    checkpoint.save(tmp_path / "ceiling.pt", {**half, "step": 5})
    with pytest.raises(ValueError, match="is not there or not finished.*without torchrun"):
        run(tmp_path / "ceiling.pt", store, alone=False)


def test_a_damaged_one_is_named_with_its_cure(store, done, tmp_path):
    (tmp_path / "ceiling.pt").write_bytes(done.read_bytes()[:1000])
    with pytest.raises(ValueError, match="ceiling.pt: cannot be read .*; delete it"):
        run(tmp_path / "ceiling.pt", store)


@pytest.mark.parametrize("options", [{"slices_seen": 40}, {"features": 8}, {"seed": 1},
                                     {"lr": 0.1}, {"epochs": 7}])
def test_the_ceiling_of_another_checkpoint_is_refused(store, done, options):
    with pytest.raises(ValueError, match="ceiling.pt: is not the ceiling of this checkpoint"):
        run(done, store, state_of(**options))


def test_the_ceiling_of_another_store_and_any_other_checkpoint_are_refused(store, done, tmp_path):
    other = SliceStore(write_store(tmp_path / "other", {"train": ["01", "02", "07"]}))
    with pytest.raises(ValueError, match="is not the ceiling of this checkpoint and store"):
        run(done, other)
    state = checkpoint.load(done)
    del state["paired"]  # as a best.pt
    checkpoint.save(tmp_path / "ceiling.pt", state)
    with pytest.raises(ValueError, match="delete it, or choose another --out"):
        run(tmp_path / "ceiling.pt", store)


def test_subjects_for_testing_that_came_later_change_nothing(store, done, tmp_path):
    """Their rows move those of training: "00" stands before all of them."""
    splits = {"train": ["01", "02", "03"], "test": ["00", "021", "04"], "val": ["09"]}
    larger = SliceStore(write_store(tmp_path / "larger", splits))
    assert list(larger.rows("train")) != list(store.rows("train"))
    run(tmp_path / "ceiling.pt", larger)
    assert equal(checkpoint.load(tmp_path / "ceiling.pt"), checkpoint.load(done))
    assert run(done, larger)["step"] == 10


def test_fewer_slices_than_a_batch_are_refused(store):
    with pytest.raises(ValueError, match="its train split has 18 slices, the ceiling needs 19"):
        Paired(state_of(batch_size=19), store, CPU, FP32)


def test_it_is_a_checkpoint_like_any(done):
    state = checkpoint.load(done)
    nets = checkpoint.load_generators(state)
    slices = torch.rand(2, 1, 32, 32) * 2 - 1
    assert all(net(slices).shape == slices.shape for net in nets)
    assert torch.load(done, weights_only=True)["paired"]["slices_seen"] == 20
