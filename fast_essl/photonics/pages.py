"""Pages that need nothing beside them: cells with their bands and densities of states; the study's table and curve."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fast_essl import records
from fast_essl.charts import Series, line_chart
from fast_essl.losses import dos_error
from fast_essl.photonics.config import ROWS, PhotonicsConfig
from fast_essl.photonics.dos import EMPTY_LATTICE, FREQUENCIES, MAX_FREQUENCY, NUM_PREDICTED
from fast_essl.photonics.finetune import labelled, load_network, predict, target
from fast_essl.photonics.solver import bands, k_path
from fast_essl.photonics.store import CellFile, Split, read_cells
from fast_essl.photonics.study import RESULTS
from fast_essl.report_style import STYLE
from fast_essl.report_views import png

CELLS_PAGE, STUDY_PAGE = "cells.html", "study.html"
CURVE_NAMES = {**ROWS, "simclr_poor": "SimCLR, poor"}
NUM_CELLS = 12
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the errors of the row E-SimCLR: which test cells are shown."""
PATH_STEPS = 12
MAX_DOS = 16
"""Right end of the densities' axes; a higher peak is cut."""

_STYLE = """
.grid3 { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 18px; }
.cell { display: grid; grid-template-columns: 76px 1fr; gap: 12px; align-items: start; }
.cell img { width: 76px; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px; }
.cell p { margin: 6px 0 0; font-size: 12.5px; line-height: 1.35; color: var(--soft); }
.axis { fill: none; stroke: var(--soft); stroke-width: .8; }
.band { fill: none; stroke: var(--c4); stroke-width: 1.1; }
.dos { fill: none; stroke: var(--ink); stroke-width: 1.6; }
.empty { fill: none; stroke: var(--random); stroke-width: 1.2; stroke-dasharray: 4 3; }
.labels { max-width: 620px; }
.labels svg { overflow: visible; }
.score { fill: var(--faint); opacity: .55; }
"""


def write_pages(config: PhotonicsConfig, out: Path) -> list[Path]:
    """Write both pages of a study into its folder. Errors: as `read_cells`; `OSError` without study.json."""
    file = read_cells(config.data.file)
    result = records.read_json(out / RESULTS, remedy="`fast-essl photonics study` makes it again")
    study = _document("Photonic crystals: the study", _study_sections(config, file, result, out))
    return [write_cells_page(file, out / CELLS_PAGE), _write(out / STUDY_PAGE, study)]


def write_cells_page(file: CellFile, path: Path) -> Path:
    """Some test cells (or, where none are labelled, none) with their bands and densities of states."""
    split = next(
        (file.splits[name] for name in ("test", "validation", "train") if len(file.splits[name])), None
    )
    cards = [_cell_card(file, split, index) for index in range(min(NUM_CELLS, len(split)))] if split else []
    cells, solver = file.cells, file.solver
    about = (
        f"{cells.kind}, Fourier sums up to order {cells.max_order}, symmetry {cells.symmetry}, seed {cells.seed}; "
        f"{(2 * solver.plane_wave_order + 1) ** 2} plane waves, {solver.k_mesh} × {solver.k_mesh} k points; "
        + ", ".join(f"{len(split)} {name}" for name, split in file.splits.items())
    )
    body = f"""<header><p class="eyebrow">PHOTONIC CRYSTALS</p><h1>Unit cells, their bands and densities of states</h1>
<p class="lead">Each cell repeats in both directions. Light that runs in its plane has the bands in the middle, from Γ
by X and M to Γ; their density of states is to be predicted from the image alone.</p>
<p class="facts">{escape(about)}</p></header>
<section><div class="grid3">{"".join(cards)}</div>
<p class="note">Vertical: frequency ω̃ in 2πc / (a √⟨ε⟩), from 0 to {MAX_FREQUENCY}. Blue: bands of TM modes. Black: the
density of states, from 0 to {MAX_DOS}; dashed: that of a crystal without structure, 2πω̃. Grey: the frequencies that
count in the score.</p>
</section>"""
    return _write(path, _document("Photonic crystals: cells", body))


