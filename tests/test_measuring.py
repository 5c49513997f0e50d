"""Tests of measuring.py: figures of sessions against losses/ and by hand."""

import math
import shutil

import numpy as np
import pytest
import torch
from painted_lesions import LESIONS, VOXEL_MM, inside, paint, write_lesion_store
from painted_store import write_store

import measuring
from data.histogram import StandardRows, find_standard
from data.slices import shown
from data.store import SliceStore
from losses import quality, volume_quality
from measuring import (Method, RealLesions, copy_input, figures_of, measure_session, over_slices,
                       select)

CPU = torch.device("cpu")
N_SLICES = {"01": 2, "04": 12, "05_ses-a": 13, "05_ses-b": 3, "06": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sessions of twelve slices and more, and of fewer than SSIM's window; read only."""
    folder = tmp_path_factory.mktemp("measuring") / "slices"
    splits = {"train": ["01"], "test": [name for name in N_SLICES if name != "01"]}
    return SliceStore(write_store(folder, splits, n_slices=N_SLICES))


def session(store, name):
    return next(s for s in store.subjects if s["id"].endswith(name))


def reals(store, name):
    """T1w, T2w (n, 1, H, W) in [-1, 1] and mask of a session."""
    t1w, t2w, mask = store.of_subject(session(store, name))
    return (*(torch.from_numpy(v.astype(np.float32))[:, None] for v in (t1w, t2w)),
            torch.from_numpy(mask)[:, None])


def turned(real):
    return -0.6 * real - 0.2


def bent(real):
    return -0.9 * real + 0.1 * real ** 2


BENDING = Method("model", {"t1w-to-t2w": turned, "t2w-to-t1w": bent}, "bending.pt")


@pytest.fixture(scope="module")
def measured(store):
    """Records and translations of one session with a model and the floor."""
    return measure_session(store, session(store, "04"), [BENDING, copy_input()], CPU, 5)


def test_figures_are_those_of_the_losses_on_the_same_slices(store, measured):
    t1w, t2w, mask = reals(store, "04")
    for direction, source, target, translate, back in (
            ("t1w-to-t2w", t1w, t2w, turned, bent), ("t2w-to-t1w", t2w, t1w, bent, turned)):
        given, real, fake, cycled = ((v + 1) / 2 for v in (
            source, target, translate(source), back(translate(source))))
        wanted = {
            "ssim": quality.ssim(fake, real, mask), "psnr_db": quality.psnr_db(fake, real, mask),
            "mae": quality.mae(fake, real, mask),
            "ms_ssim": quality.multiscale_ssim(fake, real, mask),
            "ncc": quality.correlation(fake, real, mask),
            "gradient_similarity": quality.gradient_similarity(fake, real, mask),
            "intensity_distance": quality.intensity_distance(fake, real, mask),
            "cycle_error": quality.mae(cycled, given, mask),
            "checkerboard": quality.checkerboard(fake, real, mask),
            "from_input": quality.mae(fake, given, mask)}
        found = list(select(measured[0], direction=direction, method="model", protocol="brain"))
        assert [r["row"] - session(store, "04")["first_row"] for r in found] == list(range(12))
        for name, values in wanted.items():
            assert [r[name] for r in found] == pytest.approx(values.tolist(), abs=1e-6), name
            assert len({round(r[name], 6) for r in found}) > 6, f"{name} tells slices apart"


def test_a_volume_is_all_slices_of_the_session_as_one(store, measured):
    t1w, t2w, mask = reals(store, "04")
    fake, real, inside = (v.transpose(0, 1)[None] for v in ((turned(t1w) + 1) / 2, (t2w + 1) / 2,
                                                            mask))
    found, = select(measured[0], direction="t1w-to-t2w", method="model", protocol="volume")
    assert found["row"] is None
    for name, measure in (("psnr_db", volume_quality.volume_psnr_db),
                          ("ssim", volume_quality.volume_ssim),
                          ("slice_consistency", volume_quality.slice_consistency)):
        assert found[name] == pytest.approx(float(measure(fake, real, inside)))
    error = (fake - real)[inside].double()
    assert found["psnr_db"] == pytest.approx(-10 * math.log10(float(error.square().mean())))


def test_rescaled_a_gain_counts_for_nothing_and_all_else_does(store):
    t1w, t2w, mask = reals(store, "04")
    gains = {"as it is": lambda real: real, "darker": lambda real: (real + 1) * 0.6 - 1,
             "shifted": lambda real: (real + 0.3).clamp(max=1)}
    found = {}
    for name, change in gains.items():
        # a net that knows the answer, but for the change
        known = {"t1w-to-t2w": lambda _, f=change: f(t2w), "t2w-to-t1w": lambda _, f=change: f(t1w)}
        records, *_ = measure_session(store, session(store, "04"), [Method("floor", known)], CPU,
                                      batch_size=100)
        of_brain = list(select(records, direction="t1w-to-t2w", protocol="brain"))
        found[name] = {key: [r[key] for r in of_brain] for key in ("psnr_db", "rescaled_psnr_db")}
    assert max(found["darker"]["psnr_db"]) < 25
    assert min(found["darker"]["rescaled_psnr_db"]) > 60  # rounding of a float16 store
    assert max(found["shifted"]["rescaled_psnr_db"]) < 35
    assert max(found["as it is"]["rescaled_psnr_db"]) == measuring.PSNR_CAP_DB
    real, fake = ((v + 1) / 2 for v in (t2w, turned(t1w)))
    wanted = [v / np.percentile(v[mask].numpy(), 99.5) for v in (real, fake)]
    wanted = quality.ssim(wanted[1].clamp(0, 1), wanted[0].clamp(0, 1), mask).tolist()
    records, *_ = measure_session(store, session(store, "04"), [BENDING], CPU, batch_size=5)
    chosen = select(records, direction="t1w-to-t2w", protocol="brain")
    assert [r["rescaled_ssim"] for r in chosen] == pytest.approx(wanted, abs=1e-5)


def test_rescaled_an_empty_translation_stays_empty(store):
    black = dict.fromkeys(measuring.DIRECTIONS, lambda real: torch.full_like(real, -1))
    records, *_ = measure_session(store, session(store, "04"), [Method("floor", black)], CPU)
    for r in select(records, protocol="brain"):
        assert r["rescaled_psnr_db"] < 15 and r["rescaled_ssim"] < 0.2


def test_the_metrics_of_a_protocol_are_those_that_it_is_listed_for(measured):
    for r in measured[0]:
        wanted = set(measuring.metrics_of(r["protocol"])) - {"contrast_order"}  # needs tissues
        if r["method"] == "floor":
            wanted -= {"cycle_error"}
        if r["protocol"] == "brain":
            wanted |= {"from_input"}
        assert set(r) - {"direction", "id", "method", "ckpt", "protocol", "row"} == wanted


def test_translations_of_the_first_method_come_back_for_the_pictures(store, measured):
    t1w, t2w, _ = reals(store, "04")
    assert torch.equal(measured[1]["t1w-to-t2w"], turned(t1w))
    assert torch.equal(measured[1]["t2w-to-t1w"], bent(t2w))


def test_slices_too_small_for_it_have_no_checkerboard():
    small, mask = torch.rand(2, 1, 24, 24) * 2 - 1, torch.ones(2, 1, 24, 24).bool()
    found = measuring.measure_slices(small, small, small, mask)["brain"]
    assert "checkerboard" not in found and found["ssim"].tolist() == pytest.approx([1, 1])


def test_a_net_is_given_standard_histograms_and_measured_beside_real_ones(store):
    standard = StandardRows(store, find_standard(store))
    given = []

    def keep(real):
        given.append(real)
        return real

    copying = Method("model", dict.fromkeys(("t1w-to-t2w", "t2w-to-t1w"), keep), "x.pt", standard)
    at = session(store, "04")
    records, translated, _ = measure_session(store, at, [copying, copy_input()], CPU, 50)
    rows = at["first_row"] + np.arange(at["n_slices"])
    t1w, t2w, mask = reals(store, "04")
    wanted = shown(t1w, rows, "t1w", standard)
    # T1w and back, then T2w and back: what was generated is given as it is
    assert len(given) == 4 and torch.equal(given[0], wanted) and torch.equal(given[1], wanted)
    assert torch.equal(given[2], shown(t2w, rows, "t2w", standard))
    assert torch.equal(translated["t1w-to-t2w"], wanted) and not torch.equal(wanted, t1w)
    model = list(select(records, method="model", protocol="brain", direction="t1w-to-t2w"))
    floor = list(select(records, method="floor", protocol="brain", direction="t1w-to-t2w"))
    real = quality.mae((wanted + 1) / 2, (t2w + 1) / 2, mask)  # not a standardised T2w
    assert [r["mae"] for r in model] == pytest.approx(real.tolist())
    real = quality.mae((t1w + 1) / 2, (t2w + 1) / 2, mask)
    assert [r["mae"] for r in floor] == pytest.approx(real.tolist())
    assert all(r["from_input"] == r["cycle_error"] == 0 for r in model)


def test_a_net_never_gets_more_slices_than_the_batch(store):
    sizes = []

    def counting(real):
        sizes.append(len(real))
        return real

    both = dict.fromkeys(("t1w-to-t2w", "t2w-to-t1w"), counting)
    measure_session(store, session(store, "04"), [Method("floor", both)], CPU, 5)
    assert sizes == [5, 5, 2] * 2


@pytest.mark.parametrize("name, n, wanted", [
    ("04", 12, {"psnr_db", "ssim", "slice_consistency"}),
    ("05_ses-b", 3, {"psnr_db", "slice_consistency"}), ("06", 1, {"psnr_db"})])
def test_a_volume_of_few_slices_lacks_figures_and_has_no_nan(store, name, n, wanted):
    records, *_ = measure_session(store, session(store, name), [BENDING], CPU)
    assert len(records) == 2 * (3 * n + 1)
    for r in select(records, protocol="volume"):
        assert set(r) & set(measuring.METRICS) == wanted
    assert not any(math.isnan(v) for r in records for v in r.values() if isinstance(v, float))


def test_a_subjects_volume_is_averaged_over_the_sessions_that_have_the_figure(store):
    records = [r for name in ("05_ses-a", "05_ses-b")
               for r in measure_session(store, session(store, name), [BENDING], CPU)[0]]
    found, = select(over_slices(records), direction="t1w-to-t2w", protocol="volume")
    long, short = select(records, direction="t1w-to-t2w", protocol="volume")
    assert found["id"] == "painted_sub-05" and found["n_slices"] == 2
    assert found["psnr_db"] == pytest.approx((long["psnr_db"] + short["psnr_db"]) / 2)
    assert found["ssim"] == long["ssim"]  # the other has three slices only
    brain, = select(over_slices(records), direction="t1w-to-t2w", protocol="brain")
    every = [r["ssim"] for r in select(records, direction="t1w-to-t2w", protocol="brain")]
    assert brain["n_slices"] == len(every) == 16 and brain["ssim"] == pytest.approx(np.mean(every))


def test_a_translation_that_is_nan_is_refused_by_name_not_left_out(store):
    def broken(real):
        return torch.where(torch.arange(len(real))[:, None, None, None] == 1, math.nan, real)

    with pytest.raises(ValueError, match="bad.pt: its translation of painted_sub-04 .* not finite"):
        measure_session(store, session(store, "04"), [
            copy_input(), Method("model", dict.fromkeys(measuring.DIRECTIONS, broken), "bad.pt")],
            CPU)


@pytest.mark.parametrize("name", ["t1w", "t2w"])
def test_a_stored_slice_that_is_nan_is_not_blamed_on_the_net(store, tmp_path, name):
    folder = tmp_path / "slices"
    shutil.copytree(store.folder, folder)
    row = session(store, "04")["first_row"] + 2
    array = np.load(folder / f"{name}.npy", mmap_mode="r+")
    array[row, 3, 4] = np.nan
    array.flush()
    spoilt = SliceStore(folder)
    with pytest.raises(ValueError, match=rf"{name}.npy: row {row} \(painted_sub-04\) is NaN"):
        measure_session(spoilt, session(spoilt, "04"), [copy_input()], CPU)


def test_equal_slices_have_the_largest_psnr_that_can_be_averaged(store):
    t1w, t2w, _ = reals(store, "06")
    perfect = Method("model", {"t1w-to-t2w": lambda real: t2w, "t2w-to-t1w": lambda real: t1w})
    records, *_ = measure_session(store, session(store, "06"), [perfect], CPU)
    assert {r["psnr_db"] for r in records} == {measuring.PSNR_CAP_DB}


def test_figures_are_named_by_subject_and_those_that_nobody_has_are_left_out():
    ids = {"direction": "t1w-to-t2w", "method": "model", "ckpt": "", "protocol": "volume"}
    records = [{**ids, "id": "a", "psnr_db": 20.0, "ssim": 0.5},
               {**ids, "id": "b", "psnr_db": 30.0},
               {**ids, "id": "c", "psnr_db": 1.0, "method": "floor"}]
    assert figures_of(records, method="model") == {"ssim": {"a": 0.5},
                                                   "psnr_db": {"a": 20.0, "b": 30.0}}
    assert figures_of(records, method="table") == {}


def test_a_subject_is_all_of_its_sessions():
    assert measuring.person("ds01_sub-1_ses-2") == measuring.person("ds01_sub-1") == "ds01_sub-1"
    assert measuring.person("ds01_sub-10") != measuring.person("ds01_sub-1")


# ------------------------------------------------------------------------------------- lesions


@pytest.fixture(scope="module")
def diseased(tmp_path_factory):
    """A store of one brain with lesions and one without."""
    return write_lesion_store(tmp_path_factory.mktemp("diseased") / "slices",
                              {"train": {"01": ()}, "test": {"02": LESIONS, "03": ()}})


def test_lesions_are_measured_each_way_for_each_method(diseased):
    row, planted = session(diseased, "02"), paint()[3]
    bent = Method("model", dict.fromkeys(measuring.DIRECTIONS, lambda real: 0.5 * real), "m")
    *_, found = measure_session(diseased, row, [bent, copy_input()], CPU, 4,
                                real_lesions=RealLesions(diseased, row))
    assert [(r["direction"], r["method"], r["ckpt"]) for r in found] == [
        ("t1w-to-t2w", "model", "m"), ("t1w-to-t2w", "floor", ""),
        ("t2w-to-t1w", "model", "m"), ("t2w-to-t1w", "floor", "")]
    for r, copied, real in zip(found, (-0.25,) * 2 + (0.3,) * 2, (0.3,) * 2 + (-0.25,) * 2):
        assert (r["id"], r["found_by"], r["n_lesions"]) == ("painted_sub-02", "rule", 2)
        assert r["lesion_ml"] == pytest.approx(planted.sum() * np.prod(VOXEL_MM) / 1000, rel=0.2)
        assert r["contrast_real"] == pytest.approx(real, abs=0.02) and r["erased"] == 1
        strength = 0.5 if r["method"] == "model" else 1
        assert r["kept"] == pytest.approx(-strength * abs(copied / real), abs=0.05)
        assert ("n_invented" in r) == (r["method"] == "model")
    assert measure_session(diseased, row, [bent], CPU)[2] == []


def test_a_perfect_translation_keeps_the_lesions_and_an_erasing_one_does_not(diseased):
    t1w, t2w, _ = reals(diseased, "02")
    planted = torch.from_numpy(paint()[3])[:, None]
    real = RealLesions(diseased, session(diseased, "02"))
    for direction, perfect, white in (("t1w-to-t2w", t2w, 0.3), ("t2w-to-t1w", t1w, 0.8)):
        r = real.measure(direction, perfect, "model")
        assert r["kept"] == pytest.approx(1) and r["erased"] == 0
        assert (r["n_lesions"], r["n_visible"], r["n_invented"], r["invented_ml"]) == (2, 2, 0, 0)
        r = real.measure(direction, torch.where(planted, 2 * white - 1, perfect), "model")
        assert r["kept"] == pytest.approx(0, abs=0.05) and r["erased"] == 1
        assert r["n_invented"] == 0


def test_an_invented_lesion_is_counted_in_a_brain_that_has_none(diseased):
    _, t2w, _ = reals(diseased, "03")
    real = RealLesions(diseased, session(diseased, "03"))
    spot = torch.from_numpy(inside((5, 62, 30), 6))[:, None]
    found = real.measure("t1w-to-t2w", torch.where(spot, 0.2, t2w), "model")
    assert found == {"found_by": "rule", "n_lesions": 0, "lesion_ml": 0, "n_visible": 0,
                     "n_invented": 1,
                     "invented_ml": pytest.approx(float(spot.sum()) * 0.00675, rel=0.15)}
    assert "kept" not in found  # not 0 of 0
    assert real.measure("t1w-to-t2w", t2w, "model")["n_invented"] == 0


def test_a_given_mask_is_taken_for_the_rules_lesions(diseased):
    t1w, t2w, _ = reals(diseased, "02")
    given = inside(*LESIONS[1])
    real = RealLesions(diseased, session(diseased, "02"), given)
    found = real.measure("t1w-to-t2w", t2w, "model")
    assert (found["found_by"], found["n_lesions"], found["n_invented"]) == ("mask", 1, 0)
    assert found["lesion_ml"] == pytest.approx(given.sum() * np.prod(VOXEL_MM) / 1000)
    none = RealLesions(diseased, session(diseased, "02"), np.zeros_like(given))
    assert none.measure("t1w-to-t2w", t2w, "model")["n_lesions"] == 0


def test_without_the_distance_of_slices_it_is_that_of_pixels(diseased):
    row = {**session(diseased, "02"), "slice_spacing_mm": ""}
    assert RealLesions(diseased, row).voxel_mm == (1.5, 1.5, 1.5)
    assert RealLesions(diseased, session(diseased, "02")).voxel_mm == VOXEL_MM
