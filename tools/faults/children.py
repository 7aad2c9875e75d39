"""Running an action in a forked child: quick, since nothing is imported again, and whatever happens to it stays there.

The parent never computes: it starts no thread of OpenMP, numba or torch, so that each child can start its own. Even
a checkpoint that the parent loads starts one, and the next child hangs.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from fast_essl.config import ConfigError
from loaders.errors import DataError

LIMIT_S = 180.0
"""What takes longer hangs. A child takes about a second, on a machine with much else to do some ten."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a child ended."""

    code: int
    """Its exit code; negative for the signal that ended it."""
    stderr: str
    value: Any
    """What the action returned; None unless it came to its end."""
    hung: bool
    """It had to be killed when its time was up."""


def run(
    action: Callable[[], Any],
    *,
    folder: Path,
    limit_s: float = LIMIT_S,
    meanwhile: Callable[[Child], None] | None = None,
) -> Outcome:
    """Run `action` in a child and wait for its end.

    A `DataError` or `ConfigError` becomes the line and the code that the command makes of it, any other exception a
    traceback.

    Args: `folder` for its output; `meanwhile` is called with the child while it runs, to send it signals.
    """
    value_file, errors = folder / "value.pickle", folder / "stderr.txt"
    value_file.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _be_the_child(action, value_file, errors, folder / "stdout.txt")
    with Child(pid) as child:
        if meanwhile is not None:
            meanwhile(child)
        hung = not child.ended(limit_s)
    value = pickle.loads(value_file.read_bytes()) if value_file.exists() else None
    text = errors.read_text(errors="replace") if errors.exists() else ""
    return Outcome(code=child.code, stderr=text, value=value, hung=hung)


class Child:
    """A running child process, killed with its group if it is still there at the end."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code = 0
        """Its exit code, once the block has ended."""
        self._descriptor = os.pidfd_open(pid)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def __enter__(self) -> Child:
        return self

    def ended(self, within_s: float = 0) -> bool:
        """Whether it has ended; waits for that as long as it is told to."""
        return bool(self._poll.poll(within_s * 1000))

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; it is not reaped before the block ends, so the number is still its own."""
        os.kill(self.pid, number)

    def __exit__(self, *_: object) -> None:
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        os.close(self._descriptor)


def _be_the_child(action: Callable[[], Any], value_file: Path, errors: Path, output: Path) -> None:
    code = 1
    try:
        os.setsid()
        # A run asks git for its commit, which takes longer than the run; without a PATH it does without.
        os.environ["PATH"] = ""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for path, number in ((os.devnull, 0), (output, 1), (errors, 2)):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(path, flags, 0o600)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True)
        torch.set_num_threads(1)
        code, value = _called(action)
        if code == 0:
            # Through the system, since the action may have made the writing of files fail.
            descriptor = os.open(value_file, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(descriptor, pickle.dumps(value))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _called(action: Callable[[], Any]) -> tuple[int, Any]:
    try:
        return 0, action()
    except (ConfigError, DataError) as error:
        print(f"fast-essl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2, None
    except SystemExit as error:
        return (error.code if isinstance(error.code, int) else 1), None
    except BaseException:
        traceback.print_exc()
        return 1, None


def command(*arguments: object, result: Callable[[], Any] | None = None) -> Callable[[], Any]:
    """The action of `fast-essl` with these arguments; returns the result when it ended well."""

    def action() -> Any:
        from fast_essl.cli import main

        code = main([str(argument) for argument in arguments])
        if code:
            raise SystemExit(code)
        return result() if result is not None else None

    return action


def in_parallel(
    items: Sequence[Item],
    work: Callable[[Item, Path], Result],
    *,
    folder: Path,
    num_processes: int,
    done: Callable[[int], None],
) -> list[Result]:
    """`work(item, folder of its own)` for all items, a share of them in each of some forked processes.

    Args: `done` is called with the number of finished items now and then.
    Errors: `RuntimeError` when `work` raises or a process dies.
    """
    pipes: dict[Connection, list[Result]] = {}
    pids = []
    for share in range(num_processes):
        theirs, ours = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            _work_through(items[share::num_processes], work, folder / f"worker{share}", ours)
        ours.close()
        pids.append(pid)
        pipes[theirs] = []
    waiting = set(pipes)
    while waiting:
        for pipe in wait(waiting):
            try:
                pipes[pipe].append(pipe.recv())
                done(sum(map(len, pipes.values())))
            except EOFError:
                waiting.discard(pipe)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        raise RuntimeError(f"the processes that inject faults ended with {codes}")
    shares = list(pipes.values())
    return [shares[number % num_processes][number // num_processes] for number in range(len(items))]


def _work_through(
    items: Sequence[Item], work: Callable[[Item, Path], Result], folder: Path, pipe: Connection
) -> None:
    code = 1
    try:
        folder.mkdir(exist_ok=True)
        for item in items:
            pipe.send(work(item, folder))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
