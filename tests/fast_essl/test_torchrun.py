"""Runs under torchrun: a rank that is killed, the same command again, restarts, and errors in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fast_essl import run_folder
from fast_essl.checkpoint import load_file

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 40
OPTIONS = f"--train.epochs {NUM_STEPS // 4} --train.knn-every 0 --train.checkpoint-every 5"


def start(config, run_dir, *options, restarts=0):
    """Two ranks, in a session of their own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", str(restarts), "-m", "fast_essl", "pretrain", str(config)]
    return subprocess.Popen(
        [*command, "--run-dir", str(run_dir), *OPTIONS.split(), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def pid_of_rank(process, number):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    mark = f"\0RANK={number}\0".encode()
    (pid,) = [int(pid) for pid in children if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    return pid


def steps(run_dir):
    path = run_dir / run_folder.METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_after(process, run_dir, rank, num_steps):
    """SIGKILL a rank once the run has come so far."""
    deadline = time.monotonic() + 240
    while len(steps(run_dir)) < num_steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    os.kill(pid_of_rank(process, rank), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on_by_itself_or_by_the_same_command(tiny_config, tmp_path):
    whole = start(tiny_config, tmp_path / "whole")
    output, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, output

    run_dir = tmp_path / "parts"
    parts = start(tiny_config, run_dir)
    kill_after(parts, run_dir, rank=1, num_steps=7)
    output, _ = parts.communicate(timeout=60)
    assert parts.returncode != 0
    assert "fast-essl: error: rank 0 on " in output and "another rank ended" in output, output
    step = load_file(run_dir / run_folder.CHECKPOINT)["step"]
    assert 0 < step < NUM_STEPS - 5

    # The same command, and torchrun starts the ranks again when rank 0, which writes, is gone.
    parts = start(tiny_config, run_dir, restarts=1)
    kill_after(parts, run_dir, rank=0, num_steps=step + 6)
    output, _ = parts.communicate(timeout=240)
    assert parts.returncode == 0, output
    assert f"finished at step {NUM_STEPS}" in output
    one, two = (load_file(folder / run_folder.CHECKPOINT) for folder in (tmp_path / "whole", run_dir))
    assert [line["loss"] for line in steps(run_dir)] == [line["loss"] for line in steps(tmp_path / "whole")]
    assert [key for key, value in one["method"].items() if not torch.equal(value, two["method"][key])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_stops(tiny_config, tmp_path, number):
    process = start(tiny_config, tmp_path)
    deadline = time.monotonic() + 240
    while len(steps(tmp_path)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    step = load_file(tmp_path / run_folder.CHECKPOINT)["step"]
    assert f"stopped at step {step} of {NUM_STEPS}; the same command continues" in output
    assert steps(tmp_path)[-1]["step"] == step


def test_a_wrong_value_is_one_line_and_code_2(tiny_config, tmp_path):
    process = start(tiny_config, tmp_path / "run", "--train.batch-size", "9")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("fast-essl: error:") == 1
    assert "train.batch_size = 9: must be a multiple of 2" in output
    assert output.count("exitcode  : 2") == 2, output
    assert not (tmp_path / "run").exists()
