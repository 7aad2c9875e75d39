"""Kills of a conversion: at each of its file operations, with both signals, and at random moments."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import conversion_cases
from file_steps import StepFault
from kills import Kill, Moment, Signal, inject_kills, not_reproducible, observe_all
from tally import Injection

NUM_AT_RANDOM = 40


def inject(
    folder: Path, *, share: float, seed: int, in_parallel: Callable[..., list[Any]]
) -> list[Injection]:
    """Kill conversions; then the pair is absent, the old or the new one, and the name can be converted to again."""
    chance = random.Random(f"{seed} conversion")
    injections, kills = [], []
    signals: tuple[Signal, ...] = ("SIGKILL", "SIGTERM")
    for case, observed in observe_all(conversion_cases(folder), in_parallel):
        if isinstance(observed, str):
            injections.append(not_reproducible(case, observed))
            continue
        # Before each step, and in the middle of each write.
        moments = [
            Moment(signal=number, step=StepFault(step=step, what=number, torn=torn))
            for number in signals
            for step, name in enumerate(observed.steps, 1)
            for torn in ((False, True) if name.startswith("write") else (False,))
        ]
        moments += [
            Moment(signal=signals[number % 2], after_s=chance.random() * observed.duration_s)
            for number in range(NUM_AT_RANDOM // 2)
        ]
        chance.shuffle(moments)
        for moment in moments[: max(2, round(len(moments) * share))]:
            kills.append(Kill(case=case, observed=observed, moments=(moment,), seed=f"{seed} {len(kills)}"))
    return injections + inject_kills(kills, in_parallel)[0]
