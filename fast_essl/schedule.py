"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate_share(step: int, *, num_steps: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Share of the peak: linear from 0 over the warm-up, then a half cosine to `final` at `num_steps`.

    Args: `step` counts from 0; for a rate that moves once an epoch it is the epoch's first one.
    Source: the official release's `adjust_learning_rate`, with final 0 on CIFAR-10 and for SimSiam, and 0.001 for
    SimCLR and Barlow Twins on ImageNet.
    """
    if step < warmup_steps:
        return step / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))
    return cosine + final * (1 - cosine)
