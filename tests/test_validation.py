"""Tests of validation.py: figures of the validation subjects, pictures of an epoch."""

import numpy as np
import pytest
import torch
from painted_store import change_rows, write_store
from scipy.stats import wasserstein_distance
from skimage.metrics import structural_similarity
from trainings import CONFIG, CPU, SPLITS, alone
from trainings import slices_fixture  # noqa: F401

import validation
from data.contrast import intensity_quantiles
from data.histogram import StandardRows, find_standard
from data.slices import shown, to_tensor
from data.store import SliceStore
from device import Process
from losses.quality import mae, psnr_db
from training import Training
from validation import look, sample_grid, validate


def test_a_moment_shows_what_the_averaged_nets_make_of_the_fixed_slices(slices):
    t, store = alone(), SliceStore(slices)
    moment = look(t, store, kept_slices=2, counted=8)
    rows = validation.fixed_rows(store, 2)
    real_x, real_y = (torch.from_numpy(a[rows].astype(np.float32))[:, None]
                      for a in (store.t1w, store.t2w))
    with torch.no_grad():
        G, F = t.ema.G, t.ema.F
        wanted = {"t1w": real_x, "to_t2w": G(real_x), "t1w_again": F(G(real_x)),
                  "t2w": real_y, "to_t1w": F(real_y), "t2w_again": G(F(real_y))}
        for name, slices_ in wanted.items():
            found = getattr(moment, name)
            assert found.dtype == np.uint8
            np.testing.assert_allclose(found / 255, (slices_[:, 0] + 1) / 2, atol=0.51 / 255)
        rows = validation.fixed_rows(store, 8)
        fake = G(torch.from_numpy(store.t1w[rows].astype(np.float32))[:, None])[:, 0]
    values = ((fake + 1) / 2).numpy()[store.mask(rows)]
    assert moment.t2w_counts[1].tolist() == np.histogram(values, 64, (0, 1))[0].tolist()
    assert (moment.step, moment.epoch) == (0, 1)


def test_the_sample_grid_shows_real_translated_cycled_and_identity_slices(slices):
    t, store = alone(), SliceStore(slices)
    grid = sample_grid(t, store, count=2)
    assert grid.shape == (3, 2 * 34 + 2, 8 * 34 + 2)  # 2 pixels around each
    panels = [grid[0, 2:34, 2 + 34 * k:34 + 34 * k] * 2 - 1 for k in range(8)]
    row = store.rows("val")[np.linspace(0, 17, 4).astype(int)[1]]
    real_x, real_y = (torch.from_numpy(a[row].astype(np.float32))[None, None]
                      for a in (store.t1w, store.t2w))
    with torch.no_grad():
        G, F = t.ema.G, t.ema.F
        wanted = [real_x, G(real_x), F(G(real_x)), F(real_x),
                  real_y, F(real_y), G(F(real_y)), G(real_y)]
    for panel, slice_ in zip(panels, wanted):
        torch.testing.assert_close(panel, slice_[0, 0], atol=1e-5, rtol=0)


def test_validation_figures_are_scikit_images_and_a_person_counts_once(slices):
    t, store = alone(), SliceStore(slices)
    found = validate(t, store)
    people = {}
    for session in store.subjects:
        if session["split"] == "val":
            rows = slice(session["first_row"], session["first_row"] + session["n_slices"])
            real_x, real_y = (torch.from_numpy(a[rows].astype(np.float32))[:, None]
                              for a in (store.t1w, store.t2w))
            with torch.no_grad():
                fake_y = (t.ema.G(real_x)[:, 0].numpy() + 1) / 2
            for fake, real, mask in zip(fake_y, (real_y[:, 0].numpy() + 1) / 2, store.mask(rows)):
                _, similarity = structural_similarity(
                    fake, real, data_range=1, gaussian_weights=True, sigma=1.5,
                    use_sample_covariance=False, full=True)
                psnr = 10 * np.log10(1 / ((fake - real)[mask].astype(float) ** 2).mean())
                people.setdefault(session["subject"], []).append([similarity[mask].mean(), psnr])
    assert len(people) == 2
    wanted = np.mean([np.mean(values, axis=0) for values in people.values()], axis=0)
    assert found["t2w_ssim"] == pytest.approx(wanted[0], abs=1e-5)
    assert found["t2w_psnr_db"] == pytest.approx(wanted[1], abs=1e-4)


