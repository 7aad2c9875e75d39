"""The processes of a run under torchrun: their group, and what all of them do or none.

Every rank runs the same program. What only one of them meets, a file that is not on its machine, a sample that does
not decode, a signal, is told to the others where all of them come by: `all_or_none`. Otherwise they would wait for it
in the next collective. A rank that is killed closes its connections, which ends the others at once; the time limit is
for one that lives and does not come on, and has to leave time for a slow compilation or storage on one of them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fast_essl.config import ConfigError
from fast_essl.distributed import max_over_ranks, num_ranks, rank
from fast_essl.errors import explain
from loaders import machine
from loaders.errors import DataError

T = TypeVar("T")

TIMEOUT_S = 600.0
"""How long a rank waits for the others in a collective, unless the environment says otherwise."""
TIMEOUT_VARIABLE = "FAST_ESSL_RANK_TIMEOUT_S"
_ANSWER_S = 3.0
"""How long the ranks whose wait is over look for each other: they waited for the same one."""
_NUM_REASON_BYTES = 2000


class EndedByAnotherRankError(Exception):
    """Another rank cannot go on; the message is one line with its reason."""


class LostRankError(Exception):
    """The connection to another rank broke; the message is one line."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the group of ranks that torchrun's environment describes; with one rank or none, do nothing.

    Collectives on CPU tensors go by gloo, those on CUDA tensors by NCCL, on the device of number LOCAL_RANK.

    Errors: `ConfigError` where the environment is not torchrun's; `LostRankError` when another rank is gone.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if not os.environ["WORLD_SIZE"].isdecimal():
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}: must be a number; start ranks with torchrun"
        )
    missing = [
        name
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but {missing[0]} is not set: start ranks with torchrun"
        )
    timeout = _timeout()
    on_cuda = torch.cuda.is_available()
    if on_cuda and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():  # if not, resolve_device tells
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store: Store | None = None
    try:
        store, number, count = next(iter(rendezvous("env://", timeout=timeout)))
        store = PrefixStore(_agreed_name(store, number, count, timeout), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=number,
            world_size=count,
            timeout=timeout,
        )
        yield
    except RuntimeError as error:  # the group is left as it is: with a rank gone, NCCL would wait for it
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = " ".join(str(error).split()).partition(". ")[0]
        wait = f"did not answer within {timeout.total_seconds():g} s ({TIMEOUT_VARIABLE})"
        if store is not None and "time" in reason.lower():
            wait += _missing_ranks(store, number, count)
        raise LostRankError(
            f"another rank ended, or {wait}: {reason}; the same command continues from the checkpoint"
        ) from error
    except BaseException:
        # All ranks end now, each with its own exit code, and torchrun would send a signal to the slower ones.
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if dist.is_initialized():
            dist.destroy_process_group()  # its threads would abort the interpreter's end
        raise
    dist.destroy_process_group()


def _timeout() -> datetime.timedelta:
    """Errors: `ConfigError` where the environment holds no time."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise ConfigError(f"{TIMEOUT_VARIABLE} = {text}: must be seconds, above 0 and at most a million")
    return datetime.timedelta(seconds=seconds)


def _missing_ranks(store: Store, number: int, count: int) -> str:
    """Which ranks the others were waiting for; empty where the store does not answer, either."""
    missing: list[int] = []

    def look() -> None:
        with contextlib.suppress(RuntimeError):
            store.set(f"waiting/{number}", "")
            deadline = time.monotonic() + _ANSWER_S
            while time.monotonic() < deadline:
                found = [other for other in range(count) if not store.check([f"waiting/{other}"])]
                time.sleep(0.1)
            missing.extend(found)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(2 * _ANSWER_S)
    return f", no sign of rank {', '.join(map(str, missing))}" if missing else ""


def _agreed_name(store: Store, number: int, count: int, timeout: datetime.timedelta) -> str:
    """A name that the ranks started now, and none before them, agree on.

    torchrun (2.13) keeps one store for all its restarts, and in it the addresses of ranks that are gone. Each rank
    says a new word, rank 0 publishes all words, and they hold when every rank has found its own among them.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    said: set[str] = set()
    store.set(f"word/{number}", own)
    while time.monotonic() < deadline:
        if number == 0:
            store.set("words", " ".join(store.get(f"word/{other}").decode() for other in range(count)))
        words = store.get("words").decode()
        if words.split()[number : number + 1] == [own]:
            if words not in said:
                store.add(words, 1)
                said.add(words)
            if store.add(words, 0) == count:
                return words
        time.sleep(0.05)
    raise LostRankError(f"not all of the {count} ranks have come within {timeout}")


def ranks_on_this_machine() -> int:
    """Ranks that share this machine's cores and GPUs; 1 without a group."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if num_ranks() > 1 else 1


def num_cores() -> int:
    """This rank's share of the cores that it may use."""
    return max(1, machine.num_cores() // ranks_on_this_machine())


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """The body succeeds on every rank, or every rank raises: a rank where it failed its error, the others another.

    Every rank has to come here, and the body may hold collectives only where all ranks fail alike.

    Errors: those of the body, where it is the first rank that failed; else `EndedByAnotherRankError`.
    """
    error: Exception | None = None
    try:
        yield
    except (ConfigError, DataError, OSError) as failure:
        error = failure
    first_failed = num_ranks() - max_over_ranks(0 if error is None else num_ranks() - rank())
    if first_failed < num_ranks():
        reason = _told_by(first_failed, error)
        if error is not None and rank() == first_failed:
            raise error
        raise EndedByAnotherRankError(f"rank {first_failed} cannot go on: {reason}")


def _told_by(number: int, error: Exception | None) -> str:
    """The error of a rank as one line; all ranks come here."""
    explained = None if error is None else explain(error)
    line = "" if explained is None else " ".join(explained[1].split())
    if num_ranks() == 1:
        return line
    own = line.encode()[:_NUM_REASON_BYTES].ljust(_NUM_REASON_BYTES)
    told = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    dist.broadcast(told, number)
    return told.numpy().tobytes().decode(errors="replace").rstrip()


def together(items: Iterator[T]) -> Iterator[T]:
    """Pass items on as long as every rank has its own. Errors: as `all_or_none`."""
    while True:
        with all_or_none():
            item = next(items, None)
        if item is None:
            return
        yield item


def data_parallel(method: nn.Module, device: torch.device) -> nn.Module:
    """The method, its gradients averaged over the ranks in the backward pass; itself on one rank.

    Rank 0's weights become those of all, and its running statistics at every step.
    """
    if num_ranks() == 1:
        return method
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(method, device_ids=device_ids, gradient_as_bucket_view=True)


def share_buffers(module: nn.Module) -> None:
    """Give every rank the running statistics of rank 0: those that are saved and evaluated."""
    if num_ranks() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
