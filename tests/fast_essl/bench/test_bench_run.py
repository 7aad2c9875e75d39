"""`fast-essl bench` from the command line: a small one from end to end, and every mistake in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fast_essl.bench.cli import split_words
from fast_essl.cli import main
from fast_essl.config import ConfigError

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_all_parts_on_photographs_made_for_it(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", str(tiny_config), "--quick", "--batch-size", "4", "--train.device", "cpu"]
    assert main(words) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "bench"
    results = json.loads((folder / "bench.json").read_text())
    rows = results["rows"]
    wanted = [
        "decode",
        "crops",
        "loader",
        "view stage",
        "forward + backward",
        "optimizer",
        "step",
        "end to end",
    ]
    assert [name for name in rows if not name.startswith("storage")] == wanted
    assert "storage, from memory" in rows
    for row in rows.values():
        assert row["samples_per_s"] > 0
        assert row["batch_ms"]["min"] <= row["batch_ms"]["median"] <= row["batch_ms"]["max"]
    assert rows["step"]["batch_size"] == 4
    # Sixteen JPEGs of about 110 kB, gone again with their folder.
    assert results["data"]["num_samples"] == 16
    assert results["data"]["jpeg_share"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.png"]
    whole = rows["end to end"]["samples_per_s"]
    assert results["epoch_s"]["imagenet"] == pytest.approx(1_281_167 / whole)
    assert results["verdict"]["sentence"] in out
    assert results["machine_use"]["seconds"] > 0
    assert results["machine_use"]["load_average_before"] >= 0
    assert "loader alone" in out and "step on device-made data" in out
    assert "page cache: " in out
    assert "kernels: not measured, since on a CPU" in out
    picture = Image.open(folder / "bench.png")
    assert picture.width > 800
    assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 10

    # What was measured here on a CPU does not plan a cluster of GPUs, unless it is told their rate.
    plan = ["bench", "plan", "--gpus", "8", "--cores-per-gpu", "16", "--storage-mb-per-s", "1000"]
    assert main(plan) == 2
    assert "give one GPU's rate with --step-samples-per-s" in capsys.readouterr().err
    assert main([*plan, "--step-samples-per-s", "1500", "--batch-size", "4096"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["samples_per_s"]["compute"] == pytest.approx(12_000)


def test_chosen_parts_on_a_file(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw pixels are not decoded; the row is left out, and no verdict is given."""
    data = tiny_config.parent / "train.beton"
    words = [
        "bench",
        "views",
        "loader",
        str(tiny_config),
        "--data",
        str(data),
        "--quick",
        "--out",
        str(tmp_path),
    ]
    assert main([*words, "--train.device", "cpu"]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    names = [name for name in results["rows"] if not name.startswith("storage")]
    assert names == ["crops", "loader", "view stage"]
    assert results["verdict"] is None
    assert results["data"] == {
        "file": "train.beton",
        "num_samples": 34,
        "num_bytes": data.stat().st_size,
        "bytes_per_sample": 960.0,
        "longer_side": 20.0,
        "jpeg_share": 0.0,
    }
    out = capsys.readouterr().out
    assert "batch 2 (not the configuration's 8: --batch-size chooses)" in out
    assert "told when loader and step are measured together" in out


def test_a_chart_that_cannot_be_drawn_loses_no_figures(
    tiny_config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["bench", "views", str(tiny_config), "--quick", "--out", str(tmp_path), "--train.device", "cpu"]
    assert main(words) == 0
    assert "no chart: matplotlib cannot be imported" in capsys.readouterr().out
    assert (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["loadr"], "loadr: neither a file nor a recipe of fast_essl; the nearest is"),
        (["loadr"], "the parts are all, loader, views, kernels, step"),
        (["missing.toml"], "missing.toml: No such file or directory"),
        (["one.toml", "two.toml"], "bench takes parts and one configuration, not one.toml and two.toml"),
        (["e_simclr_cifar10", "--batch-size", "1"], "--batch-size 1: must be 2 or more"),
        (["e_simclr_cifar10", "--batch-size", "x"], "argument --batch-size: invalid int value: 'x'"),
        (["e_simclr_cifar10", "--data", "missing.beton"], "missing.beton: no such file"),
        (["e_simclr_cifar10", "--repeat", "1"], "unknown option --repeat"),
        (["--train.precision", "fp64"], "train.precision = 'fp64': must be one of"),
        (["loader", "--out", "file"], "file: File exists"),
        (["views", "--data", "x.beton"], "--data x.beton: only the part loader reads images"),
        (["plan"], "the following arguments are required: --gpus, --cores-per-gpu, --storage-mb-per-s"),
        (["plan", "--data", "x"], "bench plan measures nothing and takes no --data"),
        (["plan", "--gpus", "8", "--cores-per-gpu", "1", "--storage-mb-per-s", "1"], "must be 2 or more"),
        (
            ["plan", "none.json", "--gpus", "8", "--cores-per-gpu", "4", "--storage-mb-per-s", "1"],
            "none.json: No such file or directory",
        ),
        pytest.param(["kernels"], "bench kernels: there is no CUDA device here", marks=NO_GPU),
        pytest.param(
            ["--train.device", "cuda"], "train.device = 'cuda': there is no CUDA device", marks=NO_GPU
        ),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    words: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    try:
        code = main(["bench", *words])
    except SystemExit as error:  # argparse's way out
        code = int(error.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("fast-essl: error: ")
    assert err.count("\n") == 1
    assert told in err


def test_too_few_samples_for_the_batch(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = tiny_config.parent / "train.beton"
    words = ["bench", "step", "loader", str(tiny_config), "--data", str(data), "--batch-size", "64"]
    assert main([*words, "--out", str(tmp_path), "--quick", "--train.device", "cpu"]) == 2
    assert "--batch-size 64: there are only 34 samples" in capsys.readouterr().err


def test_words_in_any_order() -> None:
    assert split_words([]) == (None, None)
    assert split_words(["all", "loader"]) == (None, None)
    assert split_words(["step", "e_simclr_cifar10", "loader"]) == (
        ("loader", "step"),
        Path("e_simclr_cifar10"),
    )
    with pytest.raises(ConfigError, match="neither a file nor a recipe"):
        split_words(["vews"])


def test_both_helps_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["bench", "plan", "--help"])
    assert ended.value.code == 0
    assert "--storage-mb-per-s" in capsys.readouterr().out
