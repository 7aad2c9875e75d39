"""A name that is not there gets the one that was meant, over all commands, options, fields and recipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fast_essl.cli import main
from fast_essl.nearest import likeness, nearest, proposal

CONFIG = "e_simclr_cifar10"


def test_the_first_of_the_names_most_alike() -> None:
    names = ["optimizer.base-learning-rate", "probe.base-learning-rate", "train.epochs", "probe.epochs"]
    assert nearest("epochs", names) == "train.epochs"
    assert nearest("probe.epoch", names) == "probe.epochs"
    assert nearest("--Base_Learning_Rate", names) == "optimizer.base-learning-rate"
    assert nearest("probe.lr", names) == "probe.base-learning-rate"


def test_initials_stand_for_words() -> None:
    assert likeness("lr", "optimizer.base-learning-rate") > likeness(
        "lr", "finetune.base-learning-rate-classifier"
    )
    assert nearest("wd", ["model.width", "train.seed", "optimizer.weight-decay"]) == "optimizer.weight-decay"
    assert likeness("l", "learning-rate") < 0.5


def test_what_is_not_alike_is_not_proposed() -> None:
    assert proposal("pretian", ["convert", "pretrain"]) == "; the nearest is pretrain"
    assert proposal("xyz", ["convert", "pretrain"]) == ""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pretain", "invalid choice: 'pretain'|the nearest is pretrain;"),
        ("generate", "the nearest is photonics generate;"),
        ("plan", "the nearest is bench plan;"),
        ("photonics genrate", "the nearest is generate; see `fast-essl photonics --help`"),
        ("photonics pretrain --row e_simcl", "the nearest is e_simclr;"),
        (
            "photonics study --presett smoke",
            "unknown option --presett smoke; the nearest valid name is --preset\n",
        ),
        ("photonics study --preset smok", "the presets are cpu, paper, smoke; the nearest is smoke\n"),
        ("photonics study --lr 1", "the nearest valid name is --optimizer.base-learning-rate\n"),
        ("--versoin", "unrecognized arguments: --versoin; the nearest is --version;"),
        (
            "--run-dir x pretrain",
            "unrecognized arguments: --run-dir; a command comes first, its options behind it;",
        ),
        (
            f"pretrain {CONFIG} --optimizer.lr 1",
            "--optimizer.lr 1; the nearest valid name is --optimizer.base-learning-rate\n",
        ),
        (f"pretrain {CONFIG} --lr 1", "the nearest valid name is --optimizer.base-learning-rate\n"),
        (
            f"pretrain {CONFIG} --run_dir x",
            "unknown option --run_dir x; the nearest valid name is --run-dir\n",
        ),
        (f"pretrain {CONFIG} --rundir=x", "unknown option --rundir x; the nearest valid name is --run-dir\n"),
        (f"pretrain --run_dir x {CONFIG}", "the nearest valid name is --run-dir\n"),
        (f"pretrain {CONFIG} --batch_size 8", "the nearest valid name is --train.batch-size\n"),
        (f"pretrain {CONFIG} --data.loader fcv", "the nearest is 'ffcv'\n"),
        ("pretrain e_simlcr_cifar10", "the nearest is e_simclr_cifar10\n"),
        ("study study_method_photo_digits", "the nearest is study_methods_photo_digits\n"),
        ("speedrun speedrun_cifar", "the nearest is speedrun_cifar10\n"),
        ("evaluate run --cofig x", "the nearest valid name is --config\n"),
        ("demo --sede 1", "the nearest valid name is --seed\n"),
        ("convert a b.beton --max_side 8", "unrecognized arguments: --max_side; the nearest is --max-side;"),
        ("convert a b.beton --on-error skp", "the nearest is skip;"),
        ("bench stpe", "the nearest is step;"),
        ("bench plna", "the nearest is plan;"),
        ("bench --batch_size 8", "the nearest valid name is --batch-size\n"),
        (
            "bench plan --gpu 8",
            "unrecognized arguments: --gpu; the nearest is --gpus; see `fast-essl bench plan --help`",
        ),
    ],
)
def test_a_typo_gets_the_nearest_name(
    words: str,
    found: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words.split())
    except SystemExit as error:  # argparse's way out
        code = int(error.code or 0)
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("fast-essl: error: ")
    for part in found.split("|"):
        assert part in captured.err
    assert list(tmp_path.iterdir()) == []


def test_underscores_are_as_good_as_hyphens_in_a_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", CONFIG, "--train.batch_size", "1"]) == 2
    assert "train.batch_size = 1: must be 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["pretain"], ["pretrain", CONFIG, "--lr", "1"], ["photonics", "genrate"]])
def test_wrong_usage_is_refused_without_torch(words: list[str]) -> None:
    program = (
        "import sys, fast_essl.cli as cli\n"
        "try: code = cli.main(sys.argv[1:])\n"
        "except SystemExit as error: code = error.code\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert "nearest" in run.stderr
