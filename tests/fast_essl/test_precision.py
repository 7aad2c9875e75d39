"""Mixed precision and layout of the training step, on a CUDA device or, where there is none, on the CPU.

A run refuses reduced precision on the CPU, where it is slow; here the CPU is told to.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from fast_essl import pretrain as pretrain_module
from fast_essl import run_folder
from fast_essl.config_io import load_config
from fast_essl.pretrain import pretrain
from fast_essl.run import Run

pytestmark = pytest.mark.device
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(config_path, run_dir, monkeypatch, precision, *overrides):
    """Pretrain in a precision without an evaluation; returns the losses of all steps."""
    options = ["--train.knn-every", "0", *overrides]
    if torch.cuda.is_available():
        options += ["--train.precision", precision]
    else:
        where = torch.device("cpu"), DTYPES[precision]
        monkeypatch.setattr(pretrain_module, "resolve_device", lambda config: where)
    pretrain(load_config(config_path, options), run_dir, show_progress=False)
    lines = [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]
    return [line["loss"] for line in lines if line["type"] == "step"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_fp32(tiny_config, tmp_path, monkeypatch, precision):
    expected, losses = (
        run(tiny_config, tmp_path / name, monkeypatch, name, "--train.max-steps", "4")
        for name in ("fp32", precision)
    )
    assert losses == pytest.approx(expected, rel=0.05) and losses != expected


def test_every_convolution_sees_channels_last(tiny_config, tmp_path, monkeypatch):
    seen = []
    build = pretrain_module.build_method

    def watched(*args, **kwargs):
        method = build(*args, **kwargs)
        for module in method.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda _, inputs, output: seen.extend(
                        x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output)
                    )
                )
        return method

    monkeypatch.setattr(pretrain_module, "build_method", watched)
    run(tiny_config, tmp_path, monkeypatch, "bf16", "--train.max-steps", "2")
    assert len(seen) > 50 and all(seen)


def test_fp16_skips_a_step_whose_gradients_overflow(tiny_config, tmp_path, monkeypatch):
    """One gradient is made infinite in the fifth step: that step leaves the weights, and the loss scale is halved."""
    build, calls, weights = pretrain_module.build_method, [], []
    end_step = Run.end_step

    def watched(*args, **kwargs):
        method = build(*args, **kwargs)
        weight = method.backbone.conv1.weight

        def overflow(gradient):
            calls.append(1)
            return gradient * torch.inf if len(calls) == 5 else gradient

        weight.register_hook(overflow)
        weights.append(method.head[0].weight.detach().clone())
        monkeypatch.setattr(
            Run,
            "end_step",
            lambda run, *given: (
                weights.append(method.head[0].weight.detach().cpu().clone()),
                end_step(run, *given),
            ),
        )
        return method

    monkeypatch.setattr(pretrain_module, "build_method", watched)
    run(tiny_config, tmp_path, monkeypatch, "fp16", "--train.max-steps", "7")
    same = [torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert same[2:] == [False, False, True, False, False]  # the first ones may overflow by themselves
    state = torch.load(tmp_path / run_folder.CHECKPOINT, weights_only=True)
    assert state["scaler"]["scale"] == 2.0 ** (16 - sum(same))
