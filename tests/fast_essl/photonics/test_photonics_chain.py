"""From cells to the study's table: networks, exact resumption, fine-tuning, the smoke preset, the command's errors."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fast_essl import run_folder
from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import config_to_toml, load_settings
from fast_essl.photonics.config import PRESETS, ROWS, PhotonicsConfig, load_preset, of_row
from fast_essl.photonics.dos import EMPTY_LATTICE
from fast_essl.photonics.finetune import finetune, finetune_run, load_network, predict
from fast_essl.photonics.generate import generate
from fast_essl.photonics.model import build_cell_method, build_cell_net, build_dos_net
from fast_essl.photonics.pretrain import pretrain_cells
from fast_essl.photonics.store import read_cells
from fast_essl.photonics.study import run_study, table
from loaders.errors import DataError


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> PhotonicsConfig:
    """The smoke preset, on cells of its own."""
    path = tmp_path_factory.mktemp("cells") / "cells.h5"
    config = load_preset(Path("smoke"), ["--data.file", str(path), "--study.workers", "1"])
    generate(
        path,
        cells=config.cells,
        solver=config.solver,
        counts=config.counts,
        device=torch.device("cpu"),
        num_threads=2,
        show_progress=False,
    )
    return config


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / run_folder.CHECKPOINT, weights_only=True)["method"]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_presets_load_build_every_row_and_can_be_saved(path, tmp_path):
    config = load_preset(Path(path.stem))
    (tmp_path / "saved.toml").write_text(config_to_toml(config))
    assert load_settings(PhotonicsConfig, tmp_path / "saved.toml") == config
    methods = {row: build_cell_method(of_row(config, row, 1)) for row in ROWS if row != "none"}
    assert {row: method.head is not None for row, method in methods.items()} == {
        "simclr": False,
        "simclr_poor": False,
        "e_simclr": True,
    }
    # For the same seed all rows start from the same backbone.
    start = build_cell_net(config.model, 1).state_dict()
    assert all(equal(method.backbone.state_dict(), start) for method in methods.values())
    poor = of_row(config, "simclr_poor", 1).transformation
    assert poor.invariance == config.transformation.equivariance == "cyclic_translations"
    assert max(config.study.num_labels) <= config.counts.train


def test_the_paper_preset_has_the_paper_s_network():
    """The official release's encoder, by the sizes of its layers, and the number of its parameters."""
    config = load_preset(Path("paper"))
    net = build_cell_net(config.model, 0)
    shapes = [tuple(p.shape) for p in net.parameters() if p.ndim > 1]
    assert shapes == [(64, 1, 7, 7), (256, 64, 7, 7), (256, 256, 7, 7), (1024, 256), (1024, 1024)]
    dos = build_dos_net(net, config.model, 0)
    assert [p.shape[0] for p in dos.predictor.parameters() if p.ndim > 1] == [1024, 1024, 512, 400]
    assert dos(torch.zeros(2, 1, 32, 32)).shape == (2, 400)
    assert (config.method.temperature, config.method.equivariance_weight) == (0.1, 5.0)
    assert (config.finetune.epochs, config.finetune.learning_rate, config.finetune.num_labels) == (
        100,
        1e-4,
        3000,
    )


def test_a_resumed_run_ends_in_the_same_weights_and_is_continued_on_the_same_data_alone(smoke, tmp_path):
    config = dataclasses.replace(smoke, train=dataclasses.replace(smoke.train, checkpoint_every=2))
    pretrain_cells(config, tmp_path / "whole", show_progress=False)
    for last_step in (2, 5, 0):  # 3 steps an epoch
        train = dataclasses.replace(config.train, max_steps=last_step)
        pretrain_cells(dataclasses.replace(config, train=train), tmp_path / "parts", show_progress=False)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    last = json.loads((tmp_path / "whole" / run_folder.METRICS).read_text().splitlines()[-1])
    assert last["step"] == 6 and np.isfinite(last["equivariance_loss"])

    study = dataclasses.replace(config.study, seeds=(5,))
    other = dataclasses.replace(config, study=study)  # what does not concern the run may change
    assert pretrain_cells(other, tmp_path / "parts", show_progress=False).status == "already finished"
    with pytest.raises(ConfigError, match=r"method\.equivariance_weight"):
        pretrain_cells(of_row(config, "simclr", 0), tmp_path / "parts", show_progress=False)
    path = tmp_path / "other.h5"
    generate(
        path,
        cells=dataclasses.replace(config.cells, seed=9),
        solver=config.solver,
        counts=config.counts,
        device=torch.device("cpu"),
        num_threads=2,
        show_progress=False,
    )
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, file=path))
    with pytest.raises(DataError, match=r"a run on other images than .*other\.h5"):
        pretrain_cells(moved, tmp_path / "parts", show_progress=False)


