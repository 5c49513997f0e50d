"""What is said of a run that is not healthy, and that nothing is said of one that is."""

import re

import pytest

import health

HEALTHY = {"D_X_right_real": 0.8, "D_X_right_fake": 0.85, "D_Y_right_real": 0.7,
           "D_Y_right_fake": 0.9, "gradient_G": 0.8, "gradient_F": 1.2, "gradient_D_X": 0.3,
           "gradient_D_Y": 0.2, "skipped": 0.0005, "t2w_correlation": 0.8, "t1w_correlation": 0.7,
           "t2w_copy_ratio": 0.95, "t1w_copy_ratio": 1.05, "t2w_outside": 0.001,
           "t1w_outside": 0.002, "waiting": 0.004, "peak_memory_gib": 3.0}


def test_nothing_is_said_of_a_healthy_run_nor_of_what_was_not_measured():
    assert health.warnings(HEALTHY) == []
    assert health.warnings({}) == []


@pytest.mark.parametrize("changes, said", [
    ({"D_X_right_real": 1.0, "D_X_right_fake": 0.99}, "D_X is right about 100% of real and 99%"),
    ({"D_Y_right_real": 0.2, "D_Y_right_fake": 0.3}, "D_Y .* has lost track"),
    ({"gradient_F": 2e4}, "gradients of F have a norm of 2e.04: diverging"),
    ({"gradient_D_Y": 0.0}, "gradients of D_Y have a norm of 0: it learns nothing"),
    ({"t2w_correlation": -0.2}, r"t1w to t2w: contrast is inverted \(correlation .* -0.20\)"),
    ({"t1w_correlation": -0.02}, r"t2w to t1w: no contrast yet \(correlation .* -0.02\)"),
    ({"t1w_copy_ratio": 0.1}, r"t2w to t1w: nearly a copy of its input \(distance to it 10%"),
    ({"t2w_outside": 0.2}, "t1w to t2w: 20% of the generated signal lies outside the brain"),
    ({"skipped": 0.3}, "30% of the steps overflowed in fp16"),
    ({"waiting": 0.4}, "40% of the time goes into waiting for data"),
])
def test_each_figure_out_of_its_range_is_named_once(changes, said):
    lines = health.warnings({**HEALTHY, **changes})
    assert len(lines) == 1
    assert re.search(said, lines[0]), lines
