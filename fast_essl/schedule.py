"""Learning rates as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def warmup_cosine(
    step: int, *, peak: float, num_steps: int, warmup_steps: int = 0, final: float = 0.0
) -> float:
    """Linear from 0 to `peak` over the warm-up, then a half cosine to `final` at `num_steps`.

    Args: `step` counts from 0; `final` in the unit of `peak`.
    Source: the official release's `adjust_learning_rate` (CIFAR-10 with final 0; SimCLR on ImageNet with 0.001 · peak).
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))
    return peak * share + final * (1 - share)
