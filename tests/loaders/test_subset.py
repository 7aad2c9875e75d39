"""A subset of the samples: the same views as in the whole file, in each loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loaders import LOADERS, open_loader
from loaders.order import epoch_order
from loaders.recipe import Recipe

RECIPES = (Recipe(size=24), Recipe(size=16, scale=(0.05, 0.14)))
SUBSET = np.array([0, 3, 8, 21, 34, 55, 69])


@pytest.mark.parametrize("name", LOADERS)
def test_a_subset_s_samples_are_those_of_the_whole_file(name, photo_beton):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed", exc_type=ImportError)
    options = {"seed": 3, "num_workers": 1}
    whole = open_loader(name, photo_beton, RECIPES, batch_size=70, **options)
    part = open_loader(name, photo_beton, RECIPES, batch_size=3, drop_last=False, subset=SUBSET, **options)
    assert part.num_samples == 7 and len(part) == 3
    (everything,) = whole.epoch(2)
    position = {index: n for n, index in enumerate(everything.indices.tolist())}
    batches = list(part.epoch(2))
    assert [len(batch.labels) for batch in batches] == [3, 3, 1]
    order = torch.cat([batch.indices for batch in batches]).tolist()
    assert order == SUBSET[epoch_order(7, seed=3, epoch=2)].tolist()
    for batch in batches:
        for n, index in enumerate(batch.indices.tolist()):
            m = position[index]
            assert batch.labels[n] == everything.labels[m]
            for crop, expected in zip(batch.images, everything.images, strict=True):
                assert torch.equal(crop[n], expected[m])
            assert np.array_equal(batch.parameters.jitter[n], everything.parameters.jitter[m])
    (last,) = part.epoch(2, start_step=2)
    assert torch.equal(last.indices, batches[2].indices)


@pytest.mark.parametrize("subset", [[], [0, 0, 1], [5, 4], [-1, 3], [3, 70]])
def test_what_is_no_subset_is_refused(subset, photo_beton):
    with pytest.raises(ValueError, match="subset: must be ascending indices, each once, below 70"):
        open_loader("torch", photo_beton, RECIPES, batch_size=1, subset=np.array(subset, np.int64))
