"""The order of samples: one permutation an epoch, dealt to ranks so that the batches do not depend on their number."""

from __future__ import annotations

import numba
import numpy as np

from loaders.parameters import philox

# Keeps the order's counters apart from those of the views (whose third word is the view, a small number).
_ORDER_STREAM = 0xFFFFFFFF


def epoch_order(num_samples: int, *, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order in which an epoch visits the samples, a pure function of (seed, epoch).

    Sorting by random 64-bit keys is a uniform permutation (a million samples tie once in 2**25 epochs, and then fall
    back to the index) and, unlike numpy's shuffle, bound to stay the same between numpy's versions.

    Returns: (num_samples,) int64, a permutation, or 0, 1, 2, … without `shuffle`.
    """
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    keys = _random_keys(num_samples, np.uint64(seed % 2**64), np.uint32(epoch))
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


@numba.njit(cache=True, nogil=True)
def _random_keys(num_samples, seed, epoch):  # type: ignore[no-untyped-def]
    keys = np.empty(num_samples, np.uint64)
    for index in range(num_samples):
        words = philox(seed, np.uint32(index), epoch, np.uint32(_ORDER_STREAM), np.uint32(0))
        keys[index] = (np.uint64(words[0]) << np.uint64(32)) | np.uint64(words[1])
    return keys


def rank_batches(
    order: np.ndarray, *, batch_size: int, rank: int = 0, num_ranks: int = 1, drop_last: bool = True
) -> list[np.ndarray]:
    """Cut an order into steps and take one rank's part of each.

    Step s is `order[s * batch_size : (s + 1) * batch_size]` whatever the number of ranks, and rank r has the r-th of
    `num_ranks` equal, contiguous parts of it (in a last, smaller batch the parts differ by at most one sample).

    Args: `order` (M,) sample indices; `batch_size` over all ranks together.
    Returns: one index array a step.
    Errors: `ValueError` when the ranks do not divide the batch.
    """
    if batch_size % num_ranks:
        raise ValueError(f"batch_size = {batch_size} is not a multiple of the {num_ranks} ranks")
    num_steps = len(order) // batch_size if drop_last else -(-len(order) // batch_size)
    batches = (order[step * batch_size : (step + 1) * batch_size] for step in range(num_steps))
    return [np.array_split(batch, num_ranks)[rank] for batch in batches]
