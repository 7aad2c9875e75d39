"""The commands: what works prints its result and returns 0, each mistake is one line on stderr and returns 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fast_essl.cli import main

ROOT = Path(__file__).resolve().parents[2]


def _run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as error:  # argparse's way out
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["pretrian"], "invalid choice: 'pretrian'"),
        (["report"], "the following arguments are required: RUN"),
        (["doctor", "--wrong"], "unrecognized arguments: --wrong"),
        (["convert"], "convert takes SOURCE and DEST.beton"),
        (["convert", "somewhere"], "convert takes SOURCE and DEST.beton"),
        (["convert", "a", "b.beton", "--quality", "high"], "argument --quality: invalid int value: 'high'"),
        (["convert", "a", "b.beton", "--encoding", "png"], "argument --encoding: invalid choice: 'png'"),
        (["convert", "a", "--verify", "b.beton"], "--verify takes one file"),
        (["convert", "--verify", "missing.beton"], "missing.beton"),
        (["convert", "missing", "b.beton"], "missing"),
        (["pretrain"], "pretrain takes a configuration first"),
        (["pretrain", "missing.toml"], "missing.toml: No such file or directory"),
        (["pretrain", "configs"], "configs: Is a directory"),
        (
            ["pretrain", "simclr_cifar"],
            "simclr_cifar: neither a file nor a recipe of fast_essl; the nearest is simclr_cifar10",
        ),
        (
            ["pretrain", "configs/e_simclr_cifar10.toml", "--train.epoch", "3"],
            "command line: unknown option --train.epoch 3; the nearest valid name is --train.epochs",
        ),
        (
            ["pretrain", "configs/e_simclr_cifar10.toml", "--data.train", "missing.beton"],
            "missing.beton: no such file",
        ),
        (
            ["pretrain", "e_simclr_cifar10", "--method.equivariance-weight", "-1"],
            "equivariance_weight = -1.0: must be 0",
        ),
        (
            ["pretrain", "simclr_cifar10", "--method.name", "byol"],
            "method.name = 'byol': must be one of 'simclr'",
        ),
        (
            ["pretrain", "simclr_cifar10", "--train.batch-size", "1"],
            "train.batch_size = 1: must be 2 or more",
        ),
        (["evaluate", "missing"], "missing: no run with a checkpoint"),
        (["probe", "missing"], "missing: no run with a checkpoint"),
        (["finetune", "missing", "--finetune.label-share", "2"], "missing: no run with a checkpoint"),
        (["export", "missing", "out.pth"], "missing: No such file"),
        (["study", "study_transformation"], "the nearest is study_transformations_cifar10"),
        (["study", "configs/simclr_cifar10.toml"], "a study has title, rows"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    words: list[str],
    wanted: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    code, out, err = _run(words, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("fast-essl: error: ")
    assert err.count("\n") == 1
    assert wanted in err


PLACES = (
    "folder",
    "empty",
    "bytes",
    "fifo",
    "dangling",
    "loop",
    "/dev/null",
    "/dev/zero",
    "x" * 300,
    "run",
    "a\nb",
)
"""What may stand where a file or a run's folder belongs; `run` holds fifos in place of its files."""


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:10])
def test_whatever_stands_in_place_of_a_file_is_one_line_and_code_2(
    place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "run").mkdir()
    for fifo in ("fifo", "run/config.toml", "run/last.pt", "run/metrics.jsonl"):
        os.mkfifo(fifo)
    for words in (
        ["pretrain", place],
        ["evaluate", place],
        ["probe", place],
        ["finetune", place],
        ["export", place, "out.pth"],
        ["study", place],
        ["speedrun", place],
        ["report", place],
        ["bench", place],
        ["photonics", "generate", "--preset", place],
        ["photonics", "finetune", place],
    ):
        code, out, err = _run(words, capsys)
        assert (code, out) == (2, ""), (words, err)
        assert err.startswith("fast-essl: error: ") and err.count("\n") == 1, (words, err)
        assert " ".join(place.split()) in err, (words, err)


def test_help_is_there_and_loads_neither_torch_nor_numba() -> None:
    code = (
        "import sys, fast_essl.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "finally: assert not {'torch', 'numba'} & set(sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for command in ("convert", "pretrain", "evaluate", "report", "doctor", "demo"):
        assert re.search(rf"^ +{command} ", answer.stdout, re.MULTILINE)


def test_the_help_of_pretrain_tells_every_field_with_the_files_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = _run(["pretrain", str(ROOT / "configs" / "simclr_cifar10.toml"), "--help"], capsys)
    assert code == 0
    assert "--method.equivariance-weight FLOAT" in out
    assert "(default: 0.0)" in out
    assert "λ in L = L_ssl" in out
    assert "--views.transformed.size INT" in out


def test_from_images_to_accuracies(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for index in range(20):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    code, out, err = _run(["convert", "images", "my.beton", "--workers", "1"], capsys)
    assert code == 0, err
    assert "my.beton: 20 images of 2 classes" in out
    code, out, err = _run(["convert", "--verify", "my.beton"], capsys)
    assert code == 0, err

    train = [
        "pretrain",
        str(tiny_config),
        "--data.train",
        "my.beton",
        "--train.max-steps",
        "2",
        "--train.seed",
        "5",
    ]
    code, out, err = _run(train, capsys)
    assert code == 0, err
    run_dir = Path("runs") / f"{tiny_config.stem}-seed5"
    assert f"{run_dir}: finished at step 2" in out
    code, out, err = _run(train, capsys)
    assert (code, out) == (0, f"{run_dir}: already finished at step 2; nothing to do\n")

    code, out, err = _run(["evaluate", str(run_dir)], capsys)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == json.loads((run_dir / "evaluation.json").read_text())
    assert len(out.splitlines()) > 1


@pytest.mark.parametrize(
    "order", ["images --split val my.beton", "--split val images my.beton", "images my.beton --split val"]
)
def test_options_of_convert_stand_anywhere_and_name_any_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        Path("images", split, "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(Path("images", split, "cat", f"{split}.png"))
    code, out, err = _run(["convert", *order.split(), "--workers", "1"], capsys)
    assert code == 0, err
    assert out.startswith("my.beton: 1 images of 1 classes")
    code, _, err = _run(["convert", "images", "--workers", "1", "my.beton", "more"], capsys)
    assert code == 2
    assert "unrecognized arguments: more" in err


def test_transformations_are_listed_with_their_cost(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(["transformations"], capsys)
    assert code == 0
    assert re.search(r"^four_fold_rotation +4 +6 +Quarter turns", out, re.MULTILINE)
    assert re.search(r"^jigsaw +24 +26 ", out, re.MULTILINE)
