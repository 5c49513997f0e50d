"""Progress of a run: its small files, the moving pictures made of them, its histograms."""

import io

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard.summary import histogram_raw

from report import progress
from report.progress import BINS, Moment


def make_moment(step, size=32, n=3, generated=40):
    """T1w black, translation grey by the step, T2w white; generated intensities in one bin."""
    def level(value):
        return np.full((n, size, size), value, np.uint8)

    counts = np.zeros((2, BINS), np.int64)
    counts[0, 10:20] = 7
    counts[1, generated] = 70
    return Moment(step, 1 + step // 10, level(0), level(step), level(20), level(255), level(90),
                  level(130), counts, counts[:, ::-1].copy())


def keep(run, moments):
    for moment in moments:
        path = progress.path_of(run, moment.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(progress.pack(moment))


def frames_of(gif):
    with Image.open(io.BytesIO(gif)) as picture:
        frames, shown_ms = [], []
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.array(picture.convert("RGB")))
            shown_ms.append(picture.info["duration"])
    return frames, shown_ms


def test_a_moment_comes_back_as_it_was_and_equal_ones_are_equal_bytes(tmp_path):
    moment = make_moment(30)
    keep(tmp_path, [moment])
    found = progress.read(progress.path_of(tmp_path, 30))
    for name, value in vars(moment).items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert type(found.step) is int and progress.pack(found) == progress.pack(make_moment(30))


def test_a_damaged_file_is_one_error_that_names_it(tmp_path):
    keep(tmp_path, [make_moment(10)])
    path = progress.path_of(tmp_path, 10)
    whole = path.read_bytes()
    for content in (b"", whole[:200], whole[:-30], b"not a zip at all"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}: damaged"):
            progress.make_gif(tmp_path, "t2w")


@pytest.mark.parametrize("domain, panels", [("t2w", (0, None, 20, 255)),
                                            ("t1w", (255, 90, 130, 0))])
def test_frames_show_real_translated_cycled_and_target_in_columns(domain, panels):
    moment = make_moment(200)
    frame = next(progress.draw(iter([moment]), domain))
    width = 128  # each slice of 32 pixels drawn 4 times as large
    for i, level in enumerate(panels):
        level = 200 if level is None else level
        column = frame[-3 * width:, i * width:(i + 1) * width]
        assert (column == level).all(), f"panel {i}"


def test_slices_of_any_size_keep_their_pixels():
    for size, drawn in ((32, 128), (100, 200), (128, 128), (256, 256)):
        frame = next(progress.draw(iter([make_moment(9, size, n=1)]), "t2w"))
        assert frame.shape[1] == 4 * drawn + 300
        assert (frame[-drawn:, 3 * drawn:4 * drawn] == 255).all()


def test_the_histogram_moves_with_the_generated_intensities():
    def red(moment):
        frame = next(progress.draw(iter([moment]), "t1w")).astype(int)
        return ((frame[..., 0] - frame[..., 1]) > 100).sum(axis=0).argmax()  # the peak's side

    assert red(make_moment(5, generated=50)) > red(make_moment(5, generated=20)) + 40


def test_a_gif_runs_through_the_steps_in_order_and_rests_on_the_last(tmp_path):
    keep(tmp_path, [make_moment(step) for step in (100, 5, 50)])
    frames, shown_ms = frames_of(progress.make_gif(tmp_path, "t2w"))
    levels = [int(frame[-10, 128 + 64, 0]) for frame in frames]
    assert levels == pytest.approx([5, 50, 100], abs=8) and levels == sorted(levels)
    assert shown_ms == [150, 150, 2500]


def test_a_long_run_shows_evenly_spaced_epochs_with_the_first_and_the_last(tmp_path):
    keep(tmp_path, [make_moment(step) for step in range(0, 250, 10)])
    frames, _ = frames_of(progress.make_gif(tmp_path, "t2w", frames=5))
    levels = [int(frame[-10, 128 + 64, 0]) for frame in frames]
    assert levels == pytest.approx([0, 60, 120, 180, 240], abs=8)


def test_nothing_kept_is_one_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing kept there; give the --run"):
        progress.make_gif(tmp_path, "t1w")


def test_histograms_are_what_tensorboard_takes():
    counts = np.zeros(BINS, np.int64)
    counts[16:48] = 3
    found = progress.histogram(counts)
    assert found["num"] == 96 and (found["min"], found["max"]) == (0.25, 0.75)
    assert found["sum"] / found["num"] == pytest.approx(0.5)
    spread = found["sum_squares"] / found["num"] - 0.25
    assert spread == pytest.approx(0.5 ** 2 / 12, rel=0.01)  # of an even distribution
    assert list(histogram_raw("x", **found).value[0].histo.bucket) == counts.tolist()
    empty = progress.histogram(np.zeros(BINS, np.int64))
    assert empty["num"] == 0 and (empty["min"], empty["max"]) == (0, 1)
