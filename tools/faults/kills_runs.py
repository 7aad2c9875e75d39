"""Kills of a pretraining: each method, each width, at file operations, between them, and once more when resumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
from cases import run_case
from kills import Kill, Moment, at_step, inject_kills, not_reproducible, observe_all
from tally import Injection

NUM_KILLS = 300


def inject(
    folder: Path, *, share: float, seed: int, in_parallel: Callable[..., list[Any]]
) -> list[Injection]:
    """Kill runs and continue them."""
    data.make_training_data(folder)
    num_kills = max(1, round(NUM_KILLS * share))
    # Gradients of narrow networks are known to have been wrong with two threads.
    cases = [
        run_case(
            data.make_config(
                folder,
                method,
                width,
                num_threads=2 if width == min(data.WIDTHS) else 1,
                loader="torch" if method == "e_simclr" else "device",
            ),
            f"{method}, width {width}",
        )
        for method in data.METHODS
        for width in data.WIDTHS
    ][:num_kills]
    chance = random.Random(f"{seed} kills")
    injections, kills = [], []
    for case, observed in observe_all(cases, in_parallel):
        if isinstance(observed, str):
            injections.append(not_reproducible(case, observed))
            continue
        for number in range(-(-num_kills // len(cases))):
            moments = [_moment(observed, number, chance)]
            if number % 6 == 5:
                moments.append(_moment(observed, number + 1, chance))
            kills.append(
                Kill(
                    case=case, observed=observed, moments=tuple(moments), seed=f"{seed} {case.name} {number}"
                )
            )
    found, num_in_training = inject_kills(kills, in_parallel)
    print(f"kills: {num_in_training} of {len(found)} runs were killed in the middle of training")
    return injections + found


def _moment(observed: Any, number: int, chance: random.Random) -> Moment:
    """Of ten: four at file operations, six between a step and the next, a few of these in the start-up."""
    if number % 10 < 4:
        return at_step(observed, chance, "SIGTERM" if number % 4 == 3 else "SIGKILL")
    return Moment(
        signal="SIGTERM" if number % 3 == 0 else "SIGKILL",
        num_lines=chance.randrange(data.NUM_STEPS),
        after_s=chance.random() * observed.duration_s / data.NUM_STEPS,
    )
