"""Tests of report/figures.py: what the pictures show, read from their pixels."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from report import figures
from report.figures import Example


def pixels(picture):
    """(H, W, 3) int of a picture, or of PNG bytes."""
    png = picture.png if isinstance(picture, figures.Picture) else picture
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


def test_equal_figures_are_equal_bytes_and_name_no_program_and_no_date():
    first, second = (figures.examples([example(0.1)], "T1w", "T2w") for _ in range(2))
    assert first == second
    assert "Software" not in Image.open(io.BytesIO(first.png)).info
    text = first.svg.decode()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "dc:date" not in text and "Matplotlib" not in text


def test_words_in_an_svg_stay_words():
    text = figures.examples([example(title="worst")], "T1w", "T2w").svg.decode()
    for words in ("worst", "T1w (input)", "T2w translated", "SSIM 0.900"):
        assert words in text


def test_names_with_dollar_signs_are_names_and_no_formulas():
    for title in ("a $ b", "runs/$a_$/best.pt", "$x^$"):
        assert title in figures.examples([example(title=title)], "T1w", "T2w").svg.decode()


BLUE, GREEN, RED = (31, 119, 180), (44, 160, 44), (214, 39, 40)


def test_the_subject_plot_marks_each_subject_of_both_directions():
    def plot(n):
        values = {d: {"model": list(np.linspace(0.2, 0.9, n)), "floor*": [0.1] * n}
                  for d in ("T1w to T2w", "T2w to T1w")}
        return figures.subject_plot(values, [f"sub-{i:02d}" for i in range(n)], "SSIM")

    few, many = plot(2), plot(9)
    for panel in (0, 1):
        assert shows(many, BLUE, panel, columns=2) > 2 * shows(few, BLUE, panel, columns=2) > 0


def test_several_models_have_colours_of_their_own_and_references_are_grey():
    values = {"T1w to T2w": {"a.pt": [0.5, 0.6], "b.pt": [0.7, 0.8], "floor*": [0.1, 0.1],
                             "table*": [0.2, 0.2], "ceiling*": [0.9, 0.9]}}
    picture = figures.subject_plot(values, ["sub-01", "sub-02"], "SSIM")
    assert shows(picture, BLUE, 0, columns=1) > 50 and shows(picture, GREEN, 0, columns=1) > 50
    for level in (0.3, 0.5, 0.65):
        assert shows(picture, (round(255 * level),) * 3, 0, columns=1) > 5
    text = picture.svg.decode()
    for name in ("a.pt", "b.pt", ">floor<", ">table<", ">ceiling<"):
        assert name in text
    assert "*" not in text[text.index("<svg"):].replace("*{", "")


def test_many_subjects_names_do_not_print_over_each_other():
    values = {"T1w to T2w": {"model": [0.5] * 300, "floor*": [0.1] * 300}}
    names = [f"dataset_sub-{i:03d}" for i in range(300)]
    picture = pixels(figures.subject_plot(values, names, "SSIM"))
    below = picture[int(0.8 * len(picture)):, :, 0]
    assert (below < 200).mean() < 0.2  # letters with room between them, no black band


def test_histograms_fill_the_real_and_outline_the_translated_in_shares():
    counts = np.array([[4, 0], [0, 100]])  # all real on the left, all translated on the right
    picture = figures.histograms({"T1w to T2w": counts})
    image = pixels(picture)
    grey = (np.abs(image - 191).max(axis=-1) < 4).sum(axis=0)
    red = (np.abs(image - np.array(RED)).max(axis=-1) < 30).sum(axis=0)
    middle = image.shape[1] // 2
    assert grey[:middle].sum() > 10_000 > 50 * grey[middle:].sum()
    # as high as the other, though of 25 times as many pixels: an upright line down its left side
    assert red[middle - 10:middle + 10].max() > 0.8 * grey[:middle].max()
    nothing = figures.histograms({"T1w to T2w": np.zeros((2, 2))})
    assert nothing.png != picture.png


def test_curves_have_a_panel_a_title_and_a_line_a_name():
    panels = {"losses": {"G": ([1, 2, 3], [1.0, 0.5, 0.2]), "D_X": ([1, 2, 3], [0.2, 0.3, 0.2])},
              "validation": {"t2w_ssim": ([3], [0.7])}, "third": {"x": ([1, 3], [0, 1])}}
    picture = figures.curves(panels)
    text = picture.svg.decode()
    for words in ("losses", "validation", "third", "t2w_ssim", ">G<", ">D_X<"):
        assert words in text
    assert shows(picture, BLUE, 0, columns=2) > 50 and shows(picture, BLUE, 1, columns=2) > 5
    two = {name: panels[name] for name in ("losses", "validation")}
    assert pixels(picture).shape[0] == 2 * pixels(figures.curves(two)).shape[0]


def test_differences_draw_each_interval_on_its_side_of_zero():
    picture = figures.differences({"T1w to T2w": {"SSIM": (1.0, 0.5, 1.5)},
                                   "T2w to T1w": {"SSIM": (-1.0, -1.5, -0.5)}}, "b.pt minus a.pt")
    image = pixels(picture)
    half = image.shape[1] // 2
    for panel, after in ((image[:, :half], True), (image[:, half:], False)):
        line = np.abs(panel - 153).max(axis=-1) < 6  # zero, upright, grey
        zero = line.sum(axis=0).argmax()
        columns = np.flatnonzero((np.abs(panel - np.array(BLUE)).max(axis=-1) < 8).any(axis=0))
        assert len(columns) > 40
        assert (columns > zero).all() if after else (columns < zero).all()
    assert "b.pt minus a.pt" in picture.svg.decode()


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
