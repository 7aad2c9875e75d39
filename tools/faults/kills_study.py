"""Kills of a study, a new one and one that is extended from few steps to more."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
from cases import study_case
from kills import Kill, Moment, at_step, inject_kills, not_reproducible, observe_all
from tally import Injection

NUM_KILLS = 60
FIRST_STEPS, NUM_STEPS = 2, 6


def inject(
    folder: Path, *, share: float, seed: int, in_parallel: Callable[..., list[Any]]
) -> list[Injection]:
    """Kill studies and run them again; their table has to be that of one that was let alone."""
    data.make_training_data(folder)
    config = data.make_config(folder, "e_simclr", 16)
    cases = [study_case(folder, config, first_steps=first, num_steps=NUM_STEPS) for first in (0, FIRST_STEPS)]
    chance = random.Random(f"{seed} study")
    injections, kills = [], []
    for case, observed in observe_all(cases, in_parallel):
        if isinstance(observed, str):
            injections.append(not_reproducible(case, observed))
            continue
        for number in range(max(4, round(NUM_KILLS * share / len(cases)))):
            signal = "SIGTERM" if number % 4 == 3 else "SIGKILL"
            moment = at_step(observed, chance, signal)
            if number % 3 == 2:
                moment = Moment(signal=signal, after_s=chance.random() * observed.duration_s)
            kills.append(
                Kill(case=case, observed=observed, moments=(moment,), seed=f"{seed} {case.name} {number}")
            )
    return injections + inject_kills(kills, in_parallel)[0]
