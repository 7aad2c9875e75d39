"""The training loop on a tiny network: what it leaves in the run's folder, and how it stops."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fast_essl.pretrain as pretrain_module
import fast_essl.source as source_module
from fast_essl import run_folder
from fast_essl.checkpoint import load_file
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import load_config
from fast_essl.errors import NonFiniteLossError
from fast_essl.evaluate_run import evaluate_run
from fast_essl.pretrain import pretrain
from loaders.convert import convert
from loaders.errors import DataError

STEPS_PER_EPOCH = 4
NUM_STEPS = 12


def _config(path: Path, overrides: str = "") -> Config:
    return load_config(path, overrides.split())


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]


def _is_share(accuracy: float, *, of: int) -> bool:
    """Whether an accuracy is a whole number of `of` images."""
    return accuracy * of == pytest.approx(round(accuracy * of), abs=1e-4) and 0 <= accuracy <= 1


def _before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Any], Any]) -> None:
    """Have `action` replace the views of the `step`-th step of the next run, counted from 1."""
    resolve = source_module.resolve_view_stage
    num_calls = 0

    def resolve_with_action(*args: Any) -> Callable[..., Any]:
        make_views = resolve(*args)

        def make_views_with_action(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            views = make_views(*args, **kwargs)
            return action(views) if num_calls == step else views

        return make_views_with_action

    monkeypatch.setattr(source_module, "resolve_view_stage", resolve_with_action)


def _with_nan(views: Any) -> Any:
    views.views[0][0, 0, 0, 0] = torch.nan
    return views


def test_a_run_leaves_all_that_describes_it(tiny_config: Path, tmp_path: Path) -> None:
    config = _config(tiny_config)
    summary = pretrain(config, tmp_path / "run", show_progress=False)
    assert (summary.status, summary.step, summary.num_steps) == ("finished", NUM_STEPS, NUM_STEPS)
    assert summary.samples_per_s > 0
    assert load_config(tmp_path / "run" / run_folder.CONFIG) == config

    lines = _lines(tmp_path / "run")
    steps = [line for line in lines if line["type"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert [line["epoch"] for line in steps] == [step // STEPS_PER_EPOCH for step in range(NUM_STEPS)]
    for line in steps:
        assert line["loss"] == pytest.approx(line["ssl_loss"] + 0.4 * line["equivariance_loss"], rel=1e-5)
        assert _is_share(line["equivariance_accuracy"], of=4 * 8)
        assert 0 <= line["data_wait_share"] <= 1
        assert line["samples_per_s"] > 0
    rates = [line["learning_rate"] for line in steps]
    peak = 0.06 * 8 / 256
    assert rates[:5] == pytest.approx([0, peak / 4, peak / 2, 3 * peak / 4, peak])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    evaluations = [line for line in lines if line["type"] == "eval"]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(8, 1)]
    assert _is_share(evaluations[0]["knn_top1"], of=10)

    environment = json.loads((tmp_path / "run" / run_folder.ENVIRONMENT).read_text())
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert environment["num_cores"] >= 1
    checkpoint = load_file(tmp_path / "run" / run_folder.CHECKPOINT)
    backbone = load_file(tmp_path / "run" / run_folder.BACKBONE)
    for name, value in backbone["backbone"].items():
        assert torch.equal(value, checkpoint["method"][f"backbone.{name}"]), name


def test_the_baseline_has_no_equivariance_loss(tiny_config: Path, tmp_path: Path) -> None:
    config = _config(tiny_config, "--method.equivariance-weight 0 --train.max-steps 2")
    pretrain(config, tmp_path, show_progress=False)
    last = _lines(tmp_path)[-1]
    assert last["loss"] == last["ssl_loss"]
    assert last["equivariance_loss"] is None
    assert last["equivariance_accuracy"] is None


def test_training_changes_all_weights_and_lowers_the_loss(tiny_config: Path, tmp_path: Path) -> None:
    # Light above, dark below: which way an image is turned is soon learnt, far beyond what rounding could change.
    shade = np.linspace(230, 20, 16).reshape(16, 1, 1)
    for index in range(34):
        pixels = shade + np.random.default_rng(index).integers(-20, 21, (16, 20, 3))
        path = tmp_path / "shaded" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    convert(str(tmp_path / "shaded"), tmp_path / "shaded.beton", workers=1, progress=False)
    config = _config(
        tiny_config,
        f"--data.train {tmp_path / 'shaded.beton'} --train.epochs 12 --train.knn-every 0 "
        "--optimizer.base-learning-rate 0.3 --method.equivariance-weight 2",
    )
    pretrain(config, tmp_path / "run", show_progress=False)
    initial = dict(pretrain_module.build_method(config, num_classes=2).named_parameters())
    trained = load_file(tmp_path / "run" / run_folder.CHECKPOINT)["method"]
    assert [name for name, value in initial.items() if torch.equal(value, trained[name])] == []
    lines = _lines(tmp_path / "run")
    for name in ("loss", "equivariance_loss"):
        losses = [line[name] for line in lines]
        assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8]), name


def test_a_finished_run_is_left_as_it_is(tiny_config: Path, tmp_path: Path) -> None:
    config = _config(tiny_config, "--train.max-steps 2")
    pretrain(config, tmp_path, show_progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert pretrain(config, tmp_path, show_progress=False).status == "already finished"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_more_steps_continue_a_run_to_the_same_weights(tiny_config: Path, tmp_path: Path) -> None:
    pretrain(_config(tiny_config), tmp_path / "whole", show_progress=False)
    for max_steps in (3, 8, 0):
        config = _config(tiny_config, f"--train.max-steps {max_steps}")
        pretrain(config, tmp_path / "parts", show_progress=False)
    assert _same_weights(tmp_path / "whole", tmp_path / "parts")


def _same_weights(run_dir: Path, other: Path) -> bool:
    one = load_file(run_dir / run_folder.CHECKPOINT)["method"]
    two = load_file(other / run_folder.CHECKPOINT)["method"]
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [5, 8])  # in mid-epoch, and where an evaluation is due
def test_a_signal_saves_and_the_run_goes_on(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int
) -> None:
    def send(views: Any) -> Any:
        os.kill(os.getpid(), number)
        return views

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        _before_step(patch, step, send)
        stopped = pretrain(_config(tiny_config), tmp_path / "parts", show_progress=False)
    assert (stopped.status, stopped.step, stopped.signal_number) == ("stopped", step, number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert load_file(tmp_path / "parts" / run_folder.CHECKPOINT)["step"] == step

    assert pretrain(_config(tiny_config), tmp_path / "parts", show_progress=False).status == "finished"
    pretrain(_config(tiny_config), tmp_path / "whole", show_progress=False)
    assert _same_weights(tmp_path / "whole", tmp_path / "parts")
    kept = ("type", "epoch", "step", "loss", "equivariance_accuracy", "learning_rate", "knn_top1")
    whole, parts = (
        [{name: line.get(name) for name in kept} for line in _lines(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert whole == parts


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _before_step(monkeypatch, 5, _with_nan)
    config = _config(tiny_config, "--train.log-every 100")  # found when the checkpoint of step 6 is due
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 5; .*last\.pt, of step 3"):
        pretrain(config, tmp_path, show_progress=False)
    state = load_file(tmp_path / run_folder.CHECKPOINT)
    assert state["step"] == 3
    assert all(torch.isfinite(value).all() for value in state["method"].values())


def test_a_loss_that_is_not_finite_before_any_checkpoint(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _before_step(monkeypatch, 1, _with_nan)
    with pytest.raises(NonFiniteLossError, match="not finite at step 1; there is no checkpoint yet"):
        pretrain(_config(tiny_config), tmp_path, show_progress=False)
    assert not (tmp_path / run_folder.CHECKPOINT).exists()


def test_weights_that_are_not_finite_are_never_saved(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pretrain_module.build_optimizer

    def build_exploding(*args: Any, **kwargs: Any) -> Any:
        optimizer = build(*args, **kwargs)
        step = optimizer.step

        def step_to_infinity(*args: Any) -> None:  # the loss of this step is finite, what it leaves is not
            step(*args)
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(torch.inf)

        monkeypatch.setattr(optimizer, "step", step_to_infinity)
        return optimizer

    monkeypatch.setattr(pretrain_module, "build_optimizer", build_exploding)
    with pytest.raises(NonFiniteLossError, match="the weights are not finite after step 1"):
        pretrain(_config(tiny_config, "--train.checkpoint-every 1"), tmp_path, show_progress=False)
    assert not (tmp_path / run_folder.CHECKPOINT).exists()


def test_another_configuration_or_dataset_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 2"), tmp_path, show_progress=False)
    with pytest.raises(ConfigError, match=r"model\.width = 8 there and 16 now"):
        pretrain(_config(tiny_config, "--model.width 16"), tmp_path, show_progress=False)
    other = tiny_config.parent / "other.beton"
    with pytest.raises(DataError, match=r"other images than .*other\.beton"):
        pretrain(_config(tiny_config, f"--data.train {other}"), tmp_path, show_progress=False)


def test_one_process_a_folder(tiny_config: Path, tmp_path: Path) -> None:
    with run_folder.held(tmp_path), pytest.raises(ConfigError, match="another process trains here"):
        pretrain(_config(tiny_config), tmp_path, show_progress=False)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            "--train.batch-size 64",
            r"train\.beton, opened with data\.loader = 'torch': batch_size = 64: .* only 34 samples",
        ),
        ("--train.precision fp16 --train.device cpu", "train.precision = 'fp16': needs a CUDA device"),
        (
            "--data.loader dali --data.dali-decoder mixed --train.device cpu",
            "data.dali_decoder = 'mixed': needs a CUDA device",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(
    tiny_config: Path, tmp_path: Path, overrides: str, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        pretrain(_config(tiny_config, overrides), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_dali_trains_as_the_reference_loader_does(tiny_config: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed", exc_type=ImportError)
    losses = []
    for loader in ("torch", "dali"):
        config = _config(tiny_config, f"--data.loader {loader} --train.device cpu --train.max-steps 4")
        pretrain(config, tmp_path / loader, show_progress=False)
        metrics = (tmp_path / loader / run_folder.METRICS).read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, metrics) if line["type"] == "step"])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_device_loader_trains_and_evaluates_as_the_reference_loader_does(
    tiny_config: Path, tmp_path: Path
) -> None:
    values = []
    for loader in ("torch", "device"):
        config = _config(tiny_config, f"--data.loader {loader} --train.device cpu --train.max-steps 4")
        pretrain(
            replace(config, train=replace(config.train, knn_every=1)), tmp_path / loader, show_progress=False
        )
        lines = _lines(tmp_path / loader)
        values.append([line["loss"] for line in lines if line["type"] == "step"])
        assert _is_share(lines[-1]["knn_top1"], of=10)
    assert len(values[0]) == 4 and values[1] == pytest.approx(values[0], rel=0.04)


def test_one_copy_a_step_is_a_quarter_of_the_copies(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def note(views: Any) -> Any:
        seen.append((len(views.transformed), set(views.transformed_labels.tolist())))
        return views

    for copies in ("all", "one"):
        with monkeypatch.context() as patch:
            _before_step(patch, 1, note)
            config = _config(
                tiny_config, f"--transformation.equivariance-copies {copies} --train.max-steps 2"
            )
            pretrain(config, tmp_path / copies, show_progress=False)
    assert [count for count, _ in seen] == [32, 8] and seen[0][1] == {0, 1, 2, 3} and len(seen[1][1]) > 1
    assert _lines(tmp_path / "one")[-1]["equivariance_loss"] > 0


def test_a_missing_file_is_named(tiny_config: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.beton"):
        pretrain(_config(tiny_config, "--data.train nowhere.beton"), tmp_path, show_progress=False)


def test_splits_of_different_classes_are_refused(tiny_config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cats"
    for name in ("tabby", "tiger"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / name / "1.png")
    convert(str(folder), tmp_path / "cats.beton", workers=1, progress=False)
    config = _config(tiny_config, f"--data.test {tmp_path / 'cats.beton'}")
    with pytest.raises(DataError, match=r"cats\.beton: its classes are not those of .*train\.beton"):
        pretrain(config, tmp_path / "run", show_progress=False)


def test_a_run_is_evaluated_from_its_folder(tiny_config: Path, tmp_path: Path) -> None:
    pretrain(_config(tiny_config, "--train.max-steps 2"), tmp_path, show_progress=False)
    result = evaluate_run(tmp_path)
    assert json.loads((tmp_path / run_folder.EVALUATION).read_text()) == result
    assert result["step"] == 2
    assert all(0 <= value <= 1 for value in result["accuracy"].values())
    with pytest.raises(ConfigError, match="no run"):
        evaluate_run(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--transformation.equivariance jigsaw --views.transformed.size 9", "even side, not 9 pixels"),
        ("--transformation.equivariance spin", "'spin' is unknown; choose one of four_fold_rotation"),
    ],
)
def test_what_does_not_fit_is_said_before_a_folder_is_made(
    tiny_config: Path, tmp_path: Path, overrides: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(_config(tiny_config, overrides), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", ["step", "epoch"])
@pytest.mark.parametrize("method", ["simsiam", "barlow_twins"])
def test_other_methods_resume_to_the_same_weights(
    tiny_config: Path, tmp_path: Path, method: str, schedule: str
) -> None:
    options = f"--method.name {method} --optimizer.schedule {schedule} --train.knn-every 0"
    options += " --optimizer.name lars" if method == "barlow_twins" else ""
    pretrain(_config(tiny_config, options), tmp_path / "whole", show_progress=False)
    for max_steps in (5, 0):
        pretrain(
            _config(tiny_config, f"{options} --train.max-steps {max_steps}"),
            tmp_path / "parts",
            show_progress=False,
        )
    whole, parts = (
        load_file(tmp_path / name / run_folder.CHECKPOINT)["method"] for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    rates = [line["learning_rate"] for line in _lines(tmp_path / "whole") if line["type"] == "step"]
    # Four steps an epoch: by epoch the rate has three values, one each; by step, half the peak comes twice.
    assert len(set(rates)) == (11 if schedule == "step" else 3)