def _study_sections(config: PhotonicsConfig, file: CellFile, result: dict[str, Any], out: Path) -> str:
    numbers = result["num_labels"]
    cells = {(cell["row"], cell["num_labels"]): cell["test_error"] for cell in result["cells"]}
    best = {n: min(cells[row, n]["mean"] for row in ROWS) for n in numbers}
    head = "".join(f"<th>{n:,} labels</th>" for n in numbers)
    rows = []
    for color, (row, name) in enumerate(ROWS.items()):
        values = "".join(
            f'<td class="{"best" if cells[row, n]["mean"] == best[n] else ""}">'
            f"{100 * cells[row, n]['mean']:.2f} ± {100 * cells[row, n]['stdev']:.2f}</td>"
            for n in numbers
        )
        rows.append(f'<tr><th><span class="key run{color}"></span>{escape(name)}</th>{values}</tr>')
    curves = ""
    if len(numbers) > 1:
        series = [
            Series(
                label=CURVE_NAMES[row],
                color=color,
                x=numbers,
                y=[100 * cells[row, n]["mean"] for n in numbers],
            )
            for color, row in enumerate(ROWS)
        ]
        chart = line_chart(
            series,
            x_label="labels",
            tick_format=lambda value: f"{value:g}%",
            value_format=lambda value: f"{value:.2f}%",
            dots=True,
        )
        caption = "Relative error on the test cells over the number of labels, mean of seeds"
        curves = (
            f'<section><figure class="labels"><figcaption>{caption}</figcaption>{chart}</figure></section>'
        )
    num_seeds = len(result["seeds"])
    return f"""<header><p class="eyebrow">PHOTONIC CRYSTALS · {escape(file.cells.kind.upper())}</p>
<h1>Predicting densities of states after pretraining on unlabelled cells</h1>
<p class="lead">Relative error on {result["data"]["test"]:,} test cells, in percent, after pretraining on
{result["data"]["pretrain"]:,} unlabelled ones: mean ± sample standard deviation of {num_seeds} seeds.</p>
<p class="facts">Predicting a crystal without structure for every cell: {100 * result["empty_lattice_error"]:.2f}.</p>
</header>
<section><div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<p class="note">Bold: the lowest mean of a column; means that differ by less than their spreads are not told apart.</p>
</section>
{curves}{_predictions(config, file, result, out)}"""


def _predictions(config: PhotonicsConfig, file: CellFile, result: dict[str, Any], out: Path) -> str:
    """Test cells by the error of E-SimCLR: predicted and true densities."""
    num_labels, seed = max(result["num_labels"]), result["seeds"][0]
    split = labelled(file, "test", config.data.file)
    truth = target(split)
    predicted = {}
    for row in ("none", "e_simclr"):
        network = load_network(config, out / row / f"seed{seed}", num_labels)
        predicted[row] = predict(network, split.permittivity, torch.device("cpu"))
    errors = torch.stack(
        [dos_error(p[None], t[None]) for p, t in zip(predicted["e_simclr"], truth, strict=True)]
    )
    order = errors.argsort().tolist()
    cards = []
    for quantile in QUANTILES:
        index = order[round(quantile * (len(order) - 1))]
        curves = "".join(
            _dos_line(predicted[row][index].numpy(), f"curve run{list(ROWS).index(row)}") for row in predicted
        )
        figure = _svg(230, _dos_panel(0, 230, split, index, curves))
        name = "largest error" if quantile == 1 else f"{quantile:.0%} of the cells are predicted better"
        cards.append(_card(split, index, figure, f"{name}<br>error {100 * float(errors[index]):.2f}%"))
    keys = " ".join(
        f'<span class="key run{color}"></span>{escape(name)} '
        for color, (row, name) in enumerate(ROWS.items())
        if row in predicted
    )
    return f"""<section><h2>Predicted against true</h2><div class="grid3">{"".join(cards)}</div>
<p class="note">{keys} black: true; dashed: without structure. {num_labels:,} labels, seed {seed}. Vertical: frequency
ω̃, from 0 to {MAX_FREQUENCY}; grey: the frequencies that count in the score.</p></section>"""


