"""Speed-runs on a tiny network: what ends a run, what the clock says, the record, and what is refused beforehand."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fast_essl.source as source_module
from fast_essl import run_folder, speedrun
from fast_essl.checkpoint import load_file
from fast_essl.cli import main
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import load_config
from fast_essl.leaderboard import LEADERBOARD, write_leaderboard
from fast_essl.pretrain import pretrain
from fast_essl.speedrun import result_lines, run_speedrun, shortfall
from loaders.errors import DataError

STEPS_PER_EPOCH, NUM_STEPS = 4, 12


def _config(path: Path, overrides: str = "") -> Config:
    return load_config(path, ["--train.knn-every", "1", *overrides.split()])


def _run(config: Config, folder: Path) -> tuple[dict[str, Any], Path]:
    return run_speedrun(
        config, folder / "runs" / "tiny", folder / "records", say=lambda _: None, show_progress=False
    )


def _accuracies(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Have the evaluations, the initial weights' first, say these."""
    remaining = iter(values)
    monkeypatch.setattr(source_module.EvaluationSplits, "knn_top1", lambda self, backbone: next(remaining))


def test_a_run_ends_with_the_epoch_that_reaches_the_target(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _accuracies(monkeypatch, [0.3, 0.4, 0.7, 0.2, 0.9])
    config = _config(tiny_config, "--speedrun.target 0.6 --speedrun.runs 2 --train.seed 5")
    record, path = _run(config, tmp_path)
    first, second = record["runs"]
    assert [(run["seed"], run["step"], run["epoch"], run["knn_top1"]) for run in record["runs"]] == [
        (5, 8, 2, 0.7),
        (6, 4, 1, 0.9),
    ]
    assert first["reached"] and second["reached"] and first["initial_knn_top1"] == 0.3
    assert load_file(tmp_path / "runs/tiny/seed5" / run_folder.CHECKPOINT)["step"] == 8
    assert (tmp_path / "runs/tiny/seed5" / run_folder.BACKBONE).exists()

    evaluations = [line for line in first["metrics"] if line["type"] == "eval"]
    assert first["time_s"] == evaluations[-1]["elapsed_s"]
    assert first["evaluation_s"] == pytest.approx(sum(line["evaluation_s"] for line in evaluations), abs=2e-3)
    assert first["training_s"] == pytest.approx(first["time_s"] - first["evaluation_s"], abs=2e-3)
    assert first["preparation_s"] > 0 and first["num_starts"] == 1
    times = [run["time_s"] for run in record["runs"]]
    assert record["results"]["time_s"]["mean"] == pytest.approx(sum(times) / 2)
    assert record["results"]["time_s"]["stdev"] == pytest.approx(abs(times[0] - times[1]) / 2**0.5)
    assert record["results"]["num_reached"] == 2 and shortfall(record) is None

    assert json.loads(path.read_text()) == record
    assert path.name == f"{record['date'][:10]}-tiny.json"
    assert record["config"]["train"]["seed"] == 5 and record["goal"]["target"] == 0.6
    assert record["commit"] and record["versions"]["torch"] and record["num_cores"] and record["command"]
    assert any(
        "2 of 2" in line and "60.0" in line for line in (path.parent / LEADERBOARD).read_text().splitlines()
    )
    assert any("mean ± sample standard deviation, n = 2" in line for line in result_lines(record, path))


@pytest.mark.parametrize("options", ["", "--views.sizes 8 16 --views.size-epochs 2"])
def test_the_preparation_changes_no_weight(tiny_config: Path, tmp_path: Path, options: str) -> None:
    """Without a target, a run ends in the weights of `pretrain`, and its log has the same losses."""
    config = _config(tiny_config, f"--speedrun.runs 1 {options}")
    record, _ = _run(config, tmp_path)
    pretrain(config, tmp_path / "plain", show_progress=False)
    run_dir = tmp_path / "runs/tiny/seed0"
    ours, expected = (
        load_file(path / run_folder.CHECKPOINT)["method"] for path in (run_dir, tmp_path / "plain")
    )
    # The first run of a process may differ from later ones by rounding; a step more, or statistics, by a hundred times.
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.allclose(value.float(), expected[name].float(), rtol=1e-3, atol=1e-4), name
    lines = [json.loads(line) for line in (tmp_path / "plain" / run_folder.METRICS).read_text().splitlines()]
    assert [(line["type"], line["step"]) for line in record["runs"][0]["metrics"]] == [
        (line["type"], line["step"]) for line in lines
    ]
    losses, others = (
        [line["loss"] for line in log if line["type"] == "step"]
        for log in (record["runs"][0]["metrics"], lines)
    )
    assert losses == pytest.approx(others, rel=1e-4)
    assert record["runs"][0]["reached"] is None and record["results"]["num_reached"] is None
    assert record["results"]["time_s"]["n"] == 1


def test_a_target_that_is_missed_is_told_by_record_line_and_exit_code(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _accuracies(monkeypatch, [0.1, 0.3, 0.5, 0.4, 0.1, 0.95])
    monkeypatch.chdir(tmp_path)
    words = [
        "speedrun",
        str(tiny_config),
        "--train.knn-every",
        "1",
        "--speedrun.target",
        "0.9",
        "--runs",
        "2",
    ]
    assert main([*words, "--record-dir", "records"]) == 1
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert message.startswith(
        "fast-essl: 1 of 2 runs did not reach kNN 90.00%; their best was 50.00%; records/"
    )
    (path,) = (tmp_path / "records").glob("*-tiny.json")
    record = json.loads(path.read_text())
    missed, reached = record["runs"]
    assert (missed["reached"], missed["step"], missed["knn_top1"], missed["best_knn_top1"]) == (
        False,
        NUM_STEPS,
        0.4,
        0.5,
    )
    assert reached["reached"] and record["results"]["time_s"] is None
    assert "| 1 of 2 | not by all |" in (tmp_path / "records" / LEADERBOARD).read_text()
    # Given again, both are reused: a new training would ask for accuracies that are not there.
    assert main([*words, "--record-dir", "records"]) == 1


def test_a_budget_ends_a_run_in_mid_epoch_with_an_evaluation(tiny_config: Path, tmp_path: Path) -> None:
    config = _config(tiny_config, "--speedrun.budget-minutes 0.000001 --speedrun.runs 1")
    record, _ = _run(config, tmp_path)
    (run,) = record["runs"]
    assert (run["step"], run["epoch"]) == (1, 1) and 0 <= run["knn_top1"] <= 1
    assert run["time_s"] >= 60 * 0.000001 and record["goal"]["budget_minutes"] == 0.000001


def test_a_stopped_run_goes_on_with_its_clock(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_config, "--speedrun.runs 1")
    resolve = source_module.resolve_view_stage

    def interrupting(*args: Any) -> Any:
        make_views, num_calls = resolve(*args), 0

        def make_views_and_interrupt(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 7:  # one is the preparation's
                os.kill(os.getpid(), signal.SIGINT)
            return make_views(*args, **kwargs)

        return make_views_and_interrupt

    with monkeypatch.context() as patch:
        patch.setattr(source_module, "resolve_view_stage", interrupting)
        with pytest.raises(KeyboardInterrupt):
            _run(config, tmp_path)
    run_dir = tmp_path / "runs/tiny/seed0"
    state = load_file(run_dir / run_folder.CHECKPOINT)
    assert state["step"] == 6 and not list((tmp_path / "records").glob("*.json"))
    record, _ = _run(config, tmp_path)
    (run,) = record["runs"]
    assert run["num_starts"] == 2 and run["step"] == NUM_STEPS
    elapsed = [line["elapsed_s"] for line in run["metrics"]]
    assert elapsed == sorted(elapsed) and run["time_s"] > state["elapsed_s"]
    starts = json.loads((run_dir / speedrun.STARTS).read_text())["starts"]
    assert run["preparation_s"] == pytest.approx(sum(start["preparation_s"] for start in starts))

    before = (run_dir / run_folder.METRICS).read_bytes()
    again, _ = _run(config, tmp_path)
    assert again["runs"] == record["runs"] and (run_dir / run_folder.METRICS).read_bytes() == before
    with pytest.raises(ConfigError, match=r"model\.width = 8 there and 16 now"):
        _run(_config(tiny_config, "--speedrun.runs 1 --model.width 16"), tmp_path)


def test_a_lower_target_is_read_from_the_log_and_a_higher_one_goes_on(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--speedrun.runs 1 --speedrun.target"
    _accuracies(monkeypatch, [0.1, 0.5, 0.7])
    _run(_config(tiny_config, f"{options} 0.6"), tmp_path)
    record, _ = _run(_config(tiny_config, f"{options} 0.45"), tmp_path)
    assert record["runs"][0]["step"] == STEPS_PER_EPOCH and record["runs"][0]["knn_top1"] == 0.5
    _accuracies(monkeypatch, [0.1, 0.8])
    record, _ = _run(_config(tiny_config, f"{options} 0.75"), tmp_path)
    assert record["runs"][0]["step"] == NUM_STEPS and record["runs"][0]["num_starts"] == 2


def test_a_log_that_changed_since_the_run_s_end_is_no_result(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_config, "--speedrun.runs 1 --speedrun.target 0.45")
    _accuracies(monkeypatch, [0.1, 0.5])
    _run(config, tmp_path)
    log = tmp_path / "runs/tiny/seed0" / run_folder.METRICS
    log.write_text(log.read_text().replace('"knn_top1": 0.5', '"knn_top1": 0.9'))
    with pytest.raises(ConfigError, match=rf"{log}: not that of the run's end any more"):
        _run(config, tmp_path)


def test_a_log_that_is_ahead_of_the_checkpoint_is_no_result(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run that was killed between the evaluation that reached the target and its checkpoint."""
    config = _config(tiny_config, "--speedrun.runs 1 --speedrun.target 0.6")
    _accuracies(monkeypatch, [0.1, 0.5, 0.7])
    fsync, run_dir = os.fsync, tmp_path / "runs/tiny/seed0"

    def killed_at_the_last_checkpoint(descriptor: int) -> None:
        if (run_dir / run_folder.BACKBONE).exists():
            raise KeyboardInterrupt
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed_at_the_last_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            _run(config, tmp_path)
    before = load_file(run_dir / run_folder.CHECKPOINT)["step"]
    _accuracies(monkeypatch, [0.1, 0.5, 0.8])
    record, _ = _run(config, tmp_path)
    (run,) = record["runs"]
    assert run["step"] == load_file(run_dir / run_folder.CHECKPOINT)["step"] > before
    assert run["num_starts"] == 2


@pytest.mark.parametrize("name", [speedrun.STARTS, run_folder.ENVIRONMENT, run_folder.METRICS])
def test_a_damaged_file_of_a_run_is_one_line(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = _config(tiny_config, "--speedrun.runs 1 --speedrun.target 0.45")
    _accuracies(monkeypatch, [0.1, 0.5])
    _run(config, tmp_path)
    path = tmp_path / "runs/tiny/seed0" / name
    path.write_text(path.read_text()[:20])
    with pytest.raises((DataError, ConfigError), match=f"{path}: ") as error:
        _run(config, tmp_path)
    assert "\n" not in str(error.value)


def test_missing_data_are_converted_and_timed_apart(tiny_config: Path, tmp_path: Path) -> None:
    paths = f"--data.train {tmp_path}/data/train.beton --data.test {tmp_path}/data/test.beton"
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        (source / split).symlink_to(tiny_config.parent / split)
    config = _config(tiny_config, f"{paths} --speedrun.source {source} --speedrun.runs 1 --train.max-steps 1")
    record, _ = _run(config, tmp_path)
    assert record["conversion_s"] > 0 and record["data"] == "train"
    record, _ = _run(config, tmp_path)
    assert record["conversion_s"] is None


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--speedrun.target 1.01", "speedrun.target = 1.01: must be a share from 0 to 1"),
        ("--runs 0", "speedrun.runs = 0: must be 1 or more"),
        ("--runs many", "speedrun.runs = 'many': must be a whole number"),
        ("--speedrun.budget-minutes -1", "speedrun.budget_minutes = -1.0: must be 0 or more"),
        ("--speedrun.goal 0.5", "unknown option --speedrun.goal 0.5; the nearest valid name is --speedrun."),
        ("--speedrun.target 0.5 --train.knn-every 0", "train.knn_every = 0: a target needs evaluations"),
        ("--record-dir taken", "taken: the record cannot be written (File exists)"),
        ("--record-dir taken/below", "the record cannot be written (Not a directory)"),
        ("--record-dir full", "full/LEADERBOARD.md: the record cannot be written (Is a directory)"),
        ("--record-dir damaged", "damaged/some.json: damaged, or not JSON"),
        ("--data.test nowhere.beton", "nowhere.beton: no such file"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    wanted: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    Path("full", LEADERBOARD).mkdir(parents=True)
    Path("damaged").mkdir()
    Path("damaged", "some.json").write_text("{")
    words = options.split()
    records = [] if "--record-dir" in words else ["--record-dir", "records"]
    assert main(["speedrun", str(tiny_config), *records, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fast-essl: error: ") and error.count("\n") == 1 and wanted in error
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_line(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--record-dir", str(tmp_path), "--train.device", "cuda"]
    assert main(["speedrun", str(tiny_config), *words]) == 2
    assert "train.device = 'cuda': there is no CUDA device here" in capsys.readouterr().err


def test_several_ranks_and_foreign_folders_are_refused(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tiny_config, "--speedrun.runs 1 --train.max-steps 1")
    pretrain(config, tmp_path / "runs/tiny/seed0", show_progress=False)
    with pytest.raises(ConfigError, match="not begun by a speed-run; choose another --out"):
        _run(config, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a speed-run is one process"):
        _run(config, tmp_path)


def test_outside_of_a_checkout_the_record_needs_a_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert speedrun.default_record_dir().parts[-2:] == ("benchmarks", "records")
    monkeypatch.setattr(speedrun, "__file__", str(tmp_path / "fast_essl" / "speedrun.py"))
    with pytest.raises(ConfigError, match="--record-dir DIR says where"):
        speedrun.default_record_dir()


def _record(data: str, target: float, time_s: float | None, accuracy: float = 0.5) -> dict[str, Any]:
    def spread(value: float) -> dict[str, Any]:
        return {"n": 2, "mean": value, "stdev": 0.01, "values": [value, value]}

    return {
        "kind": "speedrun",
        "data": data,
        "device": "cpu",
        "cpu": "CPU",
        "num_cores": 2,
        "gpus": [],
        "commit": "0123456789abcdef-dirty",
        "goal": {"target": target},
        "results": {
            "num_runs": 2,
            "num_reached": 2 if target else None,
            "knn_top1": spread(accuracy),
            "time_s": spread(time_s) if time_s else None,
            "evaluation_s": spread(1.0) if time_s else None,
        },
    }


def test_the_leaderboard_is_sorted_and_holds_speed_runs_alone(tmp_path: Path) -> None:
    records = {
        "1-slow": _record("digits", 0.5, 90.0),
        "2-quick": _record("digits", 0.5, 30.0),
        "3-missed": _record("digits", 0.5, None),
        "4-higher": _record("digits", 0.6, 200.0),
        "5-budget": _record("digits", 0, 60.0, 0.41),
        "6-better": _record("digits", 0, 60.0, 0.42),
        "7-other": _record("cifar", 0.9, 10.0),
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "views.json").write_text(json.dumps({"results": {}}))
    rows = write_leaderboard(tmp_path).read_text().splitlines()
    rows = [row for row in rows if row.startswith("| ") and not row.startswith("| data")]
    order = [row.rsplit("[", 1)[1].partition("]")[0] for row in rows]
    assert order == ["7-other", "4-higher", "2-quick", "1-slow", "3-missed", "6-better", "5-budget"]
    assert rows[2].startswith(
        "| digits | 50.0 | 2 of 2 | 30.0 ± 0.0 | 1.0 ± 0.0 | 50.00 ± 1.00 | CPU, 2 cores |"
    )
    assert "| 0123456789-dirty | [2-quick](2-quick.json) |" in rows[2]
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json: damaged, or not JSON"):
        write_leaderboard(tmp_path)


def test_runs_of_other_settings_are_not_mixed_into_a_record(tiny_config: Path, tmp_path: Path) -> None:
    """What a checkpoint may be continued with need not be what its time was measured with."""
    options = "--train.epochs 1 --optimizer.warmup-epochs 0 --train.knn-every 1"
    out, records = tmp_path / "out", tmp_path / "records"
    run_speedrun(load_config(tiny_config, options.split()), out, records, show_progress=False)
    other = load_config(tiny_config, [*options.split(), "--train.num-threads", "2", "--speedrun.runs", "2"])
    with pytest.raises(ConfigError, match=r"train\.num_threads = 1 there and 2 now"):
        run_speedrun(other, out, records, show_progress=False)


def test_half_a_record_is_named_before_the_training(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"kind": "speedrun"}')
    with pytest.raises(DataError, match=r"old\.json: not a whole record"):
        run_speedrun(load_config(tiny_config), tmp_path / "out", tmp_path, show_progress=False)
    assert not (tmp_path / "out").exists()
