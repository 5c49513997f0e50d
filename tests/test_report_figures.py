"""Tests of report/figures.py: what the pictures show, read from their pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from report import figures
from report.figures import Example


def pixels(png):
    """(H, W, 3) int of a picture."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def example(error=0.0, title="best"):
    real = np.full((32, 32), 0.5)
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:24, 8:24] = True
    return Example(title, np.full((32, 32), 0.25), real + error, real, mask, "SSIM 0.900")


def shows(png, colour, column, columns=4):
    """How many pixels of a column of panels have about that colour."""
    picture = pixels(png)
    width = picture.shape[1] // columns
    part = picture[:, column * width:(column + 1) * width]
    return int((np.abs(part - np.array(colour)).max(axis=-1) <= 3).sum())


def test_an_example_shows_input_translation_real_slice_and_error_side_by_side():
    png = figures.examples([example(error=0.25)], "T1w", "T2w")
    assert shows(png, (64, 64, 64), 0) > 5000  # 0.25 of white
    assert shows(png, (191, 191, 191), 1) > 5000  # 0.75
    assert shows(png, (128, 128, 128), 2) > 5000  # 0.5
    middle_of_inferno = (188, 55, 84)  # an error of 0.25 on a scale to 0.5
    assert shows(png, middle_of_inferno, 3) > 1000


def test_the_error_map_is_empty_without_error_and_outside_the_brain():
    middle_of_inferno = (188, 55, 84)
    perfect = figures.examples([example(error=0.0)], "T1w", "T2w")
    wrong = figures.examples([example(error=0.25)], "T1w", "T2w")
    black = (0, 0, 3)
    assert shows(perfect, black, 3) > 4 / 3 * shows(wrong, black, 3) > 0
    # the brain is a quarter of the slice: error inside it only (the colour bar has some, too)
    ratio = shows(wrong, middle_of_inferno, 3) / shows(wrong, black, 3)
    assert ratio == pytest.approx(1 / 3, rel=0.3)


def test_each_example_takes_a_row():
    heights = [pixels(figures.examples([example()] * n, "T1w", "T2w")).shape[0] for n in (1, 3)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=3)


def test_equal_figures_are_equal_bytes_and_name_no_program():
    first, second = (figures.examples([example(0.1)], "T1w", "T2w") for _ in range(2))
    assert first == second
    assert "Software" not in Image.open(io.BytesIO(first)).info


def test_the_subject_plot_marks_each_subject_of_both_directions():
    def plot(n):
        values = {d: {"model": list(np.linspace(0.2, 0.9, n)), "floor": [0.1] * n}
                  for d in ("t1w-to-t2w", "t2w-to-t1w")}
        return figures.subject_plot(values, [f"sub-{i:02d}" for i in range(n)], "SSIM")

    blue = (31, 119, 180)
    few, many = plot(2), plot(9)
    for panel in (0, 1):
        assert shows(many, blue, panel, columns=2) > 2 * shows(few, blue, panel, columns=2) > 0


def test_many_subjects_names_do_not_print_over_each_other():
    values = {"t1w-to-t2w": {"model": [0.5] * 300, "floor": [0.1] * 300}}
    png = figures.subject_plot(values, [f"dataset_sub-{i:03d}" for i in range(300)], "SSIM")
    picture = pixels(png)
    below = picture[int(0.8 * len(picture)):, :, 0]
    assert (below < 200).mean() < 0.2  # letters with room between them, no black band


def test_tiles_of_the_checkerboard_come_from_either_stack_in_turn():
    board = figures.checkerboard(np.zeros((2, 8, 8)), np.ones((2, 8, 8)), tile=4)
    assert board.shape == (2, 8, 8)
    assert board[0, 0, 0] == board[1, 4, 4] == 0 and board[0, 0, 4] == board[0, 4, 0] == 1
    assert board.mean() == 0.5


def test_the_contact_sheet_outlines_the_mask_in_red_and_takes_a_row_a_subject():
    t1w = t2w = np.full((3, 32, 32), 0.5)
    mask = np.zeros((3, 32, 32), dtype=bool)
    mask[:, 8:24, 8:24] = True
    counts = np.arange(40)
    strip = figures.Strip("sub-01", t1w, t2w, mask, counts, counts[::-1])
    sheet = figures.contact_sheet([strip])
    image = pixels(sheet)
    red = (image[..., 0] > image[..., 1] + 100) & (image[..., 1] < image[..., 2] + 40)
    grey = np.flatnonzero((np.abs(image - 128).max(axis=-1) < 4).sum(axis=0) > 30)
    left, right = grey[0], grey[-1]  # of the slices
    third = (right - left) // 3
    assert red[:, left:left + third].sum() > 100  # in the T1w's third alone
    assert red[:, left + third + 9:].sum() == 0
    blue = image[..., 2] > image[..., 0] + 60
    assert blue[:, right:].sum() > 30 and blue[:, :right].sum() == 0  # a histogram
    assert right - left > 0.7 * image.shape[1], "the slices are as large as they can be"
    taller = figures.contact_sheet([strip] * 3)
    assert pixels(taller).shape[0] > 2 * pixels(sheet).shape[0]
