"""Runs under torchrun: a rank that is killed, the same command again, restarts, and errors in one line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_essl import run_folder
from fast_essl.checkpoint import load_file
from fast_essl.config_io import load_config
from fast_essl.pretrain import pretrain
from fast_essl.ranks import TIMEOUT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 80
# At a low rate, where the rounding of two ranks' sums does not grow; batches still differ by a tenth in their loss.
OPTIONS = (
    f"--train.epochs {NUM_STEPS // 4} --train.knn-every 0 --train.checkpoint-every 5 "
    "--optimizer.base-learning-rate 0.001"
)


def start(config, run_dir, *options, restarts=0, timeout_s=600):
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
        env={**os.environ, TIMEOUT_VARIABLE: str(timeout_s)},
    )


def pid_of_rank(process, number):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    mark = f"\0RANK={number}\0".encode()
    (pid,) = [int(pid) for pid in children if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    return pid


def steps(run_dir):
    path = run_dir / run_folder.METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process, run_dir, num_steps):
    deadline = time.monotonic() + 240
    while len(steps(run_dir)) < num_steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_survives_signals_and_killed_ranks(tiny_config, tmp_path):
    """One run, ended in three ways, each time continued by the same command; its curve is that of one process."""
    run_dir = tmp_path / "ranks"
    process = start(tiny_config, run_dir)
    wait_for(process, run_dir, 3)
    process.terminate()  # torchrun passes it on
    output, _ = process.communicate(timeout=120)
    step = load_file(run_dir / run_folder.CHECKPOINT)["step"]
    assert f"stopped at step {step} of {NUM_STEPS}; the same command continues" in output
    assert steps(run_dir)[-1]["step"] == step < NUM_STEPS - 20

    process = start(tiny_config, run_dir)
    wait_for(process, run_dir, step + 7)
    os.kill(pid_of_rank(process, 1), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "fast-essl: error: rank 0 on " in output and "another rank ended" in output, output
    step = load_file(run_dir / run_folder.CHECKPOINT)["step"]
    assert step < NUM_STEPS - 10

    # Rank 0 writes and holds the folder; torchrun starts both again.
    process = start(tiny_config, run_dir, restarts=1)
    wait_for(process, run_dir, step + 6)
    os.kill(pid_of_rank(process, 0), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert f"finished at step {NUM_STEPS}" in output

    config = load_config(tiny_config, OPTIONS.split())
    pretrain(config, tmp_path / "one", show_progress=False)
    expected = [line["loss"] for line in steps(tmp_path / "one")]
    assert len(expected) == NUM_STEPS
    assert [line["loss"] for line in steps(run_dir)] == pytest.approx(expected, rel=0.02)


def test_a_wrong_value_is_one_line_and_code_2(tiny_config, tmp_path):
    process = start(tiny_config, tmp_path / "run", "--train.batch-size", "9")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("fast-essl: error:") == 1
    assert "train.batch_size = 9: must be a multiple of 2" in output
    assert output.count("exitcode  : 2") == 2, output
    assert not (tmp_path / "run").exists()


def test_a_full_disk_ends_all_ranks_with_its_line_and_the_checkpoint_of_before(tiny_config, tmp_path):
    run_dir = tmp_path / "run"
    process = start(tiny_config, run_dir, "--train.max-steps", "2")
    # Inherited by the ranks, which it starts seconds later.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    output, _ = process.communicate(timeout=120)
    reason = f"{run_dir}/backbone.pt: File too large; not written"
    assert output.count("fast-essl: error: ") == output.count("fast-essl: error: rank 0 on ") == 1, output
    assert output.count(reason) == 2 and "rank 0 cannot go on: " + reason in output, output
    assert output.count("exitcode  : 2") == 2, output
    assert sorted(os.listdir(run_dir)) == [".lock", "config.toml", "environment.json", "metrics.jsonl"]


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_when_the_time_is_over(tiny_config, tmp_path):
    process = start(tiny_config, tmp_path / "run", "--train.epochs", "2000", timeout_s=10)
    wait_for(process, tmp_path / "run", 2)
    stopped = pid_of_rank(process, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        output = ""
        while "fast-essl: error: " not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
    finally:
        os.kill(stopped, signal.SIGKILL)  # torchrun would do so after 30 s
        process.communicate(timeout=60)
    (line,) = [line for line in output.splitlines() if line.startswith("fast-essl: error: ")]
    assert "rank 0 on " in line and "did not answer within 10 s" in line and "no sign of rank 1" in line
    assert process.returncode != 0
