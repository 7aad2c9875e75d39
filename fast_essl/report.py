"""The report: runs as one self-contained HTML page, to be looked at on a desk or a phone, by day or by night."""

from __future__ import annotations

import difflib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fast_essl import records, run_folder
from fast_essl.charts import Level, Series, line_chart
from fast_essl.checkpoint import load_file, weights_digest
from fast_essl.config import Config, ConfigError
from fast_essl.config_io import load_config
from fast_essl.report_style import NUM_COLORS, STYLE
from fast_essl.report_views import element_names, png, sample_views
from fast_essl.transformations import config_transformations
from loaders.errors import DataError

REPORT = "report.html"
ACCURACY_NAMES = {
    "knn_top1": "kNN",
    "weighted_knn_top1": "weighted kNN",
    "probe_top1": "linear probe",
    "probe_top5": "linear probe, top-5",
}
"""What the table shows of evaluation.json's `accuracy`, and how it is called there."""
_ENVIRONMENT_KINDS: dict[str, type] = {"date": str, "cpu": str, "num_cores": int, "gpus": list}
"""What the page shows of environment.json."""
_METHOD_NAMES = {"simclr": "SimCLR", "simsiam": "SimSiam", "barlow_twins": "Barlow Twins"}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder holds."""

    path: Path
    label: str
    """`SimCLR` for λ = 0, `E-SimCLR` otherwise; with the folder's name where two would be called the same."""
    config: Config
    config_toml: str
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl of type step."""
    evals: list[dict[str, Any]]
    """Lines of metrics.jsonl of type eval."""
    accuracy: dict[str, float]
    """Shares of 1, by the names of evaluation.json; empty before `fast-essl evaluate`."""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric where it was measured."""
        lines = [line for line in (*self.steps, *self.evals) if line.get(name) is not None]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def samples_per_s(self) -> float:
        """Median over the logged stretches, so that neither compilation nor a busy minute counts."""
        return statistics.median(line["samples_per_s"] for line in self.steps)

    def data_wait_share(self) -> float:
        """Median share of time spent waiting for the loader."""
        return statistics.median(line["data_wait_share"] for line in self.steps)

    def minutes(self) -> float:
        """Of training, online evaluations included."""
        return max(line["elapsed_s"] for line in (*self.steps, *self.evals)) / 60


def read_runs(run_dirs: Sequence[Path]) -> list[RunRecord]:
    """Read the folders of runs. Errors: `ConfigError` naming a folder without a run that has logged a step."""
    labels = []
    for run_dir in run_dirs:
        for name in (run_folder.CONFIG, run_folder.METRICS):
            if not (run_dir / name).exists():
                raise ConfigError(f"{run_dir}: holds no run ({name} is missing); give the folder of a run")
        method = load_config(run_dir / run_folder.CONFIG).method
        name = _METHOD_NAMES.get(method.name, method.name)
        labels.append(f"E-{name}" if method.equivariance_weight > 0 else name)
    runs = []
    for run_dir, label in zip(run_dirs, labels, strict=True):
        lines = records.read_metrics(run_dir / run_folder.METRICS)
        steps = [line for line in lines if line["type"] == "step"]
        if not steps:
            raise ConfigError(f"{run_dir}: has logged no step yet; train it first with `fast-essl pretrain`")
        runs.append(
            RunRecord(
                path=run_dir,
                label=label if labels.count(label) == 1 else f"{label} ({run_dir.name})",
                config=load_config(run_dir / run_folder.CONFIG),
                config_toml=(run_dir / run_folder.CONFIG).read_text("utf-8"),
                environment=_read_environment(run_dir / run_folder.ENVIRONMENT),
                steps=steps,
                evals=[line for line in lines if line["type"] == "eval"],
                accuracy=_read_accuracy(run_dir),
            )
        )
    return runs


