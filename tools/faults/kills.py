"""Killing a command at a moment, running it again, and comparing what it leaves with that of one that was let alone."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cases import Case, Observed, attempt, observe, prepare
from children import Child, Outcome
from file_steps import StepFault
from results import file_names, num_steps_logged
from tally import Injection, judge, judge_killed

Signal = Literal["SIGKILL", "SIGTERM"]
NUM_TRIES = 5
"""For a moment that came after the command had ended."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When, and with what, a command is killed: at a step of `FileSteps`, after lines of metrics, or after a time."""

    signal: Signal
    step: StepFault | None = None
    num_lines: int | None = None
    after_s: float = 0.0
    """Seconds after the line or, without one, after the start."""

    def described(self, steps: list[str]) -> str:
        """For the reader."""
        if self.step is not None:
            half = ", half written" if self.step.torn else ""
            return f"{self.signal} at step {self.step.step}, {steps[self.step.step - 1]}{half}"
        after = f"line {self.num_lines} of metrics + " if self.num_lines is not None else ""
        return f"{self.signal} after {after}{self.after_s:.3f} s"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A case and the moments at which it is killed, one after the other."""

    case: Case
    observed: Observed
    moments: tuple[Moment, ...]
    seed: str


def inject_kills(kills: list[Kill], in_parallel: Callable[..., list[Any]]) -> tuple[list[Injection], int]:
    """The injections, and how many kills came in the middle of training."""
    found = in_parallel(kills, _inject)
    return [injection for injection, _ in found], sum(in_training for _, in_training in found)


def observe_all(cases: list[Case], in_parallel: Callable[..., list[Any]]) -> list[tuple[Case, Any]]:
    """Every case without a fault; a reason in place of `Observed` where it fails even so."""
    return list(zip(cases, in_parallel(cases, _observe), strict=True))


def not_reproducible(case: Case, reason: str) -> Injection:
    """A case that goes wrong without any fault counts as one that is silently wrong."""
    return Injection(kind=f"kill: {case.name}", fault="none", verdict="silently wrong", detail=reason)


def at_step(observed: Observed, chance: random.Random, number: Signal) -> Moment:
    """A step of a random kind, so that the hundreds of writes leave something for the few renames."""
    kind = chance.choice(sorted(set(observed.steps)))
    step = chance.choice([n for n, name in enumerate(observed.steps, 1) if name == kind])
    fault = StepFault(step=step, what=number, torn=chance.random() < 0.5)
    return Moment(signal=number, step=fault)


def _observe(case: Case, folder: Path) -> Any:
    try:
        return observe(case, folder)
    except RuntimeError as error:
        return str(error)


def _inject(kill: Kill, folder: Path) -> tuple[Injection, bool]:
    case, observed = kill.case, kill.observed
    chance = random.Random(kill.seed)
    fault = ", then ".join(moment.described(observed.steps) for moment in kill.moments)
    in_training = False

    def ended(verdict: str, detail: str = "") -> tuple[Injection, bool]:
        return Injection(kind=f"kill: {case.name}", fault=fault, verdict=verdict, detail=detail), in_training

    work = prepare(case, folder)
    for number, moment in enumerate(kill.moments):
        before = folder / "before"
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(work, before)
        for _ in range(NUM_TRIES):
            outcome = _killed(case, folder, work, moment, again=number > 0)
            if outcome.code or outcome.hung or moment.step is not None:
                break
            # It had ended before: the same once more, sooner.
            shutil.rmtree(work)
            shutil.copytree(before, work)
            moment = Moment(
                signal=moment.signal, num_lines=moment.num_lines, after_s=moment.after_s * chance.random()
            )
        if wrong := judge_killed(outcome, signal.Signals[moment.signal]):
            return ended(*wrong)
        if case.metrics and 0 < num_steps_logged(work / case.metrics) < _num_steps(observed):
            in_training = in_training or outcome.code != 0
        # A manifest that waits for its name is that of a file which has its own: the check below opens the pair.
        left = [name for name in _left_behind(observed, work) if not name.endswith(".beton.json.next")]
        if moment.signal == "SIGTERM" and left:
            return ended("unclear", f"left after SIGTERM: {left}")
        if wrong_there := case.check(work):
            return ended("unclear", wrong_there)
    outcome = attempt(case, folder, work, again=True)
    verdict, detail = judge(outcome, [work], same=outcome.value == observed.result)
    if verdict == "noticed":
        return ended("unclear", f"cannot be run again: {detail}")
    if verdict == "harmless" and (left := _left_behind(observed, work)):
        return ended("unclear", f"left behind: {left}")
    return ended(verdict, detail)


def _killed(case: Case, folder: Path, work: Path, moment: Moment, *, again: bool) -> Outcome:
    if moment.step is not None:
        return attempt(case, folder, work, again=again, fault=moment.step)
    return attempt(case, folder, work, again=again, meanwhile=partial(_wait_and_kill, case, work, moment))


def _wait_and_kill(case: Case, work: Path, moment: Moment, child: Child) -> None:
    deadline = time.monotonic() + 60
    if moment.num_lines is not None:
        while num_steps_logged(work / case.metrics) < moment.num_lines:
            if child.ended(0.002) or time.monotonic() > deadline:
                return
    if not child.ended(moment.after_s):
        child.send(signal.Signals[moment.signal])


def _num_steps(observed: Observed) -> int:
    return sum(line["type"] == "step" for line in observed.result["metrics"])


def _left_behind(observed: Observed, work: Path) -> list[str]:
    """Files that a run without a fault does not leave; those that it would still make may be missing."""
    return sorted(set(file_names(work)) - set(observed.files))
