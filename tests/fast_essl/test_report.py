"""The report: whole, self-contained, and showing the views that the run saw."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fast_essl.charts import Level, Series, line_chart, nice_ticks
from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import config_to_toml, load_config
from fast_essl.evaluate_run import evaluate_run
from fast_essl.pretrain import pretrain
from fast_essl.report import read_runs, sample_views, write_report

VOID = {"meta", "img", "line", "circle", "polyline"}


class Balanced(HTMLParser):
    """Counts the tags of a page and fails where one is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def make_run(folder: Path, tiny_config: Path, *, weight: float, knn: float | None = 0.5) -> Path:
    """A run's folder with two logged steps, written by hand."""
    folder.mkdir(parents=True)
    config = load_config(tiny_config, ["--method.equivariance_weight", str(weight)])
    (folder / "config.toml").write_text(config_to_toml(config))
    (folder / "environment.json").write_text(
        json.dumps({"cpu": "<a & b>", "num_cores": 2, "date": "2026-01-02"})
    )
    lines = []
    for step in (1, 2):
        line = {"type": "step", "epoch": 0, "step": step, "loss": 2.0 / step, "ssl_loss": 1.5 / step}
        line |= {
            "equivariance_loss": 1.3 if weight else None,
            "equivariance_accuracy": 0.3 if weight else None,
        }
        line |= {
            "learning_rate": 0.1,
            "samples_per_s": 100.0 * step,
            "data_wait_share": 0.2,
            "elapsed_s": 60.0 * step,
        }
        lines.append(line)
    lines.append({"type": "eval", "epoch": 0, "step": 2, "knn_top1": 0.4, "elapsed_s": 180.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if knn is not None:
        (folder / "evaluation.json").write_text(
            json.dumps({"accuracy": {"knn_top1": knn, "probe_top1": 0.6}})
        )
    return folder


def test_two_runs_and_the_random_backbone(tmp_path: Path, tiny_config: Path) -> None:
    runs = [
        make_run(tmp_path / name, tiny_config, weight=weight) for name, weight in (("a", 0.0), ("b", 0.4))
    ]
    destination = tmp_path / "page.html"
    assert (
        write_report(runs, destination, random_accuracy={"knn_top1": 0.25, "probe_top1": 0.3}) == destination
    )
    page = destination.read_text()
    tags = Balanced(page)
    assert tags.open == []
    assert tags.seen.count("svg") == 4, "kNN, equivariance accuracy, SSL loss, equivariance loss"
    assert tags.seen.count("img") == 6 * (3 + 4), "image, two views, four rotations"
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[a-z/.]""", page), (
        "asks for something outside"
    )
    assert "25.0 points above the random backbone (25.0%)" in page
    assert "&lt;a &amp; b&gt;" in page
    assert "+equivariance_weight = 0.4" in page
    assert list(tmp_path.glob(".*")) == [], "a temporary file stayed"


def test_one_run_without_an_evaluation_or_its_data(tmp_path: Path, tiny_config: Path) -> None:
    run = make_run(tmp_path / "a", tiny_config, weight=0.0, knn=None)
    config = run / "config.toml"
    config.write_text(re.sub(r'train = ".*"', 'train = "gone.beton"', config.read_text(), count=1))
    page = write_report(run).read_text()
    assert "gone.beton is not on this machine" in page
    assert "not evaluated yet" in page
    assert Balanced(page).seen.count("svg") == 2, "kNN and SSL loss"


def test_command(tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", tiny_config, weight=0.4)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "config.toml is missing" in capsys.readouterr().err


def test_figures_of_a_run(tmp_path: Path, tiny_config: Path) -> None:
    run = make_run(tmp_path / "a", tiny_config, weight=0.4)
    (record,) = read_runs([run])
    assert (record.label, record.samples_per_s(), record.minutes()) == ("E-SimCLR", 150.0, 3.0)
    assert record.curve("ssl_loss") == ([1, 2], [1.5, 0.75])
    assert record.curve("knn_top1") == ([2], [0.4])
    other = make_run(tmp_path / "b", tiny_config, weight=0.4)
    assert [r.label for r in read_runs([run, other])] == ["E-SimCLR (a)", "E-SimCLR (b)"]
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="logged no step"):
        read_runs([run])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "line 1: damaged"),
        (b"[]\n", "line 1: not a line of metrics"),
        (b'{"type": "step", "step": 1, "epoch": 0, "elapsed_s": 1}\n', "is None, not a number"),
        (b"\xff\n", "line 1: damaged"),
    ],
)
def test_damaged_metrics_are_one_line(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    run = make_run(tmp_path / "a", tiny_config, weight=0.4)
    (run / "metrics.jsonl").write_bytes(content.rstrip(b"\n") + b"\n")
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fast-essl: error: {run}/metrics.jsonl") and error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"date": 3, "gpus": 1, "cpu": null, "num_cores": []}'])
def test_a_damaged_environment_is_left_out_with_a_remark(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = make_run(tmp_path / "a", tiny_config, weight=0.4)
    (run / "environment.json").write_text(content)
    assert main(["report", str(run)]) == 0
    error = capsys.readouterr().err
    assert f"{run}/environment.json: " in error and "left out of the report" in error


@pytest.mark.parametrize(
    "content", ["", "{", "{}", '{"accuracy": {"knn_top1": "high"}}', '{"accuracy": [1]}']
)
def test_a_damaged_evaluation_is_left_out_with_a_remark(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    run = make_run(tmp_path / "a", tiny_config, weight=0.4)
    (run / "evaluation.json").write_text(content)
    assert main(["report", str(run)]) == 0
    assert "not evaluated yet" in (run / "report.html").read_text()
    assert f"{run}/evaluation.json: " in capsys.readouterr().err


def test_only_an_evaluation_of_the_checkpoint_is_shown(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for max_steps, evaluate in ((1, True), (2, False)):
        pretrain(load_config(tiny_config, ["--train.max-steps", str(max_steps)]), run, show_progress=False)
        if evaluate:
            knn = evaluate_run(run)["accuracy"]["knn_top1"]
            assert f"features tell {knn:.1%}" in write_report(run).read_text()
            assert capsys.readouterr().err == ""
    assert "not evaluated yet" in write_report(run).read_text()
    assert "evaluation.json: not of the checkpoint, which is of step 2" in capsys.readouterr().err
    evaluate_run(run)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "not evaluated yet" not in write_report(run).read_text()
    evaluation["accuracy"]["knn_top1"] = 0.99
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert "not evaluated yet" in write_report(run).read_text()
    assert "changed since it was written" in capsys.readouterr().err


def test_sample_views_are_the_runs_own(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    rows = sample_views(config, 3)
    assert [len(row) for row in rows] == [1 + 3 + 4] * 3
    for name, image, view1, view2, *rotations in rows:
        assert name in ("class0", "class1")
        assert image.shape == view1.shape == view2.shape == (16, 16, 3)
        assert not np.array_equal(view1, view2)
        for k, rotated in enumerate(rotations):
            np.testing.assert_array_equal(rotated, np.rot90(rotations[0], k))
    other = load_config(tiny_config, ["--train.batch_size", "4", "--train.seed", str(config.train.seed)])
    np.testing.assert_array_equal(sample_views(other, 2)[1][2], rows[1][2])


def test_ticks_are_round_and_cover() -> None:
    assert nice_ticks(0.31, 0.68, 5) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert nice_ticks(0, 558, 5) == [0, 200, 400, 600]
    flat = nice_ticks(2.0, 2.0, 5)
    assert flat[0] < 2.0 < flat[-1]


def test_a_chart_of_many_points_stays_small() -> None:
    x = list(range(10_000))
    curve = Series(label="<run>", color=0, x=x, y=[0.5] * len(x))
    svg = line_chart(
        [curve],
        x_label="step",
        tick_format="{:.1f}".format,
        value_format="{:.2f}".format,
        level=Level(label="chance", y=0.25),
    )
    assert len(svg) < 10_000
    assert "&lt;run&gt; 0.50" in svg
    points = re.findall(r'points="([^"]*)"', svg)[0].split()
    assert len(points) == 240
    assert len({point.split(",")[1] for point in points}) == 1, "a constant is drawn level"