def test_finetuning_starts_from_the_run_s_backbone_and_learns(smoke, tmp_path):
    pretrain_cells(smoke, tmp_path, show_progress=False)
    few = ["--finetune.num-labels", "16", "--finetune.epochs", "1"]
    first = finetune_run(tmp_path, overrides=few, show_progress=False)
    assert first == finetune_run(tmp_path, overrides=few, show_progress=False)
    assert json.loads((tmp_path / "finetune-16.json").read_text()) == first
    assert (first["step"], first["num_steps"], first["num_test"]) == (6, 1, 32)
    long = finetune_run(
        tmp_path,
        overrides=[
            "--finetune.num-labels",
            "16",
            "--finetune.min-steps",
            "60",
            "--finetune.schedule",
            "cosine",
        ],
        show_progress=False,
    )
    assert long["num_steps"] == 60 and long["train_loss"] < 0.7 * first["train_loss"]
    assert long["test_error"] < 0.2
    scratch = finetune(smoke, tmp_path / "scratch", pretrained=False, show_progress=False)
    assert scratch["step"] == 0 and scratch["num_steps"] == 12

    # The error is that of the network which was left behind.
    network = load_network(smoke, tmp_path, 16)
    test = read_cells(smoke.data.file).splits["test"]
    predicted = predict(network, test.permittivity, torch.device("cpu"))
    difference = np.abs(predicted.numpy() - test.dos[:, :400])[:, 100:].sum(1)
    assert (difference / test.dos[:, 100:400].sum(1)).mean() == pytest.approx(long["test_error"], rel=1e-5)


def test_an_untrained_network_without_its_last_layer_predicts_the_empty_lattice(smoke):
    network = build_dos_net(build_cell_net(smoke.model, 0), smoke.model, 0)
    for parameter in network.predictor[-1].parameters():
        parameter.data.zero_()
    cells = read_cells(smoke.data.file).splits["test"].permittivity
    predicted = predict(network, cells, torch.device("cpu"))
    assert np.allclose(predicted, np.broadcast_to(EMPTY_LATTICE[:400], predicted.shape))


