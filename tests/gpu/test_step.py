"""The training step on a CUDA device: no waiting inside, channels-last throughout, the CPU's numbers."""

from __future__ import annotations

import json

import pytest
import torch

from fast_essl import run_folder
from fast_essl.config_io import load_config
from fast_essl.pretrain import pretrain
from fast_essl.run import Run
from fast_essl.staging import staged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]
    return [line["loss"] for line in lines if line["type"] == "step"]


def test_cuda_trains_as_the_cpu_does(tiny_config, tmp_path):
    for device in ("cpu", "cuda"):
        overrides = ["--train.device", device, "--train.precision", "fp32", "--train.knn-every", "0"]
        overrides += ["--data.view-stage", "reference"]
        pretrain(load_config(tiny_config, overrides), tmp_path / device, show_progress=False)
    assert losses(tmp_path / "cuda")[:4] == pytest.approx(losses(tmp_path / "cpu")[:4], rel=2e-3)


def test_a_step_that_is_not_logged_never_waits_for_the_device(tiny_config, tmp_path, monkeypatch):
    """From the second step to the one before the last: the first compiles kernels, the last is logged and saved."""
    end_step = Run.end_step

    def watched(run, loss, num_samples):
        end_step(run, loss, num_samples)
        torch.cuda.set_sync_debug_mode("error" if run.step in (2, 3, 4) else "default")

    monkeypatch.setattr(Run, "end_step", watched)
    overrides = ["--train.max-steps", "6", "--train.log-every", "100", "--train.knn-every", "0"]
    try:
        summary = pretrain(load_config(tiny_config, overrides), tmp_path, show_progress=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert summary.step == 6


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_backbones_give_the_same_losses(tiny_config, tmp_path, mode):
    for name in ("none", mode):
        overrides = ["--train.compile", name, "--train.precision", "fp32", "--train.knn-every", "0"]
        pretrain(load_config(tiny_config, overrides), tmp_path / name, show_progress=False)
    assert losses(tmp_path / mode)[:4] == pytest.approx(losses(tmp_path / "none")[:4], rel=2e-3)


def test_views_are_ready_when_they_are_used():
    """A slow stage on the side stream, a reader on the training stream: what is read is what was made."""
    from types import SimpleNamespace

    device = torch.device("cuda")

    def stage(batch):
        tensor = torch.full((1 << 24,), float(batch), device=device)
        for _ in range(50):
            tensor = tensor * 1.0
        return SimpleNamespace(
            views=(tensor,), transformed=None, transformed_labels=None, labels=tensor[:1], indices=tensor[:1]
        )

    import fast_essl.staging as staging

    identity, staging.to_device = staging.to_device, lambda batch, device: batch
    try:
        sums = [views.views[0].mean() for views in staged(range(8), stage, device)]
    finally:
        staging.to_device = identity
    assert [value.item() for value in sums] == list(range(8))
