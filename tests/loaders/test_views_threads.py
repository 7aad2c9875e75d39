"""The numba view stage called from several Python threads at once, as beside a loader's own parallel code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

CALLS = """
import threading
import numpy as np
import torch
from loaders.batch import Crops
from loaders.parameters import draw_parameters
from loaders.recipe import Recipe
from fast_essl.transformations import build_transformation
from loaders.views.cpu import make_views

rotation = build_transformation("four_fold_rotation", size=24)
recipes = (Recipe(size=24, blur_p=0.5, solarize_p=0.5),) * 2
rows = np.arange(8)
parameters = draw_parameters(
    recipes, seed=0, epoch=0, indices=rows, heights=np.full(8, 99), widths=np.full(8, 99)
)
images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8))
crops = Crops(
    images=(images, images), labels=torch.arange(8), indices=torch.arange(8), parameters=parameters
)
expected = make_views(crops, recipes, equivariance=rotation)
num_equal = [0, 0, 0]

def call(thread):
    for _ in range(100):
        views = make_views(crops, recipes, equivariance=rotation)
        num_equal[thread] += torch.equal(views.views[0], expected.views[0])
        num_equal[thread] += torch.equal(views.transformed, expected.transformed)

threads = [threading.Thread(target=call, args=(thread,)) for thread in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(num_equal)
"""


def test_calls_from_three_threads_give_the_same_views_as_one():
    """In a process of its own: numba's layer `workqueue`, its last resort, answers concurrent calls by an abort."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[200, 200, 200]"
