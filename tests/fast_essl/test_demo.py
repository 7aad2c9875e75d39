"""The demo on a small scale: everything once, then everything reused, then a damaged file made anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from fast_essl import run_folder
from fast_essl.config_io import config_to_table, find_config, load_config
from fast_essl.demo import DemoOptions, run_demo

pytest.importorskip("sklearn")

SMALL = (
    *("--train.epochs", "1", "--train.max_steps", "3", "--train.batch_size", "64", "--train.log_every", "1"),
    *(
        "--optimizer.warmup_epochs",
        "0",
        "--train.knn_every",
        "0",
        "--data.loader",
        "torch",
        "--data.num_workers",
        "1",
    ),
    *("--model.backbone", "resnet10", "--model.width", "8", "--views.eval_size", "8"),
    # Layers of this size are too small to be shared between threads.
    *("--train.num_threads", "1"),
)


def test_both_recipes_differ_in_lambda_alone() -> None:
    tables = []
    for name in ("simclr", "e_simclr"):
        table = config_to_table(load_config(find_config(Path(f"{name}_photo_digits"))))
        tables.append((table["method"].pop("equivariance_weight"), table))
    (plain_weight, plain), (weight, equivariant) = tables
    assert (plain_weight, weight) == (0.0, 0.4)
    assert plain == equivariant


@pytest.mark.slow
def test_demo_runs_and_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = DemoOptions(out=Path("runs/small"), overrides=SMALL, show_progress=False)
    first = run_demo(options)
    printed = capsys.readouterr().out
    table = printed[printed.index("kNN  linear probe") :]
    for name in ("random backbone", "SimCLR", "E-SimCLR"):
        assert f"\n{name}" in table
    assert first["report"] == "runs/small/report.html"
    assert Path(first["report"]).read_text().count("<svg") >= 3
    for name in ("random", "simclr", "e_simclr"):
        assert 0 <= first["results"][name]["knn_top1"] <= 1
    assert {"samples_per_s", "minutes", "probe_top1"} <= set(first["results"]["e_simclr"])

    weights = (tmp_path / "runs/small/e_simclr/last.pt").read_bytes()
    manifest = Path("data/photo-digits-test.beton.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "num_samples": 3}))
    second = run_demo(options)
    printed = capsys.readouterr().out
    assert printed.count("finished already, reused") == 2
    assert "data/photo-digits-train.beton, 4000 images, there already" in printed
    assert "test: made anew, since data/photo-digits-test.beton" in printed
    assert second["results"] == first["results"]
    assert (tmp_path / "runs/small/e_simclr/last.pt").read_bytes() == weights


def test_a_signal_ends_the_demo_with_a_checkpoint(
    photo_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photo_digits, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    write = run_folder.MetricsFile.write

    def write_and_stop(self: run_folder.MetricsFile, **values: object) -> None:
        write(self, **values)
        if values["step"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(run_folder.MetricsFile, "write", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoOptions(out=Path("small"), overrides=SMALL, show_progress=False), say=said.append)
    assert said[-1] == "small/simclr: stopped at step 2 of 3; the same command continues"
    assert Path("small/simclr/last.pt").exists()
