"""Results appear whole or not at all; what is damaged, no file, or on a full disk is one line with its name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fast_essl import records
from loaders.errors import DataError

STEP = {"type": "step", "step": 1, "epoch": 0, "elapsed_s": 1.0, "loss": 2.0}
STEP |= {"samples_per_s": 3.0, "data_wait_share": 0.1, "equivariance_loss": None}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({"a": [1.5, None, "ä"]}, {"b": 2}):
        records.write_json(path, value)
        assert records.read_json(path, remedy="") == value
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_names_the_file_and_leaves_that_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.json"
    records.write_json(path, {"a": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error; not written") as error:
        records.write_json(path, {"a": 2})
    assert (error.value.filename, error.value.errno) == (str(path), errno.EIO)
    assert os.listdir(tmp_path) == ["a.json"] and json.loads(path.read_text()) == {"a": 1}


def test_a_limit_on_files_is_an_error_with_the_file_s_name(tmp_path: Path) -> None:
    """As a full disk: part of the file is written, and the write after it fails."""
    script = (
        "import resource, sys; from pathlib import Path; from fast_essl.records import write_bytes\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n    write_bytes(Path(sys.argv[1]), bytes(20_000))\n"
        "except OSError as error:\n    print(error.filename, error.strerror)\n"
    )
    path = tmp_path / "large"
    output = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert output.stdout == f"{path} File too large; not written\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"a": 1}\0']
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        records.read_json(path, remedy="measure again")
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.endswith("; measure again") and "\n" not in message


def _read_json(path: Path) -> None:
    records.read_json(path, remedy="")


def _write(path: Path) -> None:
    records.write_text(path, "")


def _open_to_append(path: Path) -> None:
    records.open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND).close()


@pytest.mark.parametrize("use", [_read_json, _write, _open_to_append, records.read_metrics])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, use: Callable[[Path], object], kind: str
) -> None:
    path = tmp_path / "a"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(DataError, match=f"{path}: is a {kind}"):
        use(path)
    assert path.exists() and not path.is_file()


def test_devices_are_not_replaced() -> None:
    with pytest.raises(DataError, match="/dev/null: is a pipe, a device or a socket"):
        records.write_text(Path("/dev/null"), "")


def test_what_a_dead_process_left_of_a_file_is_removed_with_the_next(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "a.json"
    (tmp_path / f".a.json.{dead.pid}.part").write_text("{")
    # Those of a living process, of another file, and a name that only looks alike.
    kept = [f".a.json.{os.getppid()}.part", f".b.json.{dead.pid}.part", ".a.json.x.part"]
    for name in kept:
        (tmp_path / name).touch()
    records.write_json(path, {})
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "a.json"])


def test_a_sealed_result_tells_what_was_changed() -> None:
    result = records.sealed({"step": 2, "accuracy": {"knn_top1": 0.1}})
    assert records.is_sealed(json.loads(json.dumps(result)))
    assert not records.is_sealed({**result, "accuracy": {"knn_top1": 0.99}})
    assert not records.is_sealed({"step": 2})


def test_metrics_are_read_but_for_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    evaluation = {"type": "eval", "step": 1, "epoch": 0, "elapsed_s": 2.0, "knn_top1": 0.5}
    whole = json.dumps(STEP) + "\n" + json.dumps(evaluation) + "\n"
    path.write_text(whole + whole[:40])
    assert records.read_metrics(path) == [STEP, evaluation]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "damaged"),
        ("", "damaged"),
        ("[]", "not a line of metrics"),
        ("{}", "not a line of metrics"),
        (json.dumps({**STEP, "step": "1"}), "step is '1', not a number"),
        (json.dumps({**STEP, "loss": None}), "loss is None, not a number"),
        (json.dumps({**STEP, "ssl_loss": float("nan")}), "ssl_loss is nan, not a number"),
        (json.dumps({**STEP, "type": ["step"]}), "not a line of metrics"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(STEP)}\n{line}\n{json.dumps(STEP)}\n")
    with pytest.raises(DataError) as error:
        records.read_metrics(path)
    assert str(error.value).startswith(f"{path}, line 2: {reason}")