def test_validation_shows_the_nets_standard_histograms_and_compares_with_real_ones(slices):
    store = SliceStore(slices)
    standard = StandardRows(store, find_standard(store))
    t = Training(CONFIG, Process(0, 1, CPU), 10, standard=standard)
    people = {}
    for session in (s for s in store.subjects if s["split"] == "val"):
        rows = session["first_row"] + np.arange(session["n_slices"])
        mask = torch.from_numpy(store.mask(rows))[:, None]
        given, real = shown(to_tensor(store.t1w[rows]), rows, "t1w", standard), store.t2w[rows]
        with torch.no_grad():
            fake, again = t.ema.G(given), t.ema.F(t.ema.G(given))
        people.setdefault(session["subject"], []).append(torch.stack([
            psnr_db((fake + 1) / 2, (to_tensor(real) + 1) / 2, mask),
            mae((again + 1) / 2, (given + 1) / 2, mask)], dim=1))
        shown_t2w = shown(to_tensor(real), rows, "t2w", standard)
        with torch.no_grad():
            back = t.ema.F(shown_t2w)
        people[session["subject"]][-1] = torch.cat([people[session["subject"]][-1], psnr_db(
            (back + 1) / 2, (to_tensor(store.t1w[rows]) + 1) / 2, mask)[:, None]], dim=1)
    wanted = torch.stack([torch.cat(found).mean(0) for found in people.values()]).mean(0)
    found = validate(t, store)
    assert found["t1w_psnr_db"] == pytest.approx(float(wanted[2]), abs=1e-4)
    assert found["t2w_psnr_db"] == pytest.approx(float(wanted[0]), abs=1e-4)
    assert found["t2w_cycle_error"] == pytest.approx(float(wanted[1]), abs=1e-6)
    assert found["t2w_psnr_db"] != pytest.approx(validate(alone(), store)["t2w_psnr_db"], abs=1e-3)
    plain, given = sample_grid(alone(), store), sample_grid(t, store)
    assert plain.shape == given.shape and not torch.equal(plain, given)


def test_figures_that_are_not_finite_end_the_run_with_the_files_name(slices, tmp_path):
    folder = write_store(tmp_path / "slices", SPLITS)
    change_rows(folder, "t1w.npy", SliceStore(folder).rows("val")[1], np.nan)
    with pytest.raises(FloatingPointError, match=r"validation of painted 04_T1w.nii.gz, .* at step "
                                                 r"0: .*t2w_ssim.* not finite; .*these scans"):
        validate(alone(), SliceStore(folder))


def test_validation_figures_that_need_no_pairs(slices):
    store = SliceStore(slices)
    t = Training(CONFIG, Process(0, 1, CPU), 10, quantiles=intensity_quantiles(store))
    found = validate(t, store)
    errors, distances, people = [], [], {s["subject"] for s in store.subjects
                                         if s["split"] == "val"}
    training = store.rows("train")
    real = np.asarray(store.t1w, np.float32)[training][store.mask(training)]
    for person in sorted(people):
        rows = np.concatenate([np.arange(s["first_row"], s["first_row"] + s["n_slices"])
                               for s in store.subjects if s["subject"] == person])
        mask, real_y = store.mask(rows), torch.from_numpy(store.t2w[rows].astype(np.float32))
        with torch.no_grad():
            fake_x = t.ema.F(real_y[:, None])
            cycled_y = t.ema.G(fake_x)[:, 0]
        difference = (cycled_y - real_y).abs().numpy() / 2
        errors.append(np.mean([d[m].mean() for d, m in zip(difference, mask)]))
        distances.append(wasserstein_distance(fake_x[:, 0].numpy()[mask], real) / 2)
    assert found["t1w_cycle_error"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert found["t1w_histogram_distance"] == pytest.approx(np.mean(distances), rel=0.02)
    without = validate(alone(), store)  # nothing to compare with
    assert set(found) - set(without) == {"t2w_histogram_distance", "t1w_histogram_distance"}