def test_the_study_runs_the_whole_chain_and_takes_what_is_there(smoke, tmp_path, monkeypatch, capsys):
    """`fast-essl photonics study --preset smoke`, several runs at a time."""
    monkeypatch.chdir(tmp_path)
    overrides = ["--data.file", str(smoke.data.file), "--study.workers", "2"]
    assert main(["photonics", "study", "--preset", "smoke", "--out", "out", *overrides]) == 0
    shown = capsys.readouterr().out
    for name in ROWS.values():
        assert re.search(rf"^{re.escape(name)} +\d+\.\d\d ± \d+\.\d\d", shown, re.MULTILINE), name
    result = json.loads(Path("out/study.json").read_text())
    assert [(cell["row"], cell["num_labels"]) for cell in result["cells"]] == [
        (r, n) for r in ROWS for n in (16, 64)
    ]
    for cell in result["cells"]:
        single = [
            json.loads(Path(f"out/{cell['row']}/seed{seed}/finetune-{cell['num_labels']}.json").read_text())[
                "test_error"
            ]
            for seed in (0, 1)
        ]
        assert cell["test_error"]["values"] == single and single[0] != single[1]
        assert cell["test_error"]["mean"] == pytest.approx(np.mean(single))
    for page in ("cells", "study"):
        text = Path(f"out/{page}.html").read_text()
        assert text.count("data:image/png;base64,") == {"cells": 12, "study": 6}[page]
        assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|nan""", text)
    files = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.pt")}
    again = run_study(
        dataclasses.replace(smoke, study=load_preset(Path("smoke")).study), Path("out"), show_progress=False
    )
    assert again == result and table(result) in shown
    assert files == {path: path.stat().st_mtime_ns for path in files}
    # What was changed or cut is measured again.
    changed, cut = (Path(f"out/{row}/seed0/finetune-16.json") for row in ("none", "simclr"))
    changed.write_text(json.dumps({**json.loads(changed.read_text()), "test_error": 0.0}))
    cut.write_text(cut.read_text()[:30])
    again = run_study(
        dataclasses.replace(smoke, study=load_preset(Path("smoke")).study), Path("out"), show_progress=False
    )
    for cell, before in zip(again["cells"], result["cells"], strict=True):
        assert cell["test_error"]["values"] == pytest.approx(before["test_error"]["values"], rel=1e-2)


def test_a_study_that_is_stopped_stops_its_runs_with_a_checkpoint(smoke, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "fast_essl", "photonics", "study", "--preset", "smoke"]
    command += [
        "--data.file",
        str(smoke.data.file),
        "--out",
        "out",
        "--study.workers",
        "2",
        "--study.seeds",
        "0",
    ]
    study = subprocess.Popen([*command, "--train.epochs", "100000"], cwd=tmp_path)
    metrics = tmp_path / "out" / "simclr" / "seed0" / run_folder.METRICS
    for _ in range(1200):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    study.terminate()
    assert study.wait(60) == 128 + signal.SIGTERM
    with open(metrics.parent / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given only once no process trains there
    assert torch.load(metrics.parent / run_folder.CHECKPOINT, weights_only=True)["step"] > 0


def test_generate_pretrain_and_finetune_are_commands(smoke, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    counts = [
        "--counts.pretrain",
        "64",
        "--counts.train",
        "16",
        "--counts.validation",
        "2",
        "--counts.test",
        "2",
    ]
    assert main(["photonics", "generate", "--preset", "smoke", "--cells.kind", "gpm", *counts]) == 0
    assert Path("data/photonics_smoke.html").read_text().count("data:image/png") == 2
    gpm = ["--transformation.equivariance", "four_fold_rotation", "--augmentation.rotations", "false"]
    gpm += ["--augmentation.translations", "true"]
    assert main(["photonics", "pretrain", "--preset", "smoke", "--run-dir", "run", *gpm]) == 0
    assert main(["photonics", "finetune", "run", "--finetune.num-labels", "16"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["num_test"] == 2 and np.isfinite(result["test_error"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "generate --cells.permittivity 0.5 20",
            r"cells.permittivity = \(0.5, 20.0\): must be two numbers, 1 <= low",
        ),
        ("generate --solver.k-mesh 7", "solver.k_mesh = 7: must be even and 4 or more"),
        ("generate --counts.test -1", "counts.test = -1: must be 0 or more"),
        ("generate --cells.colour 3", "unknown option --cells.colour 3; the nearest valid name is --cells"),
        (
            "study --preset big",
            "big: neither a file nor a preset of photonics; the presets are cpu, paper, smoke",
        ),
        ("study --study.seeds 0 0", "study.seeds = .*: must be different numbers"),
        ("study --method.equivariance-weight 0", "must be above 0 for the study's row E-SimCLR"),
        (
            "pretrain --method.name simsiam",
            "method.name = 'simsiam': must be 'simclr'; it has no use for cells",
        ),
        ("pretrain --train.knn-every 2", "train.knn_every = 2: must be 0"),
        ("pretrain --train.init-from a.pt", "train.init_from = 'a.pt': must be ''"),
        ("pretrain --transformation.equivariance grayscale", "changes permittivities; choose one that moves"),
        (
            "pretrain --data.file none.h5",
            "none.h5: no such file; make it with `fast-essl photonics generate`",
        ),
        ("finetune nowhere", "nowhere/config.toml: No such file"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    action, *rest = words.split()
    preset = [] if action == "finetune" or "--preset" in rest else ["--preset", "smoke"]
    assert (
        main(
            ["photonics", action, *rest[:1] * (action == "finetune"), *preset, *rest[action == "finetune" :]]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_is_refused_before_any_step(smoke, tmp_path, monkeypatch):
    path = tmp_path / "unlabelled.h5"
    config = dataclasses.replace(
        smoke,
        counts=dataclasses.replace(smoke.counts, train=0),
        data=dataclasses.replace(smoke.data, file=path),
    )
    with pytest.raises(
        DataError, match=r"unlabelled\.h5: no labelled cells in train; generate the file anew"
    ):
        run_study(config, tmp_path / "out", show_progress=False)
    with pytest.raises(DataError, match="no labelled cells in train"):
        finetune(config, tmp_path / "run", pretrained=False, show_progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2: cells are trained on by one rank"):
        pretrain_cells(smoke, tmp_path / "run", show_progress=False)
    more = dataclasses.replace(smoke, finetune=dataclasses.replace(smoke.finetune, num_labels=65))
    with pytest.raises(ConfigError, match=r"finetune.num_labels = 65: must be at most the 64 labelled cells"):
        finetune(more, tmp_path / "run", pretrained=False, show_progress=False)
    with pytest.raises(ConfigError, match=r"has no backbone.pt; finish its pretraining first"):
        finetune(smoke, tmp_path / "run", pretrained=True, show_progress=False)
    with pytest.raises(ValueError, match="num_labels = 0: must be 1 or more: without labelled cells"):
        dataclasses.replace(smoke.finetune, num_labels=0)