def write_report(
    run_dirs: Path | Sequence[Path],
    destination: Path | None = None,
    *,
    random_accuracy: Mapping[str, float] | None = None,
    num_samples: int = 6,
) -> Path:
    """Write one or several runs as one HTML file that needs nothing beside it, and return its path.

    Args: `destination` defaults to report.html in the (first) run's folder; `random_accuracy` is that of the backbone
    before training; `num_samples` images are shown with their views.
    Errors: `ConfigError` for a folder without a run; `DataError` for a dataset that is there and damaged.
    """
    folders = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = read_runs(folders)
    page = render(runs, random_accuracy=dict(random_accuracy or {}), num_samples=num_samples)
    destination = destination or folders[0] / REPORT
    records.write_text(destination, page)
    return destination


def render(runs: Sequence[RunRecord], *, random_accuracy: dict[str, float], num_samples: int) -> str:
    """The page as text."""
    title = f"{' and '.join(run.label for run in runs)} on {_dataset(runs[0].config)}"
    sections = [
        _headline(runs, random_accuracy),
        _accuracy_section(runs, random_accuracy),
        _curves_section(runs, random_accuracy),
        _views_section(max(runs, key=lambda run: len(run.config.crop_recipes())), num_samples),
        _speed_section(runs),
        _config_section(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _headline(runs: Sequence[RunRecord], random_accuracy: dict[str, float]) -> str:
    config, best = runs[0].config, max(runs, key=lambda run: run.accuracy.get("knn_top1", 0.0))
    knn = best.accuracy.get("knn_top1")
    data = _dataset(config)
    if knn is None:
        first, last = best.steps[0], best.steps[-1]
        text = f"{best.label} on {data}, {last['step']:,} steps"
        detail = f"The loss went from {first['loss']:.3f} to {last['loss']:.3f}; not evaluated yet."
    else:
        text = (
            f"Learned without a label, {best.label}’s features tell {knn:.1%} of {data}’s test images right"
        )
        others = [(run.label, run.accuracy["knn_top1"]) for run in runs if run is not best and run.accuracy]
        others += [("the random backbone", random_accuracy["knn_top1"])] if random_accuracy else []
        compared = [
            f"{100 * abs(knn - other):.1f} points {'above' if knn >= other else 'below'} {name} ({other:.1%})"
            for name, other in others
        ]
        detail = f"kNN on frozen features{': ' if compared else ''}{' and '.join(compared)}."
    model = config.model
    facts = (
        f"{model.backbone} of width {model.width} · {config.train.epochs} epochs · batch "
        f"{config.train.batch_size} · seed {config.train.seed} · {runs[0].environment.get('date', '')[:10]}"
    )
    return (
        f'<header><p class="eyebrow">fast_essl · {escape(data)}</p><h1>{escape(text)}</h1>'
        f'<p class="lead">{escape(detail)}</p><p class="facts">{escape(facts)}</p></header>'
    )


def _accuracy_section(runs: Sequence[RunRecord], random_accuracy: dict[str, float]) -> str:
    rows = [("Random backbone", "random", random_accuracy)] if random_accuracy else []
    rows += [(run.label, f"run{color % NUM_COLORS}", run.accuracy) for color, run in enumerate(runs)]
    names = [name for name in ACCURACY_NAMES if any(name in accuracy for _, _, accuracy in rows)]
    if not names:
        return ""
    head = "".join(f"<th>{escape(ACCURACY_NAMES[name])}</th>" for name in names)
    body = ""
    for label, css, accuracy in rows:
        cells = ""
        for name in names:
            value = accuracy.get(name)
            if value is None:
                cells += "<td>–</td>"
                continue
            best = " best" if value == max(row[2].get(name, 0.0) for row in rows) else ""
            bar = f'<span class="bar {css}" style="--share:{100 * value:.1f}%"></span>'
            cells += f'<td><span class="value{best}">{value:.1%}</span>{bar}</td>'
        body += f'<tr><th><span class="key {css}"></span>{escape(label)}</th>{cells}</tr>'
    return _section(
        "What the features know",
        _table(head, body, "accuracy"),
        "Share of test images classified rightly from frozen features; the bank and the probe use the train split. "
        "Bars run from 0 to 100%.",
    )


def _curves_section(runs: Sequence[RunRecord], random_accuracy: dict[str, float]) -> str:
    random_knn = random_accuracy.get("knn_top1")
    nums_elements = {images_a_sample(run.config) - 2 for run in runs} - {0}
    # One line of chance serves all runs, or none.
    chance = 1 / nums_elements.pop() if len(nums_elements) == 1 else None
    charts = [
        _chart(
            runs,
            "Online kNN",
            "knn_top1",
            ("{:.0%}", "{:.1%}"),
            level=("random backbone", random_knn),
            dots=True,
        ),
        _chart(
            runs,
            "Equivariance accuracy",
            "equivariance_accuracy",
            ("{:.0%}", "{:.1%}"),
            level=("chance", chance),
        ),
        _chart(runs, "Online classifier", "online_accuracy", ("{:.0%}", "{:.1%}")),
        _chart(runs, "SSL loss", "ssl_loss", ("{:.1f}", "{:.3f}")),
        _chart(runs, "Equivariance loss", "equivariance_loss", ("{:.1f}", "{:.3f}")),
    ]
    return _section("How it learned", f'<div class="charts">{"".join(charts)}</div>')


def _chart(
    runs: Sequence[RunRecord],
    title: str,
    name: str,
    formats: tuple[str, str],
    *,
    level: tuple[str, float | None] = ("", None),
    dots: bool = False,
) -> str:
    curves = [(color, run.label, *run.curve(name)) for color, run in enumerate(runs)]
    series = [Series(label=label, color=color % NUM_COLORS, x=x, y=y) for color, label, x, y in curves if x]
    if not series:
        return ""
    line = None if level[1] is None else Level(label=level[0], y=level[1])
    ticks, values = formats
    svg = line_chart(
        series, x_label="step", tick_format=ticks.format, value_format=values.format, level=line, dots=dots
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _views_section(run: RunRecord, num_samples: int) -> str:
    title = "What the backbone saw"
    data = run.config.data.train
    if not data.exists():
        return _section(title, f"<p>{escape(str(data))} is not on this machine, so no views are shown.</p>")
    grid = sample_views(run.config, num_samples)
    rows = ""
    for name, *images in grid:
        tiles = "".join(f'<td><img alt="" src="{png(image)}"></td>' for image in images)
        rows += f"<tr><th>{escape(name)}</th>{tiles}</tr>"
    chosen, num_copies = run.config.transformation, len(grid[0]) - 4
    names = ["image", "view 1", "view 2", *element_names(chosen.equivariance, num_copies)]
    head = "".join(f"<th>{name}</th>" for name in names)
    note = "The first images of the first step as this run saw them, with their class. SSL pulls the two views together"
    if num_copies > 0:
        note += f"; the prediction head tells the copies of the third crop apart ({chosen.equivariance})"
    if chosen.invariance != "none":
        note += f"; each view is transformed by a random element of {chosen.invariance}"
    return _section(title, _table(head, rows, "views"), f"{note}.")


def _speed_section(runs: Sequence[RunRecord]) -> str:
    columns: dict[str, Callable[[RunRecord], str]] = {
        "samples/s": lambda run: f"{run.samples_per_s():,.0f}",
        "images/s": lambda run: f"{run.samples_per_s() * images_a_sample(run.config):,.0f}",
        "data wait": lambda run: f"{run.data_wait_share():.1%}",
        "minutes": lambda run: f"{run.minutes():.1f}",
    }
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = ""
    for color, run in enumerate(runs):
        cells = "".join(f"<td>{value(run)}</td>" for value in columns.values())
        body += (
            f'<tr><th><span class="key run{color % NUM_COLORS}"></span>{escape(run.label)}</th>{cells}</tr>'
        )
    machine = runs[0].environment
    where = " · ".join(
        map(str, (machine.get("cpu", ""), f"{machine.get('num_cores', '?')} cores", *machine.get("gpus", [])))
    )
    return _section(
        "How fast",
        _table(head, body),
        "A sample is one source image with all its views; images/s counts every image that the backbone sees. "
        f"Data wait is the share of time that training stood still for the loader. {where}.",
    )


def images_a_sample(config: Config) -> int:
    """How many images the backbone sees of one sample: two views and, with an equivariance loss, |G| copies or one."""
    equivariance, _ = config_transformations(config)
    if equivariance is None:
        return 2
    return 2 + (1 if equivariance.one_copy else equivariance.num_elements)


def _config_section(runs: Sequence[RunRecord]) -> str:
    parts = []
    if len(runs) > 1:
        before, after = (run.config_toml.splitlines() for run in runs[:2])
        lines = difflib.unified_diff(before, after, n=0, lineterm="")
        changed = "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
        parts.append(
            f"<p>All that differs between {escape(runs[0].label)} (−) and {escape(runs[1].label)} (+):</p>"
            f"<pre>{escape(changed or 'nothing')}</pre>"
        )
    for run in runs:
        environment = json.dumps(run.environment, indent=2, ensure_ascii=False)
        for name, text in (("configuration", run.config_toml), ("environment", environment)):
            parts.append(
                f"<details><summary>{escape(run.label)}: {name}</summary><pre>{escape(text)}</pre></details>"
            )
    return _section("How it was set up", "".join(parts))


def _section(title: str, content: str, note: str = "") -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{content}{below}</section>"


def _table(head: str, body: str, css: str = "plain") -> str:
    rows = f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{css}">{rows}</table></div>'


def _dataset(config: Config) -> str:
    return config.data.train.stem.removesuffix("-train")


def _read_environment(path: Path) -> dict[str, Any]:
    """What stands in environment.json; empty, with a remark, where it is damaged: it is no result."""
    if not path.exists():
        return {}
    try:
        environment = records.read_json(path, remedy="left out of the report")
    except DataError as error:
        records.remark(str(error))
        return {}
    wrong = [
        name
        for name, kind in _ENVIRONMENT_KINDS.items()
        if not isinstance(environment.get(name, kind()), kind)
    ]
    if wrong:
        records.remark(f"{path}: {wrong[0]} is {environment[wrong[0]]!r}; left out of the report")
    return {name: value for name, value in environment.items() if name not in wrong}


def _read_accuracy(run_dir: Path) -> dict[str, float]:
    """What evaluation.json says; empty, with a remark, where it is damaged or not of the checkpoint."""
    path = run_dir / run_folder.EVALUATION
    again = "left out of the report; `fast-essl evaluate` makes it again"
    if not path.exists():
        return {}
    try:
        evaluation = records.read_json(path, remedy=again)
        accuracy = evaluation.get("accuracy")
        if not isinstance(accuracy, dict) or not all(map(records.is_number, accuracy.values())):
            raise DataError(f"{path}: holds no accuracies; {again}")
        _check_evaluation(evaluation, run_dir, f"{path}: {{}}; {again}")
    except DataError as error:
        records.remark(str(error))
        return {}
    return dict(accuracy)


def _check_evaluation(evaluation: dict[str, Any], run_dir: Path, message: str) -> None:
    """Errors: `DataError` for one that was changed, or is of other weights than the checkpoint's, if there is one."""
    checkpoint = run_dir / run_folder.CHECKPOINT
    if (checkpoint.exists() or records.CHECKSUM in evaluation) and not records.is_sealed(evaluation):
        raise DataError(message.format("of version 0.1.0, or changed since it was written"))
    if checkpoint.exists():
        state = load_file(checkpoint, method=dict, step=int)
        weights = weights_digest(state["method"], "backbone.")
        if (evaluation["step"], evaluation["measured"]["weights"]) != (state["step"], weights):
            raise DataError(message.format(f"not of the checkpoint, which is of step {state['step']}"))
