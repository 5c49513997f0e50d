"""Tests of losses/history.py."""
import pytest
import torch
from torch import Tensor

from losses.history import ImageHistory


def numbered(first: int, count: int) -> Tensor:
    """Make `count` small slices; all pixels of slice i are i, so that it can be told again."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    return numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 3).clone()


def numbers_of(images: Tensor) -> list[int]:
    flat = images.flatten(1)
    assert (flat == flat[:, :1]).all()
    return [int(number) for number in flat[:, 0].tolist()]


def stored_in(history: ImageHistory) -> list[int]:
    return numbers_of(history.state_dict()["images"])


def test_until_it_is_full_new_slices_are_stored_and_returned():
    history = ImageHistory(size=5)
    assert numbers_of(history.query(numbered(0, 3))) == [0, 1, 2]
    assert numbers_of(history(numbered(3, 2))) == [3, 4]
    assert stored_in(history) == [0, 1, 2, 3, 4]


def test_a_returned_old_slice_gives_its_place_to_the_new_one():
    history = ImageHistory(size=3, seed=1)
    history.query(numbered(0, 3))
    for number in range(3, 200):
        before = stored_in(history)
        returned, = numbers_of(history.query(numbered(number, 1)))
        if returned == number:
            assert stored_in(history) == before
        else:
            slot = before.index(returned)
            assert stored_in(history) == before[:slot] + [number] + before[slot + 1:]


def test_a_full_history_returns_an_old_slice_half_of_the_time_from_any_place_alike():
    history = ImageHistory(size=4, seed=0)
    history.query(numbered(0, 4))
    places = [0] * 4
    for number in range(4, 4004):
        before = stored_in(history)
        returned, = numbers_of(history.query(numbered(number, 1)))
        if returned != number:
            places[before.index(returned)] += 1
    # 4 standard deviations of the binomials: 126 and 84.
    assert abs(sum(places) - 2000) < 126
    assert all(abs(count - 500) < 84 for count in places)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_batch_is_treated_as_if_its_slices_came_one_after_another(size):
    batched, single = ImageHistory(size, seed=3), ImageHistory(size, seed=3)
    for start in range(0, 200, 10):  # more slices than slots: some slot is drawn twice
        together = numbers_of(batched.query(numbered(start, 10)))
        alone = [numbers_of(single.query(numbered(start + i, 1)))[0] for i in range(10)]
        assert together == alone
        assert stored_in(batched) == stored_in(single)


def test_once_full_each_slice_comes_out_at_most_once_or_is_still_stored():
    history = ImageHistory(size=5, seed=2)
    returned = numbers_of(history.query(numbered(0, 5)))
    for start in range(5, 105, 4):
        returned += numbers_of(history.query(numbered(start, 4)))
    # After the fill each query takes one slice in and gives one out.
    assert sorted(returned[5:] + stored_in(history)) == list(range(105))


def test_it_never_holds_more_than_its_size():
    history = ImageHistory(size=5)
    history.query(numbered(0, 3))
    history.query(numbered(3, 9))
    assert history.count == 5 and len(stored_in(history)) == 5


def test_returned_slices_are_detached_and_later_queries_do_not_change_them():
    history = ImageHistory(size=2, seed=0)
    kept, copies = [], []
    for number in range(0, 40, 2):
        fake = numbered(number, 2).requires_grad_() * 1
        kept.append(history.query(fake))
        assert not kept[-1].requires_grad
        copies.append(kept[-1].clone())
    assert all(torch.equal(now, then) for now, then in zip(kept, copies))


def test_changing_a_slice_after_the_query_does_not_change_the_history():
    history, fakes = ImageHistory(size=2), numbered(1, 2)
    returned = history.query(fakes)
    fakes.zero_()
    returned.zero_()
    assert stored_in(history) == [1, 2]


def test_size_zero_turns_the_history_off():
    history, fakes = ImageHistory(size=0), numbered(1, 3).requires_grad_()
    for _ in range(5):
        returned = history.query(fakes)
        assert torch.equal(returned, fakes) and not returned.requires_grad
    assert history.count == 0
    ImageHistory(size=0).load_state_dict(history.state_dict())


@pytest.mark.parametrize("seen", [0, 3, 50])
def test_a_resumed_history_goes_on_exactly(tmp_path, seen):
    history = ImageHistory(size=5, seed=4)
    for number in range(seen):
        history.query(numbered(number, 1))
    torch.save(history.state_dict(), tmp_path / "history.pt")
    resumed = ImageHistory(size=5, seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "history.pt", weights_only=True))
    for start in range(100, 200, 4):
        wanted, found = history.query(numbered(start, 4)), resumed.query(numbered(start, 4))
        assert torch.equal(found, wanted)
    assert stored_in(resumed) == stored_in(history)


def test_a_saved_state_does_not_follow_the_history():
    history = ImageHistory(size=2, seed=0)
    history.query(numbered(0, 2))
    state = history.state_dict()
    history.query(numbered(2, 30))
    assert numbers_of(state["images"]) == [0, 1]
    resumed = ImageHistory(size=2)
    resumed.load_state_dict(state)
    resumed.query(numbered(2, 30))
    assert numbers_of(state["images"]) == [0, 1]
    assert stored_in(resumed) == stored_in(history)


def test_the_draws_depend_on_the_seed_alone_and_leave_the_global_state_alone():
    def drawn(seed: int) -> list[int]:
        history = ImageHistory(size=3, seed=seed)
        return numbers_of(history.query(numbered(0, 60)))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drawn(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert drawn(7) == first != drawn(8)


def test_half_precision_slices_come_back_bit_by_bit_in_their_own_dtype():
    history = ImageHistory(size=4, seed=0)
    fakes = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    known = {tuple(image.flatten().tolist()) for image in fakes}
    returned = history.query(fakes)
    assert returned.dtype == torch.bfloat16
    assert not torch.equal(returned, fakes)
    assert {tuple(image.flatten().tolist()) for image in returned} <= known


def test_wrong_sizes_and_shapes_are_refused_with_both_values():
    with pytest.raises(ValueError, match="-1"):
        ImageHistory(size=-1)
    history = ImageHistory(size=2)
    history.query(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 4, 8\).*\(1, 8, 8\)"):
        history.query(torch.zeros(1, 1, 4, 8))
    with pytest.raises(ValueError, match="size 2, this one 3"):
        ImageHistory(size=3).load_state_dict(history.state_dict())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_history_saved_on_the_cpu_goes_on_on_cuda():
    history = ImageHistory(size=5, seed=4)
    history.query(numbered(0, 20))
    resumed = ImageHistory(size=5)
    resumed.load_state_dict(history.state_dict())
    found = resumed.query(numbered(20, 20).cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), history.query(numbered(20, 20)))
