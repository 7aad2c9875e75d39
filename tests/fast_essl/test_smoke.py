"""Every recipe of the paper in its small form, from conversion to a checkpoint, and through the protocols."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fast_essl import run_folder
from fast_essl.config_io import load_config
from fast_essl.pretrain import pretrain
from fast_essl.protocols import finetune_run, probe_run

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMOKES = sorted(CONFIGS.glob("*_smoke.toml"))


@pytest.fixture(scope="module")
def data(photo_digits):
    train, test = (str(photo_digits / f"photo-digits-{split}.beton") for split in ("train", "test"))
    return ["--data.train", train, "--data.test", test]


def test_there_is_one_for_every_method_with_and_without_lambda_on_both_data_sets():
    names = {
        f"{e}{method}_{data}_smoke"
        for e in ("", "e_")
        for method in ("simclr", "simsiam", "barlow_twins")
        for data in ("cifar10", "imagenet")
    }
    assert {path.stem for path in SMOKES} == names


@pytest.mark.parametrize("path", SMOKES, ids=lambda path: path.stem)
def test_a_smoke_recipe_runs(path, data, tmp_path):
    config = load_config(path, data)
    summary = pretrain(config, tmp_path, show_progress=False)
    assert (summary.status, summary.step) == ("finished", 6)
    last = json.loads((tmp_path / run_folder.METRICS).read_text().splitlines()[-1])
    assert (last["equivariance_loss"] is not None) == path.stem.startswith("e_")
    assert (last["online_accuracy"] is not None) == ("imagenet" in path.stem)
    # What the small form must not change: the method, and the form of its network.
    full = load_config(CONFIGS / f"{path.stem.removesuffix('_smoke')}.toml")
    assert config.method == full.method and config.optimizer.name == full.optimizer.name
    for name in ("backbone", "stem", "projector_layers", "projector_norm", "zero_init_residual"):
        assert getattr(config.model, name) == getattr(full.model, name), name
    assert config.head.form == full.head.form


def test_the_protocols_run_on_a_smoke_recipe_s_run(data, tmp_path):
    few = ["--data.train", data[3], *data[2:]]  # the test images, a quarter as many
    pretrain(load_config(CONFIGS / "e_simsiam_imagenet_smoke.toml", few), tmp_path, show_progress=False)
    small = [
        "--probe.epochs",
        "1",
        "--probe.batch-size",
        "256",
        "--probe.num-fits",
        "2",
        "--finetune.epochs",
        "1",
    ]
    probe = probe_run(tmp_path, overrides=small, show_progress=False)
    finetune = finetune_run(tmp_path, overrides=small, show_progress=False)
    for result, num_fits in ((probe, probe["protocol"]["num_fits"]), (finetune, 1)):
        assert result["top1"]["n"] == result["top5"]["n"] == num_fits
        for name in ("top1", "top5"):  # shares of the test images
            num_right = [value * result["num_test"] for value in result[name]["values"]]
            assert num_right == pytest.approx([round(number) for number in num_right], abs=1e-6)
        # Even an untrained classifier has one of ten digits right more often among five guesses than at once.
        assert result["top1"]["mean"] < result["top5"]["mean"]
    assert probe["protocol"]["optimizer"] == "lars" and finetune["num_labelled"] < 100
