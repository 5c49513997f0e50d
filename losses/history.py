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
        self._images: Tensor | None = None  # (size, 1, H, W) float32, from the first query on
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
        images = images.detach()
        if self.size == 0:
            return images
        stored = self._storage(images)
        returned = images.clone()
        # One number below 2 * size decides both: the lower half names a slot, the upper says new.
        draws = torch.randint(2 * self.size, (len(images),), generator=self._draws).tolist()
        for row, slot in enumerate(draws):
            if self.count < self.size:
                stored[self.count] = images[row]
                self.count += 1
            elif slot < self.size:
                returned[row] = stored[slot]
                stored[slot] = images[row]
        return returned

    __call__ = query

    def _storage(self, images: Tensor) -> Tensor:
        """Return the stored slices on the device of `images`, made at the first call."""
        shape = (self.size, *images.shape[1:])
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
            self._images = images.new_zeros((self.size, *images.shape[1:]), dtype=torch.float32)
            self._images[:self.count] = images
        # A checkpoint mapped to a GPU brings the state along; a CPU generator takes CPU bytes only.
        self._draws.set_state(state["generator"].cpu())
