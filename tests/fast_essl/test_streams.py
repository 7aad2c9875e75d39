"""Errors in one line, and output that is closed, full, broken or in ASCII: no command dies of it, none hides it."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_essl import cli
from fast_essl.cli import main
from fast_essl.errors import NonFiniteLossError, explain
from fast_essl.streams import prepare_streams

COMMAND = f'"{sys.executable}" -m fast_essl'


def _shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (
            "--help >/dev/full",
            2,
            "fast-essl: error: standard output: No space left on device; all but the printing",
        ),
        ("--help >&-", 2, "fast-essl: error: standard output: Bad file descriptor; all but the printing"),
        ("--help 2>&- >/dev/null", 0, ""),
        ("pretrain missing.toml >&-", 2, "missing.toml: No such file or directory"),
        ("pretrain missing.toml 2>/dev/full", 2, ""),
        ("pretrain missing.toml 2>&-", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_told(line: str, code: int, told: str) -> None:
    answer = _shell(f"{COMMAND} {line}")
    assert answer.returncode == code, answer.stderr
    assert told in answer.stderr and answer.stderr.count("\n") == bool(told), answer.stderr


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    answer = subprocess.run(
        [sys.executable, "-m", "fast_essl", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    os.close(writer)
    assert (answer.returncode, answer.stderr) == (141, b"")


def test_a_run_whose_output_is_closed_or_full_is_finished(tiny_config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    options = "--train.max-steps 2 --train.knn-every 0"
    answer = _shell(f'{COMMAND} pretrain "{tiny_config}" --run-dir "{run_dir}" {options} 2>&- >/dev/full')
    assert answer.returncode == 2
    assert (run_dir / "backbone.pt").is_file()
    # What a library prints to a closed descriptor did not end up in a file that took its number.
    assert (run_dir / "metrics.jsonl").read_text().count("\n") == 2


def test_an_ascii_terminal_gets_readable_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for language in ("ascii", "latin-1"):
        buffer = io.BytesIO()
        stream = io.TextIOWrapper(buffer, language)
        prepare_streams()
        stream.reconfigure(errors="fast_essl.readable")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["transformations"]) == 0
        print("λ · 3 ± 2 … é → 字", "caf\udce9")
        stream.flush()
        text = buffer.getvalue()
        assert b"\\x" not in text and b"Quarter turns: 0" in text
        if language == "ascii":
            assert b"0 degrees, 90 degrees" in text
            assert b"lambda * 3 +- 2 ... e -> ? caf\xe9" in text
        else:
            assert "0°, 90°".encode("latin-1") in text


def test_a_terminal_that_is_ascii_runs_every_page() -> None:
    answer = _shell(f"{COMMAND} pretrain e_simclr_cifar10 --help", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "lambda in L = L_ssl" in answer.stdout and answer.stdout.isascii()


def _allocate_too_much() -> None:
    torch.empty(2**60)


def _recurse(depth: int = 0) -> int:
    return _recurse(depth + 1) + 1


def _fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("failure", "code", "told"),
    [
        (_allocate_too_much, 1, "out of memory or threads: "),
        (lambda: _fail(MemoryError()), 1, "out of memory or threads: an allocation failed"),
        (
            lambda: _fail(torch.OutOfMemoryError("CUDA out of memory. Tried …\nmore")),
            1,
            "CUDA out of memory. Tried",
        ),
        (lambda: _fail(RuntimeError("can't start new thread")), 1, "threads: can't start new thread"),
        (_recurse, 2, "nested too deeply"),
        (lambda: _fail(NonFiniteLossError("the loss is not finite at step 3")), 1, "not finite at step 3"),
        (
            lambda: _fail(OSError(errno.ENOSPC, "No space left on device", "a.pt")),
            2,
            "error: a.pt: No space left",
        ),
        # No file is named: the line says where it happened.
        (lambda: os.write(os.open(os.devnull, os.O_RDONLY), b"x"), 2, "Bad file descriptor (in "),
    ],
)
def test_an_error_is_one_line(
    failure, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_transformations", lambda arguments: failure())
    assert main(["transformations"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fast-essl: error: ") and captured.err.count("\n") == 1
    assert told in captured.err


def test_a_fault_of_fast_essl_keeps_its_traceback() -> None:
    assert explain(KeyError("a")) is None
    assert explain(RuntimeError("shapes differ")) is None
