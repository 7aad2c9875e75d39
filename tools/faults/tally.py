"""What became of an injected fault, and the table of all of them."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from children import Outcome

VERDICTS = ("noticed", "harmless", "unclear", "silently wrong", "hang", "traceback", "native crash")
"""noticed: exit code 2 and one line that names the file. harmless: the same result as without the fault, bit for bit.
unclear: an error, but another exit code, no name or no single line; or something lost or left behind."""
BAD = VERDICTS[2:]
PREFIX = "fast-essl: error: "


@dataclass(frozen=True, kw_only=True)
class Injection:
    """One fault and what became of it."""

    kind: str
    """The table's row."""
    fault: str
    """What was done, for whoever looks for the reason."""
    verdict: str
    detail: str = ""


def judge(outcome: Outcome, names: Iterable[Path], *, same: bool) -> tuple[str, str]:
    """The verdict on a child that no signal of ours ended, and why.

    Args: `names` one of which the error has to name; `same` whether the result is that without the fault.
    """
    last = outcome.stderr.strip().rsplit("\n", 1)[-1].strip()
    if ended := _broken(outcome):
        return ended, last
    if outcome.code == 0:
        return ("harmless", "") if same else ("silently wrong", "exit code 0, another result")
    lines = [line for line in outcome.stderr.splitlines() if PREFIX in line]
    if outcome.code != 2 or len(lines) != 1:
        return "unclear", f"exit code {outcome.code}, {len(lines)} lines of error: {last}"
    if not any(str(name) in lines[0] for name in names):
        return "unclear", f"names no file: {lines[0]}"
    return "noticed", lines[0]


def judge_killed(outcome: Outcome, number: signal.Signals) -> tuple[str, str] | None:
    """What is wrong with how a child ended that got a signal; None where it ended as it should."""
    if ended := _broken(outcome):
        if outcome.code == -number:
            return None
        return ended, outcome.stderr.strip().rsplit("\n", 1)[-1]
    if outcome.code in (0, 128 + number):
        return None
    return "unclear", f"exit code {outcome.code} after {number.name}: {outcome.stderr[-300:]}"


def _broken(outcome: Outcome) -> str | None:
    if outcome.hung:
        return "hang"
    if "Traceback (most recent call last)" in outcome.stderr:
        return "traceback"
    return "native crash" if outcome.code < 0 else None


def table(injections: list[Injection]) -> str:
    """A row a kind of fault, a column a verdict."""
    counts: dict[str, Counter[str]] = {}
    for injection in injections:
        counts.setdefault(injection.kind, Counter())[injection.verdict] += 1
    counts["all"] = sum(counts.values(), Counter())
    width = max(map(len, counts)) + 2
    header = ("injected", *VERDICTS)
    lines = [f"{'fault':<{width}}" + "".join(f"{name:>16}" for name in header)]
    for kind, count in counts.items():
        numbers = [count.total(), *(count[verdict] for verdict in VERDICTS)]
        lines.append(f"{kind:<{width}}" + "".join(f"{number:>16}" for number in numbers))
    return "\n".join(lines)
