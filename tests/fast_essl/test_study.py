"""Studies: which configurations a file asks for, what is reused, what the table says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.evaluate_run import evaluate_run
from fast_essl.pretrain import pretrain
from fast_essl.study import load_study, run_study, study_cells, table

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
title = "Two transformations"
rows = ["horizontal_flip", "jigsaw"]
seeds = [0, 1]

[columns.insensitive]
config = "{config}"
method = {{ equivariance_weight = 0.0 }}
transformation = {{ invariance = "{{row}}" }}

[columns.sensitive]
config = "{config}"
transformation = {{ equivariance = "{{row}}" }}

[baseline]
config = "{config}"
method = {{ equivariance_weight = 0.0 }}

[common.train]
epochs = 1
max_steps = 1
knn_every = 0
"""


@pytest.fixture
def study(tmp_path, tiny_config):
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(config=tiny_config))
    return path


def test_cells_are_the_rows_in_the_columns(study):
    cells = study_cells(load_study(study), source="study", overrides=["--train.batch-size", "4"])
    assert [(cell.row, cell.column) for cell in cells] == [
        ("baseline", "insensitive"),
        ("horizontal_flip", "insensitive"),
        ("horizontal_flip", "sensitive"),
        ("jigsaw", "insensitive"),
        ("jigsaw", "sensitive"),
    ]
    baseline, insensitive, sensitive = (cell.configs[1] for cell in cells[:3])
    assert all(
        c.train.seed == 1 and c.train.batch_size == 4 and c.train.epochs == 1 for c in (baseline, sensitive)
    )
    assert baseline.method.equivariance_weight == 0 and baseline.transformation.invariance == "none"
    assert insensitive.transformation.invariance == "horizontal_flip"
    assert insensitive.method.equivariance_weight == 0
    assert (
        sensitive.transformation.equivariance == "horizontal_flip"
        and sensitive.method.equivariance_weight == 0.4
    )


def test_a_study_runs_once_and_prints_what_its_runs_reached(study, tmp_path):
    said = []
    result = run_study(study, tmp_path / "out", say=said.append, show_progress=False)
    assert json.loads((tmp_path / "out" / "study.json").read_text()) == json.loads(json.dumps(result))
    assert [cell["row"] for cell in result["cells"]] == [
        "random backbone",
        "baseline",
        *["horizontal_flip"] * 2,
        *["jigsaw"] * 2,
    ]
    for cell in result["cells"][1:]:
        found = [
            json.loads((Path(run) / "evaluation.json").read_text())["accuracy"]["knn_top1"]
            for run in cell["runs"]
        ]
        assert cell["knn_top1"]["values"] == found and len(found) == 2
    lines = said[-1].splitlines()
    assert lines[1].startswith("Two transformations; n = 2 seeds")
    values = result["cells"][2]["knn_top1"]
    (row,) = [line for line in lines if line.startswith("horizontal_flip")][:1]
    assert f"{values['mean']:.1%} ± {100 * values['stdev']:.1f}" in row
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("last.pt")}
    assert len(times) == 10
    assert run_study(study, tmp_path / "out", say=said.append, show_progress=False) == result
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A study of one run of one step, and what it reached."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.toml").write_text(
        f'title = "One"\nrows = ["jigsaw"]\n[columns.sensitive]\nconfig = "{tiny_config}"\n'
        'transformation = { equivariance = "{row}" }\n[common.train]\nmax_steps = 1\nknn_every = 0\n'
    )
    return folder, run_study(folder / "study.toml", folder / "out", show_progress=False)


@pytest.fixture
def study_of_one(finished, tmp_path):
    folder, result = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, [cell["knn_top1"]["values"] for cell in result["cells"]]


def values_again(folder, *overrides):
    result = run_study(folder / "study.toml", folder / "out", overrides=list(overrides), show_progress=False)
    return [cell["knn_top1"]["values"] for cell in result["cells"]]


