"""Every write, fsync, rename of a command fails: the disk is full from there on, or has one I/O error.

Beside that, writes that the system itself refuses: a file system that is too small, and a limit on a file's size.
"""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import children
import data
from cases import (
    Case,
    Observed,
    attempt,
    conversion_cases,
    evaluation_case,
    observe,
    prepare,
    run_case,
    study_case,
)
from children import Outcome
from file_steps import STORED, StepFault
from results import file_names
from tally import Injection, judge

RUN_STEPS = 4
OPTIONS = ("--train.max-steps", RUN_STEPS, "--train.checkpoint-every", "2")
NUM_SIZES = 12
"""File systems, and limits, of so many sizes below what the command needs."""
LARGE_MIB = 256


@dataclass(frozen=True, kw_only=True)
class Starved:
    """A case and what is missing: a step that fails, a file system of too few bytes, or a limit of a file's bytes."""

    case: Case
    observed: Observed
    what: Literal["step", "file system", "file size"]
    step: StepFault | None = None
    num_bytes: int = 0

    @property
    def described(self) -> str:
        """For the reader."""
        if self.step is None:
            return f"{self.what} of {self.num_bytes} bytes"
        half = ", half written" if self.step.torn else ""
        return f"{self.step.what} at step {self.step.step}, {self.observed.steps[self.step.step - 1]}{half}"


def inject(
    folder: Path, *, share: float, seed: int, in_parallel: Callable[..., list[Any]]
) -> list[Injection]:
    """Let writes fail; then one line names the path, nothing is lost, and the command can be run again."""
    data.make_training_data(folder)
    config = data.make_config(folder, "e_simclr", 8)
    cases = [
        run_case(config, "pretrain", *OPTIONS),
        evaluation_case(folder, config, *OPTIONS),
        study_case(folder, config, first_steps=0, num_steps=2),
        study_case(folder, config, first_steps=1, num_steps=2),
        *conversion_cases(folder),
    ]
    chance = random.Random(f"{seed} disk")
    mounts = _can_mount(folder)
    if not mounts:
        print("disk: no small file system can be mounted here; those faults are left out")
    starved: list[Starved] = []
    for case in cases:
        observed = observe(case, folder)
        faults = _steps(case, observed, chance) + _sizes(case, observed, chance, folder, mounts)
        chance.shuffle(faults)
        starved += faults[: max(1, round(len(faults) * share))]
    return in_parallel(starved, _inject)


def _steps(case: Case, observed: Observed, chance: random.Random) -> list[Starved]:
    """Every step of a run and a conversion; of a study, whose runs write the same, those outside of checkpoints."""
    found = []
    num_checkpoint_writes = 0
    for step, name in enumerate(observed.steps, 1):
        in_checkpoint = name.startswith("write") and ".pt" in name
        if not name.startswith(STORED) or (case.name.startswith("study") and in_checkpoint):
            continue
        whats: tuple[Literal["full", "broken"], ...] = ("full", "broken")
        if in_checkpoint:
            # A run's two checkpoints are written alike: each write fails with one error in the first, the other in
            # the second.
            num_checkpoint_writes += 1
            whats = (whats[num_checkpoint_writes % 2],)
        for what in whats:
            fault = StepFault(step=step, what=what, torn=chance.random() < 0.5)
            found.append(Starved(case=case, observed=observed, what="step", step=fault))
    return found


def _sizes(
    case: Case, observed: Observed, chance: random.Random, folder: Path, mounts: bool
) -> list[Starved]:
    """Sizes that are too small; what the case starts from fits."""
    largest = max((folder / "work" / name).stat().st_size for name in observed.files)
    before = sum(path.stat().st_size for path in case.start.rglob("*") if path.is_file()) if case.start else 0
    total = sum((folder / "work" / name).stat().st_size for name in observed.files)
    whats: tuple[Literal["file system", "file size"], ...] = ("file system", "file size")
    found = []
    for what in whats if mounts else whats[1:]:
        for _ in range(NUM_SIZES):
            least, most = (
                (before + 8192, max(before, total) + largest) if what == "file system" else (1, largest)
            )
            found.append(
                Starved(case=case, observed=observed, what=what, num_bytes=chance.randrange(least, most))
            )
    return found


def _inject(starved: Starved, folder: Path) -> Injection:
    case = starved.case

    def ended(verdict: str, detail: str = "") -> Injection:
        kind = f"{starved.what} fails: {case.name}" if starved.step else f"{starved.what}: {case.name}"
        return Injection(kind=kind, fault=starved.described, verdict=verdict, detail=detail)

    place = folder
    with contextlib.ExitStack() as stack:
        if starved.what == "file system":
            place = folder / "small"
            stack.enter_context(_mounted(place, starved.num_bytes))
        work = prepare(case, place)
        outcome = _attempt(starved, folder, work)
        verdict, detail = judge(outcome, [work], same=outcome.value == starved.observed.result)
        if verdict not in ("noticed", "harmless"):
            return ended(verdict, detail)
        left = set(file_names(work)) - set(starved.observed.files)
        # A manifest that waits for its name is that of a file which has its own: the check below opens the pair.
        if stray := sorted(name for name in left if not name.endswith(".beton.json.next")):
            return ended("unclear", f"left behind: {stray}")
        if verdict == "harmless":
            return ended(verdict)
        if wrong_there := case.check(work):
            return ended("unclear", wrong_there)
        if starved.what == "file system":
            _remount(place, LARGE_MIB << 20)
        again = attempt(case, folder, work, again=True)
        verdict_again, detail_again = judge(again, [work], same=again.value == starved.observed.result)
        if verdict_again != "harmless":
            bad = "unclear" if verdict_again == "noticed" else verdict_again
            return ended(bad, f"when run again: {detail_again}; first: {detail}")
        if left := sorted(set(file_names(work)) - set(starved.observed.files)):
            return ended("unclear", f"left behind when run again: {left}")
        return ended(verdict, detail)


def _attempt(starved: Starved, folder: Path, work: Path) -> Outcome:
    if starved.what != "file size":
        return attempt(starved.case, folder, work, fault=starved.step)
    action = children.command(*starved.case.arguments(work, False), result=partial(starved.case.result, work))

    def limited() -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (starved.num_bytes, resource.RLIM_INFINITY))
        try:
            return action()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return children.run(limited, folder=folder)


def _can_mount(folder: Path) -> bool:
    try:
        with _mounted(folder / "small", 1 << 20):
            return True
    except (OSError, subprocess.SubprocessError):
        return False


@contextlib.contextmanager
def _mounted(place: Path, num_bytes: int) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    _mount("mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "faults", str(place))
    try:
        yield
    finally:
        _mount("umount", "--lazy", str(place))
        shutil.rmtree(place)


def _remount(place: Path, num_bytes: int) -> None:
    _mount("mount", "-o", f"remount,size={num_bytes}", str(place))


def _mount(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
