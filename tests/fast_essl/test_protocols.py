"""The evaluation protocols, against a plain loop over the same batches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fast_essl import protocols, run_folder
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.evaluate_run import load_run
from fast_essl.pretrain import pretrain
from fast_essl.protocols import finetune_run, labelled_subset, probe_run
from loaders import open_loader
from loaders.convert import convert
from loaders.recipe import Recipe
from loaders.views.reference import make_views

PROBE = ["--probe.size", "16", "--probe.epochs", "3", "--probe.batch-size", "8", "--probe.num-fits", "2"]
FINETUNE = ["--probe.size", "16", "--finetune.label-share", "0.5", "--finetune.epochs", "2"]


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(
        load_config(tiny_config, ["--train.max-steps", "3", "--train.knn-every", "0"]),
        folder,
        show_progress=False,
    )
    return folder


def quiet(function, run_dir, overrides):
    return function(run_dir, overrides=overrides, say=lambda text: None, show_progress=False)


@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_the_probe_is_sgd_on_a_frozen_backbone(run_dir, schedule, monkeypatch):
    """One fit, its classifier caught as it is tested, beside a loop with nothing but tensors."""
    caught = []
    made = protocols._classifier
    monkeypatch.setattr(protocols, "_classifier", lambda *given: caught.append(made(*given)) or caught[-1])
    overrides = [*PROBE[:-1], "1", "--probe.schedule", schedule, "--probe.weight-decay", "0.01"]
    overrides += ["--probe.base-learning-rate", "3", "--data.view-stage", "reference"]
    result = quiet(probe_run, run_dir, overrides)

    config, backbone, _ = load_run(run_dir, overrides)
    backbone.eval()
    recipe = Recipe(size=16, scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0)
    loader = open_loader("torch", config.data.train, (recipe,), batch_size=8, seed=0, num_workers=1)
    torch.manual_seed(0)
    initial = torch.nn.Linear(backbone.num_features, 2)
    weight, bias = initial.weight.detach().clone(), initial.bias.detach().clone()
    velocities = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for epoch in range(3):
        for number, crops in enumerate(loader.epoch(epoch)):
            with torch.no_grad():
                features = backbone(make_views(crops, (recipe,)).views[0])
            residual = (F.linear(features, weight, bias).softmax(1) - F.one_hot(crops.labels, 2)) / len(
                features
            )
            step = epoch * len(loader) + (number if schedule == "step" else 0)
            rate = 3 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * step / (3 * len(loader))))
            gradients = [residual.T @ features, residual.sum(0)]
            for parameter, velocity, gradient in zip((weight, bias), velocities, gradients, strict=True):
                velocity.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter.sub_(rate * velocity)
    assert torch.allclose(caught[0].weight, weight, atol=1e-5) and torch.allclose(
        caught[0].bias, bias, atol=1e-5
    )
    assert not torch.allclose(weight, initial.weight, atol=1e-3)

    test_recipe = Recipe.evaluation(16, 32 / 36, interpolation="bicubic")
    test = open_loader(
        "torch", config.data.test, (test_recipe,), batch_size=8, shuffle=False, drop_last=False, num_workers=1
    )
    told = []
    for crops in test.epoch(0):
        with torch.no_grad():
            scores = F.linear(backbone(make_views(crops, (test_recipe,)).views[0]), weight, bias)
        told += (scores.argmax(1) == crops.labels).tolist()
    assert result["top1"]["values"] == [pytest.approx(sum(told) / 10)] and result["top5"]["values"] == [1.0]


def test_the_probe_leaves_the_run_as_it_is_and_writes_its_result(run_dir):
    before = (run_dir / run_folder.CHECKPOINT).read_bytes()
    result = quiet(probe_run, run_dir, PROBE)
    assert (run_dir / run_folder.CHECKPOINT).read_bytes() == before
    assert json.loads((run_dir / "probe.json").read_text()) == json.loads(json.dumps(result))
    assert result["step"] == 3 and result["num_train"] == 34 and result["num_test"] == 10
    assert result["top1"]["n"] == 2 and result["protocol"]["epochs"] == 3
    assert result["top1"]["mean"] == pytest.approx(np.mean(result["top1"]["values"]))
    assert result["top1"]["stdev"] == pytest.approx(np.std(result["top1"]["values"], ddof=1))
    assert quiet(probe_run, run_dir, PROBE) == result


def test_the_backbone_does_not_move_under_the_probe_and_does_under_fine_tuning(run_dir, monkeypatch):
    seen = []
    moved = protocols._on

    def watched(device, backbone):
        backbone = moved(device, backbone)
        seen.append((backbone, {key: value.clone() for key, value in backbone.state_dict().items()}))
        return backbone

    monkeypatch.setattr(protocols, "_on", watched)
    quiet(probe_run, run_dir, [*PROBE[:-1], "1"])
    backbone, before = seen.pop()
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    quiet(finetune_run, run_dir, FINETUNE)
    backbone, before = seen.pop()
    after = backbone.state_dict()
    assert [key for key in before if torch.equal(after[key], before[key])] == []


def test_lars_probe_runs_and_adapts_the_bias_too(run_dir):
    result = quiet(
        probe_run, run_dir, [*PROBE, "--probe.optimizer", "lars", "--probe.base-learning-rate", "0.1"]
    )
    assert result["protocol"]["optimizer"] == "lars" and result["top1"]["n"] == 2


def test_fine_tuning_uses_the_share_of_labels(run_dir):
    said = []
    result = finetune_run(
        run_dir, overrides=[*FINETUNE, "--finetune.num-fits", "2"], say=said.append, show_progress=False
    )
    # 17 images a class: half is 8 of each.
    assert result["num_labelled"] == 16 and said[0].endswith("16 of 34 labels, 16 a batch")
    assert json.loads((run_dir / "finetune-0.5.json").read_text())["top1"] == result["top1"]
    assert quiet(finetune_run, run_dir, [*FINETUNE[:3], "0.01"])["num_labelled"] == 2


def test_labelled_subsets_are_stratified_nested_and_the_seed_s():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [400, 200, 100, 30, 3]))
    small, large = (labelled_subset(labels, share=share, seed=1) for share in (0.01, 0.1))
    assert np.bincount(labels[small]).tolist() == [4, 2, 1, 1, 1]
    assert np.bincount(labels[large]).tolist() == [40, 20, 10, 3, 1]
    assert set(small) <= set(large) and (np.diff(large) > 0).all()
    assert np.array_equal(large, labelled_subset(labels, share=0.1, seed=1))
    assert not np.array_equal(large, labelled_subset(labels, share=0.1, seed=2))
    assert np.array_equal(labelled_subset(labels, share=1.0, seed=1), np.arange(len(labels)))


def test_what_can_be_learnt_is_learnt(tmp_path, tiny_config):
    """Dark and bright images: a linear classifier on any features tells them apart."""
    from PIL import Image

    for split, count in (("train", 24), ("test", 8)):
        for number in range(count):
            path = tmp_path / split / ("dark", "bright")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            level = 40 + number if number % 2 == 0 else 200 + number
            Image.new("RGB", (16, 16), (level, level, level)).save(path)
        convert(str(tmp_path / split), tmp_path / f"{split}.beton", workers=1, progress=False)
    data = ["--data.train", str(tmp_path / "train.beton"), "--data.test", str(tmp_path / "test.beton")]
    config = load_config(tiny_config, [*data, "--train.max-steps", "1", "--train.knn-every", "0"])
    pretrain(config, tmp_path / "run", show_progress=False)
    assert quiet(probe_run, tmp_path / "run", [*PROBE, "--probe.epochs", "15"])["top1"]["mean"] == 1.0


@pytest.mark.parametrize("function", [probe_run, finetune_run])
def test_wrong_input_is_said_before_training(function, run_dir, tmp_path):
    with pytest.raises(ConfigError, match="no run with a checkpoint"):
        quiet(function, tmp_path, [])
    with pytest.raises(ConfigError, match="leave \\[model\\] as it is"):
        quiet(function, run_dir, ["--model.width", "8"])
    with pytest.raises(ConfigError, match="batch_size = 64: there are only 34 samples"):
        quiet(probe_run, run_dir, [*PROBE, "--probe.batch-size", "64"])
    assert not list(Path(tmp_path).iterdir())
