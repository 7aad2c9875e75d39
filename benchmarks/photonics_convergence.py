"""How finely must bands be computed? Densities of states against plane waves, k mesh and precision.

    python benchmarks/photonics_convergence.py [--cells 8]

Writes the record and beside it the picture, an SVG in a page.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from record import machine_facts, write_record

from fast_essl.charts import Series, line_chart
from fast_essl.losses import dos_error
from fast_essl.photonics.cells import CellsConfig, make_cell
from fast_essl.photonics.dos import NUM_PREDICTED
from fast_essl.photonics.generate import labels_of
from fast_essl.photonics.solver import SolverConfig
from fast_essl.report_style import STYLE

SUBJECT = "photonics-convergence"
ORDERS = (2, 3, 4, 5, 6)
FINEST_ORDER = 7
MESHES = (8, 12, 16, 20, 24, 32)
FINEST_MESH = 48
STANDARD_ORDER, STANDARD_MESH = 4, 16
"""What is not varied."""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=8, help="Blob cells, of a split that nothing else uses")
    arguments = parser.parse_args()
    facts = machine_facts()
    torch.set_num_threads(1)
    cells = torch.stack(
        [torch.from_numpy(make_cell(CellsConfig(), split=99, index=n)) for n in range(arguments.cells)]
    )

    finest = labels(cells, FINEST_ORDER, STANDARD_MESH, "fp64")[0]
    waves = [
        measured(cells, finest, order, STANDARD_MESH, precision)
        for precision in ("fp32", "fp64")
        for order in ORDERS
    ]
    finest = labels(cells, STANDARD_ORDER, FINEST_MESH, "fp32")[0]
    meshes = [measured(cells, finest, STANDARD_ORDER, mesh, "fp32") for mesh in MESHES]
    results = {
        "num_cells": len(cells),
        "smoothing": SolverConfig.smoothing,
        "plane_waves": {"reference": [FINEST_ORDER, STANDARD_MESH, "fp64"], "values": waves},
        "k_mesh": {"reference": [STANDARD_ORDER, FINEST_MESH, "fp32"], "values": meshes},
    }
    path = write_record(SUBJECT, results, facts=facts)
    page = path.with_suffix(".html")
    page.write_text(picture(waves, meshes), encoding="utf-8")
    print(path, page, sep="\n")


def labels(cells: torch.Tensor, order: int, mesh: int, precision: Any) -> tuple[np.ndarray, float]:
    """The densities of states, and the seconds a cell on one thread, which are printed and not recorded."""
    solver = SolverConfig(plane_wave_order=order, k_mesh=mesh, precision=precision)
    labels_of(cells[:1], SolverConfig(plane_wave_order=1, k_mesh=4))  # compiles
    started = time.perf_counter()
    dos = np.concatenate([labels_of(cell[None], solver) for cell in cells])
    return dos, (time.perf_counter() - started) / len(cells)


def measured(
    cells: torch.Tensor, finest: np.ndarray, order: int, mesh: int, precision: str
) -> dict[str, Any]:
    """The score's relative error against the finest, and the cost."""
    dos, seconds = labels(cells, order, mesh, precision)
    pairs = zip(torch.from_numpy(dos), torch.from_numpy(finest), strict=True)
    errors = [float(dos_error(a[None, :NUM_PREDICTED], b[None, :NUM_PREDICTED])) for a, b in pairs]
    result = {
        "num_plane_waves": (2 * order + 1) ** 2,
        "k_mesh": mesh,
        "precision": precision,
        "mean_error": float(np.mean(errors)),
        "max_error": float(np.max(errors)),
    }
    print(result, f"{seconds:.3f} s a cell")
    return result


def picture(waves: list[dict[str, Any]], meshes: list[dict[str, Any]]) -> str:
    """Both convergences as a page."""
    figures = []
    for values, key, label in (
        (waves, "num_plane_waves", "plane waves"),
        (meshes, "k_mesh", "k points a side"),
    ):
        single = [value for value in values if value["precision"] == "fp32"]
        series = [
            Series(label=name, color=color, x=[v[key] for v in single], y=[100 * v[field] for v in single])
            for color, (name, field) in enumerate((("mean", "mean_error"), ("largest", "max_error")))
        ]
        chart = line_chart(
            series,
            x_label="",
            tick_format=lambda value: f"{value:g}%",
            value_format=lambda value: f"{value:.2f}%",
            dots=True,
        )
        figures.append(f"<figure><figcaption>Relative error over {label}</figcaption>{chart}</figure>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Convergence</title>'
        f"<style>{STYLE}</style></head>\n<body><main><h1>Densities of states converge</h1>"
        f'<p class="lead">Blob cells, against {(2 * FINEST_ORDER + 1) ** 2} plane waves and against a mesh of '
        f'{FINEST_MESH} × {FINEST_MESH}.</p><div class="charts">{"".join(figures)}</div></main></body></html>\n'
    )


if __name__ == "__main__":
    main()
