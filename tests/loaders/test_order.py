"""The order of samples, and its division among ranks."""

from __future__ import annotations

import numpy as np
import pytest

from loaders.order import epoch_order, rank_batches


def test_an_epoch_is_a_permutation_and_repeats_with_its_seed():
    order = epoch_order(1000, seed=1, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, epoch_order(1000, seed=1, epoch=2))
    assert not np.array_equal(order, epoch_order(1000, seed=1, epoch=3))
    assert not np.array_equal(order, epoch_order(1000, seed=2, epoch=2))
    assert np.array_equal(epoch_order(5, seed=1, epoch=2, shuffle=False), np.arange(5))


def test_positions_are_uniform():
    """Where sample 0 lands over many epochs: a chi-squared statistic over 10 bins, far from its 0.9999 quantile."""
    positions = [np.flatnonzero(epoch_order(50, seed=0, epoch=epoch) == 0)[0] for epoch in range(2000)]
    counts, _ = np.histogram(positions, bins=10, range=(0, 50))
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_together_see_the_same_batches(num_ranks, drop_last):
    order = epoch_order(103, seed=0, epoch=0)
    parts = [
        rank_batches(order, batch_size=20, rank=rank, num_ranks=num_ranks, drop_last=drop_last)
        for rank in range(num_ranks)
    ]
    joined = [np.concatenate(step) for step in zip(*parts, strict=True)]
    assert len(joined) == (5 if drop_last else 6)
    for step, batch in enumerate(joined):
        assert np.array_equal(batch, order[step * 20 : (step + 1) * 20])


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        rank_batches(np.arange(10), batch_size=5, num_ranks=2)
