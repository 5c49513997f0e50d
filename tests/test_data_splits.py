"""The split: by subject, the same for ever, and nobody in two of them."""

import numpy as np
import pytest

from data.splits import SPLITS, assign_splits, split_value


def test_split_values_are_the_same_for_ever():
    """The first 16 hex digits of sha256("ds002330/01") and so on, over 2 ** 64."""
    assert split_value("ds002330", "01") == 0.7536476952576396
    assert split_value("ds003717", "01") == 0.9258717153780851
    assert split_value("heads", "01") == 0.18769008163215467
    assert split_value("heads", "02") == 0.9471346108734957


def test_splits_follow_the_hash_and_the_shares():
    people = [("heads", f"{i:04d}") for i in range(4000)]
    splits, said = assign_splits(people, (0.7, 0.2, 0.1))
    assert said == []
    for person, split in splits.items():
        value = split_value(*person)
        assert split == ("train" if value < 0.7 else "val" if value < 0.9 else "test")
    edge, _ = assign_splits(people, (split_value("heads", "0007"), 0.2, 0.1))
    assert edge["heads", "0007"] == "val", "a share ends before its bound"
    shares = [list(splits.values()).count(s) / 4000 for s in SPLITS]
    np.testing.assert_allclose(shares, (0.7, 0.2, 0.1), atol=0.02)


def test_new_subjects_never_move_old_ones_not_even_to_fill_a_split():
    draws = np.random.default_rng(0)
    for trial in range(200):
        people = [(f"set{draws.integers(3)}", str(i)) for i in range(int(draws.integers(1, 9)))]
        settled, _ = assign_splits(people, (0.8, 0.1, 0.1))
        for _ in range(3):
            people += [(f"new{trial}", str(draws.integers(1000))) for _ in range(draws.integers(3))]
            splits, said = assign_splits(people, (0.8, 0.1, 0.1), settled=settled)
            assert {p: splits[p] for p in settled} == settled
            for empty in set(SPLITS) - set(splits.values()):
                assert any(f"split {empty} stays empty" in line for line in said)
            settled = splits


def test_the_split_does_not_depend_on_the_order_or_on_the_other_subjects():
    people = [("heads", f"{i:02d}") for i in range(1, 40)]
    whole, said = assign_splits(people, (0.6, 0.2, 0.2))
    half, said_half = assign_splits(people[::-2], (0.6, 0.2, 0.2))
    assert said == said_half == []
    assert half == {p: whole[p] for p in people[::-2]}


def test_an_empty_split_takes_the_subject_whose_hash_lies_nearest_and_says_so():
    people = [("heads", label) for label in ("01", "03", "04", "06", "08")]
    # 0.188, 0.035, 0.549, 0.527, 0.783: all below 0.8
    splits, said = assign_splits(people, (0.8, 0.1, 0.1))
    assert splits == {("heads", "08"): "test", ("heads", "04"): "val", ("heads", "01"): "train",
                      ("heads", "03"): "train", ("heads", "06"): "train"}
    assert said == ["split test was empty: sub-08 of heads moved there from train",
                    "split val was empty: sub-04 of heads moved there from train"]


def test_train_is_filled_first_and_a_split_of_no_share_stays_empty():
    splits, said = assign_splits([("heads", "02"), ("heads", "17")], (0.5, 0.0, 0.5))
    assert sorted(splits.values()) == ["test", "train"]
    assert splits["heads", "02"] == "train" and len(said) == 1  # 0.947 lies nearer than 0.952
    splits, said = assign_splits([("heads", "01")], (0.8, 0.1, 0.1))
    assert splits == {("heads", "01"): "train"}
    assert [line[:22] for line in said] == ["split test stays empty", "split val stays empty:"]


def test_subjects_named_outright_are_exactly_these():
    people = [("a", f"{i:02d}") for i in range(30)] + [("b", "05")]
    splits, _ = assign_splits(people, (0.6, 0.2, 0.2), val=["sub-03", "b/sub-05"], test=["04"])
    assert {p for p, s in splits.items() if s == "val"} == {("a", "03"), ("b", "05")}
    assert {p for p, s in splits.items() if s == "test"} == {("a", "04")}
    both, _ = assign_splits(people, (0.6, 0.2, 0.2), val=["05"])
    assert {p for p, s in both.items() if s == "val"} == {("a", "05"), ("b", "05")}
    assert "test" in both.values(), "the split that was not named still goes by hash"
    by_id, _ = assign_splits(people, (0.6, 0.2, 0.2), val=["b_sub-05"])
    assert {p for p, s in by_id.items() if s == "val"} == {("b", "05")}


def test_names_may_move_a_settled_subject_but_no_other():
    settled = {("a", "1"): "train", ("a", "2"): "val", ("a", "3"): "test", ("a", "4"): "train"}
    splits, said = assign_splits(list(settled), (0.8, 0.1, 0.1), val=["4"], settled=settled)
    assert splits == {**settled, ("a", "4"): "val", ("a", "2"): "train"}
    assert said == []


def test_a_name_that_fits_nobody_and_one_in_both_lists_are_refused():
    people = [("a", "01"), ("a", "02")]
    with pytest.raises(ValueError, match="'sub-7' of --val or --test is not there; .*sub-01"):
        assign_splits(people, (0.8, 0.1, 0.1), test=["sub-7"])
    with pytest.raises(ValueError, match="'sub-01' is in --val and in --test"):
        assign_splits(people, (0.8, 0.1, 0.1), val=["01"], test=["sub-01"])
    with pytest.raises(ValueError, match="'b/01'"):
        assign_splits(people, (0.8, 0.1, 0.1), val=["b/01"])
