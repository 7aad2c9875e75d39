"""A run killed in mid-epoch ends, when continued, in the same weights as one that was left alone."""

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
STEPS_PER_EPOCH = 4
NUM_STEPS = 40
OVERRIDES = ["--train.epochs", str(NUM_STEPS // STEPS_PER_EPOCH)]


def _start(config: Path, run_dir: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fast_essl", "pretrain", str(config), "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*command, *OVERRIDES, *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the loader's processes can be killed with it
    )


def _num_lines(run_dir: Path) -> int:
    path = run_dir / run_folder.METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def _wait_for_lines(process: subprocess.Popen[str], run_dir: Path, num_lines: int) -> None:
    deadline = time.monotonic() + 120
    while _num_lines(run_dir) < num_lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)


def _losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["type"] == "step"]


@pytest.mark.parametrize(
    ("loader", "knn_every"), [("torch", "5"), ("ffcv", "0")]
)  # FFCV compiles for each of the evaluation's loaders
def test_a_killed_run_ends_in_the_same_weights(
    tiny_config: Path, tmp_path: Path, loader: str, knn_every: str
) -> None:
    more = ["--data.loader", loader, "--train.knn-every", knn_every, "--train.checkpoint-every", "5"]
    whole = _start(tiny_config, tmp_path / "whole", *more)
    output = whole.communicate(timeout=240)
    assert whole.returncode == 0, output

    parts = _start(tiny_config, tmp_path / "parts", *more)
    _wait_for_lines(parts, tmp_path / "parts", 7)
    os.killpg(parts.pid, signal.SIGKILL)
    parts.communicate()
    checkpoint_step = load_file(tmp_path / "parts" / run_folder.CHECKPOINT)["step"]
    assert 0 < checkpoint_step < NUM_STEPS
    assert checkpoint_step % STEPS_PER_EPOCH != 0, "killed too late to be in mid-epoch"

    parts = _start(tiny_config, tmp_path / "parts", *more)
    output = parts.communicate(timeout=240)
    assert parts.returncode == 0, output
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert len(_losses(tmp_path / "parts")) == NUM_STEPS
    for name in (run_folder.CHECKPOINT, run_folder.BACKBONE):
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        weights, others = (state.get("method") or state["backbone"] for state in (one, two))
        assert weights.keys() == others.keys()
        assert [key for key in weights if not torch.equal(weights[key], others[key])] == []


def test_ctrl_c_at_the_prompt_is_one_line_and_code_130(tiny_config: Path, tmp_path: Path) -> None:
    process = _start(tiny_config, tmp_path)
    _wait_for_lines(process, tmp_path, 3)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the loader's processes too
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped at step" in out and "the same command continues" in out
    assert "Traceback" not in err
    step = load_file(tmp_path / run_folder.CHECKPOINT)["step"]
    assert f"stopped at step {step} of {NUM_STEPS}" in out
    assert _losses(tmp_path)[-1][0] == step
