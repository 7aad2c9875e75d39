"""The commands that are killed and starved: what each starts from, does and leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import children
import data
from children import Child, Outcome
from file_steps import FileSteps, StepFault
from results import file_names, read_epoch, run_result


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that can be run again after a fault, and then ends as if there had been none."""

    name: str
    start: Path | None
    """A folder whose content the command finds; None for an empty one."""
    arguments: Callable[[Path, bool], Sequence[object]]
    """Of `fast-essl`, for a folder to work in, and whether it is run again after a fault."""
    result: Callable[[Path], Any]
    """What it left in the folder, without times."""
    metrics: str = ""
    """The folder of a run whose metrics.jsonl tells how far it is; "" where it is no run."""
    check: Callable[[Path], str] = field(default=lambda folder: "")
    """What is wrong in the folder after a fault, before the command is run again; "" for nothing."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A case without a fault."""

    result: Any
    files: list[str]
    steps: list[str]
    """As `FileSteps.names`."""
    duration_s: float


def prepare(case: Case, folder: Path) -> Path:
    """The folder for the case to work in, as it is before."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    if case.start is None:
        work.mkdir()
    else:
        shutil.copytree(case.start, work)
    return work


def attempt(
    case: Case,
    folder: Path,
    work: Path,
    *,
    again: bool = False,
    fault: StepFault | None = None,
    meanwhile: Callable[[Child], None] | None = None,
) -> Outcome:
    """Run the case's command in a child, with a fault or not; the outcome's value is the case's result."""
    action = children.command(*case.arguments(work, again), result=partial(case.result, work))

    def with_fault() -> Any:
        FileSteps(work, fault).install()
        return action()

    return children.run(action if fault is None else with_fault, folder=folder, meanwhile=meanwhile)


def observe(case: Case, folder: Path) -> Observed:
    """Run a case as it is, twice. Errors: `RuntimeError` when it fails, or ends in two different results."""
    work = prepare(case, folder)
    first = attempt(case, folder, work)
    work = prepare(case, folder)

    def counted() -> Any:
        steps = FileSteps(work).install()
        started = time.monotonic()
        children.command(*case.arguments(work, False))()
        return case.result(work), file_names(work), list(steps.names), time.monotonic() - started

    second = children.run(counted, folder=folder)
    if first.code or second.code:
        raise RuntimeError(f"{case.name}, without a fault: {first.stderr} {second.stderr}")
    result, files, steps, duration_s = second.value
    if result != first.value:
        raise RuntimeError(f"{case.name}: two runs without a fault end in different results")
    return Observed(result=result, files=files, steps=steps, duration_s=duration_s)


def run_case(config: Path, name: str, *options: object) -> Case:
    """Pretraining, with an evaluation in the middle."""
    return Case(
        name=name,
        start=None,
        arguments=lambda work, again: ("pretrain", config, "--run-dir", work / "run", *options),
        result=lambda work: run_result(work / "run"),
        metrics="run",
    )


def evaluation_case(folder: Path, config: Path, *options: object) -> Case:
    """Evaluation of a run, made here."""
    start = folder / "finished run"
    outcome = children.run(
        children.command("pretrain", config, "--run-dir", start / "run", *options), folder=folder
    )
    if outcome.code:
        raise RuntimeError(f"the run to evaluate: {outcome.stderr}")
    return Case(
        name="evaluate",
        start=start,
        arguments=lambda work, again: ("evaluate", work / "run"),
        result=lambda work: run_result(work / "run"),
    )


def study_case(folder: Path, config: Path, *, first_steps: int, num_steps: int) -> Case:
    """A study of one run; with `first_steps` it was finished at those, and is extended."""
    study, start = data.make_study(folder, config), None
    if first_steps:
        start = folder / "finished study"
        options = ("--train.max-steps", first_steps)
        outcome = children.run(
            children.command("study", study, "--out", start / "study", *options), folder=folder
        )
        if outcome.code:
            raise RuntimeError(f"the study to extend: {outcome.stderr}")
    return Case(
        name="study, extended" if first_steps else "study",
        start=start,
        arguments=lambda work, again: (
            "study",
            study,
            "--out",
            work / "study",
            "--train.max-steps",
            num_steps,
        ),
        result=_study_result,
    )


def conversion_cases(folder: Path) -> list[Case]:
    """A conversion to a new name, and one over an existing file of other images."""
    sources = data.make_mixed_folders(folder)
    old = folder / "old"
    old.mkdir()
    outcome = children.run(
        children.command("convert", sources[0], old / "images.beton", "--workers", 1), folder=folder
    )
    if outcome.code:
        raise RuntimeError(f"the file to replace: {outcome.stderr}")
    was = children.run(partial(_beton_result, old), folder=folder).value

    def case(name: str, start: Path | None) -> Case:
        def arguments(work: Path, again: bool) -> Sequence[object]:
            over = ("--overwrite",) if again or start is not None else ()
            return ("convert", sources[1], work / "images.beton", "--workers", 1, *over)

        return Case(
            name=name,
            start=start,
            arguments=arguments,
            result=_beton_result,
        )

    new = observe(case("conversion", None), folder).result
    return [
        dataclasses.replace(case(name, start), check=partial(_pair_is_whole, folder=folder, known=known))
        for name, start, known in (("conversion", None, (new,)), ("conversion, over a file", old, (was, new)))
    ]


def _study_result(work: Path) -> Any:
    cells = json.loads((work / "study" / "study.json").read_text())["cells"]
    for cell in cells:
        del cell["runs"]
    runs = [run_result(path.parent) for path in sorted(work.rglob("last.pt"))]
    return cells, runs


def _beton_result(work: Path) -> Any:
    return read_epoch("torch", work / "images.beton", data.MIXED_SIDE)


def _pair_is_whole(work: Path, *, folder: Path, known: tuple[Any, ...]) -> str:
    if not (work / "images.beton").exists():
        return "" if len(known) == 1 else "the file that was there is gone"
    outcome = children.run(partial(_beton_result, work), folder=folder)
    if outcome.code:
        return f"what is there cannot be read: {outcome.stderr.strip()[-200:]}"
    return "" if outcome.value in known else "what is there has other images"