def _cell_card(file: CellFile, split: Split, index: int) -> str:
    image = torch.from_numpy(split.permittivity[index])
    k, lengths, corners = k_path(PATH_STEPS)
    frequencies = (
        bands(image[None], k, order=file.solver.plane_wave_order)[0].numpy() * float(image.mean()) ** 0.5
    )
    width, left = 118.0, 14.0
    across = left + (width - left) * lengths / lengths[-1]
    parts = [f'<path class="axis" d="M{x:.1f},6V186"/>' for x in across[corners]]
    parts += [
        f'<text class="tick middle" x="{x:.1f}" y="199">{name}</text>'
        for x, name in zip(across[corners], "ΓXMΓ", strict=True)
    ]
    for band in frequencies.T:
        if band.min() < MAX_FREQUENCY:
            parts.append(_line(across, band, "band"))
    dos = "" if split.dos is None else _dos_panel(width + 12, 230, split, index, "")
    return _card(split, index, _svg(230, "".join(parts) + dos), "")


def _dos_panel(left: float, right: float, split: Split, index: int, curves: str) -> str:
    """The density of states across, the frequency upwards; `curves` are drawn over it, in the panel's units."""
    assert split.dos is not None
    counted = [_y(FREQUENCIES[NUM_PREDICTED - 1]), _y(FREQUENCIES[100])]
    scale = f"translate({left:.1f} 0) scale({(right - left - 8) / 200:.4f} 1)"
    inner = (
        f'<rect class="score" x="0" width="200" y="{counted[0]:.1f}" height="{counted[1] - counted[0]:.1f}"/>'
        f'<path class="axis" vector-effect="non-scaling-stroke" d="M0,6V186H200"/>'
        + _dos_line(EMPTY_LATTICE, "empty")
        + _dos_line(split.dos[index], "dos")
        + curves
    )
    label = f'<text class="tick middle" x="{(left + right) / 2:.1f}" y="199">DOS</text>'
    return f'<g transform="{scale}">{inner}</g>{label}'


def _dos_line(density: np.ndarray, css: str) -> str:
    across = 200 * np.minimum(density, MAX_DOS) / MAX_DOS
    return _line(across, FREQUENCIES[: len(density)], css)


def _line(x: np.ndarray, frequencies: np.ndarray, css: str) -> str:
    """A curve, left out where it is above the top of the panel."""
    inside = frequencies <= MAX_FREQUENCY
    pieces = np.split(np.arange(len(x)), np.flatnonzero(np.diff(inside)) + 1)
    parts = []
    for piece in pieces:
        if inside[piece[0]]:
            points = " ".join(f"{x[n]:.1f},{_y(frequencies[n]):.1f}" for n in piece)
            parts.append(f'<polyline class="{css}" vector-effect="non-scaling-stroke" points="{points}"/>')
    return "".join(parts)


def _y(frequency: float) -> float:
    return 186 - 180 * float(frequency) / MAX_FREQUENCY


def _svg(width: int, content: str) -> str:
    return f'<svg viewBox="0 0 {width} 204" role="img">{content}</svg>'


def _card(split: Split, index: int, figure: str, text: str) -> str:
    cell = split.permittivity[index]
    levels = (235 - 205 * (cell - 1) / 19).astype(np.uint8)
    low, high = float(cell.min()), float(cell.max())
    about = f"ε {low:.1f} and {high:.1f}<br>⟨ε⟩ {cell.mean():.1f}" + (f"<br>{text}" if text else "")
    image = png(np.repeat(levels[:, :, None], 3, axis=2))
    return f'<figure class="cell"><div><img src="{image}" alt="unit cell {index}"><p>{about}</p></div>{figure}</figure>'


def _document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_STYLE}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def _write(path: Path, page: str) -> Path:
    records.write_text(path, page)
    return path
