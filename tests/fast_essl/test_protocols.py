"""The evaluation protocols, against a plain loop over the same batches."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fast_essl import protocols, records, run_folder
from fast_essl.checkpoint import load_file, weights_digest
from fast_essl.cli import main
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


@pytest.mark.parametrize(
    ("optimizer", "schedule", "base"), [("sgd", "step", 3.0), ("sgd", "epoch", 3.0), ("lars", "epoch", 300.0)]
)
def test_the_probe_is_the_optimizer_on_a_frozen_backbone(run_dir, optimizer, schedule, base, monkeypatch):
    """One fit, its classifier caught as it is tested, beside a loop with nothing but tensors."""
    caught = []
    made = protocols._classifier
    monkeypatch.setattr(protocols, "_classifier", lambda *given: caught.append(made(*given)) or caught[-1])
    overrides = [*PROBE[:-1], "1", "--probe.schedule", schedule, "--probe.weight-decay", "0.01"]
    overrides += ["--probe.base-learning-rate", str(base), "--probe.optimizer", optimizer]
    overrides += ["--data.view-stage", "reference"]
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
            rate = base * 8 / 256 * 0.5 * (1 + math.cos(math.pi * step / (3 * len(loader))))
            gradients = [residual.T @ features, residual.sum(0)]
            for parameter, velocity, gradient in zip((weight, bias), velocities, gradients, strict=True):
                update = gradient + 0.01 * parameter
                if optimizer == "lars":  # the bias like the weight
                    update *= 0.001 * parameter.norm() / update.norm()
                velocity.mul_(0.9).add_(update)
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
    state = load_file(run_dir / run_folder.CHECKPOINT)["method"]
    assert result["measured"]["weights"] == weights_digest(state, "backbone.") and records.is_sealed(result)
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


def test_fine_tuning_is_sgd_of_two_rates_on_the_labelled_images(run_dir, monkeypatch):
    """Backbone and classifier, caught as they are tested, beside a loop that spells the update out."""
    caught = []
    tested = protocols._test
    monkeypatch.setattr(protocols, "_test", lambda *given: caught.append(given[-1]) or tested(*given))
    rates = (2.0, 20.0)
    overrides = [*FINETUNE, "--finetune.batch-size", "6", "--finetune.weight-decay", "0.01"]
    overrides += ["--finetune.base-learning-rate-backbone", str(rates[0]), "--data.view-stage", "reference"]
    overrides += ["--finetune.base-learning-rate-classifier", str(rates[1])]
    checkpoint = (run_dir / run_folder.CHECKPOINT).read_bytes()
    quiet(finetune_run, run_dir, [*overrides, "--finetune.num-fits", "2"])
    assert (run_dir / run_folder.CHECKPOINT).read_bytes() == checkpoint

    for seed, fitted in enumerate(caught):  # the second fit begins at the checkpoint like the first
        config, backbone, _ = load_run(run_dir, overrides)
        labels = open_loader("torch", config.data.train, (Recipe(size=16),), batch_size=8).images.labels
        chosen = labelled_subset(labels, share=0.5, seed=seed)
        recipe = Recipe(size=16, scale=(0.08, 1.0), jitter_p=0.0, grey_p=0.0)
        loader = open_loader(
            "torch", config.data.train, (recipe,), batch_size=6, seed=seed, subset=chosen, num_workers=1
        )
        torch.manual_seed(seed)
        classifier = torch.nn.Linear(backbone.num_features, 2)
        parts = [
            (parameter, torch.zeros_like(parameter), base)
            for module, base in zip((backbone, classifier), rates, strict=True)
            for parameter in module.parameters()
        ]
        backbone.train()
        seen = set()
        for epoch in range(2):
            for crops in loader.epoch(epoch):
                seen |= set(crops.indices.tolist())
                logits = classifier(backbone(make_views(crops, (recipe,)).views[0]))
                picked = logits.log_softmax(1)[torch.arange(6), crops.labels]
                gradients = torch.autograd.grad(-picked.mean(), [part[0] for part in parts])
                share = 0.5 * (1 + math.cos(math.pi * epoch / 2))
                with torch.no_grad():
                    for (parameter, velocity, base), gradient in zip(parts, gradients, strict=True):
                        velocity.mul_(0.9).add_(gradient + 0.01 * parameter)
                        parameter.sub_(base * 6 / 256 * share * velocity)
        assert seen <= set(chosen.tolist()) and len(seen) >= 12
        expected = torch.nn.Sequential(backbone, classifier).state_dict()
        for key, value in fitted.state_dict().items():
            assert torch.allclose(value, expected[key], atol=1e-4, rtol=1e-4), key
    assert not torch.allclose(caught[0][1].weight, caught[1][1].weight, atol=1e-3)


def test_fine_tuning_uses_the_share_of_labels(run_dir):
    said = []
    result = finetune_run(
        run_dir, overrides=[*FINETUNE, "--finetune.num-fits", "2"], say=said.append, show_progress=False
    )
    state = load_file(run_dir / run_folder.CHECKPOINT)["method"]
    assert result["measured"]["weights"] == weights_digest(state, "backbone.") and records.is_sealed(result)
    # 17 images a class: half is 8 of each.
    assert result["num_labelled"] == 16 and said[0].endswith("16 of 34 labels, 16 a batch")
    assert json.loads((run_dir / "finetune-0.5.json").read_text()) == json.loads(json.dumps(result))
    assert result["images"]["size"] == 16 and result["protocol"]["label_share"] == 0.5
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
        quiet(function, run_dir, ["--model.width", "16"])
    with pytest.raises(ConfigError, match="batch_size = 64: there are only 34 samples"):
        quiet(probe_run, run_dir, [*PROBE, "--probe.batch-size", "64"])
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(("command", "protocol"), [("probe", PROBE), ("finetune", FINETUNE)])
def test_bad_test_images_are_noticed_before_training(
    command, protocol, run_dir, tmp_path, capsys, monkeypatch
):
    whole = load_config(run_dir / run_folder.CONFIG).data.test
    (tmp_path / "cut.beton").write_bytes(whole.read_bytes()[:4000])
    (tmp_path / "cut.beton.json").write_bytes(Path(f"{whole}.json").read_bytes())
    monkeypatch.setattr(protocols, "_train", lambda *given: pytest.fail("trained"))
    assert main([command, str(run_dir), *protocol, "--data.test", str(tmp_path / "cut.beton")]) == 2
    error = capsys.readouterr().err
    assert "4000 bytes where its manifest says" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--finetune.batch-size", "1"], "finetune: a batch of 1 (16 labels): must be 2 or more"),
        (["--finetune.label-share", "2"], "label_share = 2.0: must be above 0 and at most 1"),
        (["--data.test", "missing.beton"], "missing.beton"),
    ],
)
def test_wrong_fine_tuning_is_one_line_and_code_2(overrides, message, run_dir, capsys):
    assert main(["finetune", str(run_dir), *FINETUNE, *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_fit_that_diverged_is_no_accuracy(run_dir, capsys):
    (run_dir / "finetune-0.25.json").unlink(missing_ok=True)
    words = ["finetune", str(run_dir), *FINETUNE, "--finetune.label-share", "0.25"]
    # Each step multiplies the weights by thousands.
    assert (
        main(
            [
                *words,
                "--finetune.base-learning-rate-backbone",
                "1e4",
                "--finetune.weight-decay",
                "1e3",
                "--finetune.epochs",
                "20",
            ]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert err.rstrip().endswith("not finite; lower the learning rate") and "top-1" not in out
    assert not (run_dir / "finetune-0.25.json").exists()


def test_the_command_prints_each_fit_their_spread_and_one_json_line(run_dir, capsys):
    assert main(["probe", str(run_dir), *PROBE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(":")] for line in lines[:2]] == ["fit 1 of 2", "fit 2 of 2"]
    assert "±" in lines[2] and "sample standard deviation of 2 fits" in lines[2]
    assert json.loads(lines[3]) == json.loads((run_dir / "probe.json").read_text()) and len(lines) == 4


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_ctrl_c_is_one_line_and_code_130(command, run_dir, capsys, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(protocols, "set_learning_rates", interrupted)
    assert main([command, str(run_dir), *(PROBE if command == "probe" else FINETUNE)]) == 130
    assert capsys.readouterr().err.endswith("fast-essl: error: interrupted\n")
