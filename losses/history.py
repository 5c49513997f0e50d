"""The history of generated slices that a discriminator learns from (Zhu et al. 2017, sec. 4).

One history a domain. Its random numbers are its own, so that a resumed run goes on with the same
ones.
"""
from typing import Any

import torch
from torch import Tensor


class ImageHistory:
    """Swap new fakes for older ones now and then, to keep D from forgetting earlier generators.

    The idea is Shrivastava et al.'s (2017), the size of 50 is from Zhu et al. 2017, sec. 4. How a
    slice is drawn is in their code only: until the history is full each new slice is stored and
    returned; afterwards, with probability 1/2, a stored one is returned and the new one takes its
    place, else the new one is returned and not stored. The slices of a batch take their turns one
    after another.

    Parameters
    ----------
    size : slices kept; 0 turns the history off (`query` returns what it was given).
    seed : of the draws. Give each domain and each process its own.

    Raises
    ------
    ValueError
        If `size` is negative.
    """

    def __init__(self, size: int = 50, seed: int = 0) -> None:
        if size < 0:
            raise ValueError(f"history size is {size}; must be 0 (off) or more")
        self.size = size
        self.count = 0
        self._images: Tensor | None = None  # (size + 1, 1, H, W) float32, from the first query on
        # On the CPU whatever the slices are on: reading a draw must not wait for the GPU.
        self._draws = torch.Generator().manual_seed(seed)

    def query(self, images: Tensor) -> Tensor:
        """Offer new slices, get as many back for D to judge.

        Parameters
        ----------
        images : (N, 1, H, W), generated slices, any float dtype and device.

        Returns
        -------
        images : the same shape, dtype and device, without gradient; new or older slices. Later
            queries don't change it.

        Raises
        ------
        ValueError
            If the slices' shape is not that of the stored ones.
        """
        source, slot = self.draw(len(images))
        return self.exchange(images, source, slot)

    __call__ = query

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw what the next `count` slices are exchanged for; the random half of `query`.

        Returns
        -------
        source : (count,) int64 on the CPU, what each slice gets back: below `size` a stored one,
            else the new slice number `source - size`
        slot : (count,) int64 on the CPU, where each new slice is stored; `size` where it is not
        """
        source, slot = (torch.arange(self.size, self.size + count) for _ in range(2))
        slot.fill_(self.size)
        if self.size:
            # One number below 2 * size decides both: the lower half names a slot, the upper says
            # new.
            draws = torch.randint(2 * self.size, (count,), generator=self._draws).tolist()
            holder: dict[int, int] = {}  # slot -> the slice of this batch that is in it
            for row, drawn in enumerate(draws):
                if self.count < self.size:
                    holder[self.count] = row
                    self.count += 1
                elif drawn < self.size:
                    source[row] = self.size + holder[drawn] if drawn in holder else drawn
                    holder[drawn] = row
            for place, row in holder.items():
                slot[row] = place
        return source, slot

    def exchange(self, images: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        """Give back and store slices as `draw` said; the half of `query` that a GPU does alone.

        Parameters
        ----------
        images : as `query`
        source, slot : of `draw`, on any device; on that of `images` nothing waits for them
        """
        images = images.detach()
        if self.size == 0:
            return images
        stored = self._storage(images)
        source, slot = source.to(images.device), slot.to(images.device)
        new = images.float()
        returned = torch.where((source < self.size)[:, None, None, None],
                               stored[source.clamp(max=self.size)],
                               new[(source - self.size).clamp(min=0)])
        stored.index_copy_(0, slot, new)
        return returned.to(images.dtype)

    def _storage(self, images: Tensor) -> Tensor:
        """Return the stored slices on the device of `images`, made at the first call.

        One row more than `size`: what is not stored is written there and never read.
        """
        shape = (self.size + 1, *images.shape[1:])
        if self._images is None:
            # float32 holds half precision exactly: a run resumed in another loses nothing.
            self._images = torch.zeros(shape, dtype=torch.float32, device=images.device)
        if self._images.shape != shape:
            raise ValueError(f"slices have shape {tuple(images.shape[1:])}, the history holds "
                             f"{tuple(self._images.shape[1:])}")
        self._images = self._images.to(images.device)
        return self._images

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly: two ints and two tensors.

        Keys: size, count, images ((count, 1, H, W) float32, a copy) and generator (uint8). All of
        it can be read by `torch.load(weights_only=True)`.
        """
        images = torch.empty(0) if self._images is None else self._images[:self.count].clone()
        return {"size": self.size, "count": self.count, "images": images,
                "generator": self._draws.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the slices and the random state of `state_dict()`'s result.

        Raises
        ------
        ValueError
            If that history had another size.
        """
        if state["size"] != self.size:
            raise ValueError(f"saved history has size {state['size']}, this one {self.size}")
        images = state["images"]
        self.count = int(state["count"])
        self._images = None
        if self.count:
            self._images = images.new_zeros((self.size + 1, *images.shape[1:]), dtype=torch.float32)
            self._images[:self.count] = images
        # A checkpoint mapped to a GPU brings the state along; a CPU generator takes CPU bytes only.
        self._draws.set_state(state["generator"].cpu())