def boast(text):
    """A result with an accuracy that nobody measured."""
    result = json.loads(text)
    result["accuracy"]["knn_top1"] = 0.99
    return json.dumps(result)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1]",
        boast,
        lambda text: '{"step": 1, "accuracy": {"knn_top1": 0.99, "probe_top1": 0.99}}',
    ],
)
def test_an_evaluation_that_nobody_measured_is_measured_again(study_of_one, change):
    folder, values = study_of_one
    run_dir = folder / "out" / "jigsaw-sensitive" / "seed0"
    for name in ("evaluation.json", "evaluation-random.json"):
        (run_dir / name).write_text(change((run_dir / name).read_text()))
    assert values_again(folder) == values
    assert values_again(folder) == values


def test_an_evaluation_of_another_step_or_other_images_is_not_reused(study_of_one, tiny_config):
    """As of a study that was extended and killed between the last checkpoint and its evaluation."""
    folder, _ = study_of_one
    run_dir = folder / "out" / "jigsaw-sensitive" / "seed0"
    evaluation = run_dir / "evaluation.json"
    config = load_config(run_dir / "config.toml", ["--train.max-steps", "3"])
    pretrain(config, run_dir, show_progress=False)
    assert json.loads(evaluation.read_text())["step"] == 1
    values_again(folder, "--train.max-steps", "3")
    of_last_step = json.loads(evaluation.read_text())
    assert of_last_step["step"] == 3
    evaluate_run(run_dir, overrides=["--data.test", str(tiny_config.parent / "train.beton")])
    assert json.loads(evaluation.read_text())["num_test"] == 34
    values_again(folder, "--train.max-steps", "3")
    assert json.loads(evaluation.read_text()) == of_last_step


def test_an_evaluation_that_is_there_is_not_made_again(study_of_one, monkeypatch):
    folder, values = study_of_one
    monkeypatch.setattr("fast_essl.evaluate_run.evaluate_backbone", None)
    assert values_again(folder) == values


def test_the_table_leaves_out_what_was_not_run():
    spread = {"n": 1, "mean": 0.5, "stdev": 0.0, "values": [0.5]}
    cells = [
        {"row": "a", "column": "x", "knn_top1": spread, "probe_top1": spread},
        {"row": "b", "column": "y", "knn_top1": {**spread, "mean": 0.25}, "probe_top1": spread},
    ]
    text = table({"title": "T", "seeds": [0], "cells": cells})
    assert text.splitlines()[:5] == [
        "T; n = 1 seed, %",
        "",
        f"{'kNN':<3}" + f"{'x':>16}{'y':>16}",
        f"{'a':<3}" + f"{'50.0%':>16}{'':>16}",
        f"{'b':<3}" + f"{'':>16}{'25.0%':>16}",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace("title", "name"), r"unknown: \['name'\], missing: \['title'\]"),
        (lambda s: s.replace("seeds = [0, 1]", "seeds = 2"), "seeds = 2 is not of its form"),
        (lambda s: s.replace('rows = ["horizontal_flip", "jigsaw"]', "rows = []"), "rows"),
        (lambda s: s.replace("epochs = 1", "epoch = 1"), "unknown key train.epoch = 1.*train.epochs"),
        (lambda s: s.replace("title =", "title"), "not a TOML file"),
        (
            lambda s: s.replace('"jigsaw"', '"jig"'),
            "jig, insensitive: transformation.invariance: .*'jig' is unknown",
        ),
        (
            lambda s: s.replace('"jigsaw"]', '"horizontal-flip"]').replace(
                '"horizontal_flip"', '"horizontal flip"'
            ),
            "share a folder",
        ),
        (lambda s: s.replace("[baseline]\nconfig", "[baseline]\nrecipe"), "baseline"),
    ],
)
def test_a_wrong_study_is_one_line_before_anything_runs(study, tmp_path, change, message):
    study.write_text(change(study.read_text()))
    with pytest.raises(ConfigError, match=message) as error:
        run_study(study, tmp_path / "out", show_progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_paper_s_studies_name_what_there_is():
    for path in sorted((ROOT / "configs").glob("study_*.toml")):
        cells = study_cells(load_study(path), source=path.name)
        assert len(cells) >= 6
    transformations = load_study(ROOT / "configs" / "study_transformations_cifar10.toml")
    config = study_cells(transformations, source="")[2].configs[0]
    for view in (config.views.view1, config.views.transformed):
        assert view.flip_p == view.jitter_p == view.grey_p == 0 and view.scale == (0.2, 1.0)
