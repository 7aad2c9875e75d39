"""The rooms' rates as a bar chart, a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fast_essl.bench.measuring import Row
from fast_essl.config import ConfigError

_BAR, _MARKED, _TEXT = "#8aa5c4", "#c8553d", "#333333"


def write_chart(path: Path, rows: Sequence[Row], *, title: str, subtitle: str, marked: Sequence[str]) -> None:
    """Draw a bar a row, samples/s on a logarithmic axis, with the range over repeats as a whisker.

    Args: `marked` are the names of the rows to colour.
    Errors: `ConfigError` where matplotlib is not installed; `OSError`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f"no chart: matplotlib cannot be imported ({error}); pip install 'fast_essl[chart]'"
        ) from error
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{row.name} " for row in rows]
    rates = [row.samples_per_s for row in rows]
    lowest = [1000 * row.batch_size / row.batch_ms["max"] for row in rows]
    highest = [1000 * row.batch_size / row.batch_ms["min"] for row in rows]
    whiskers = [
        [rate - low for rate, low in zip(rates, lowest, strict=True)],
        [high - rate for rate, high in zip(rates, highest, strict=True)],
    ]
    axes.barh(
        names,
        rates,
        xerr=whiskers,
        color=[_MARKED if row.name in marked else _BAR for row in rows],
        ecolor=_TEXT,
        height=0.62,
        capsize=2,
        log=True,
    )
    axes.invert_yaxis()
    axes.set_xlim(min(lowest) / 2, max(highest) * 4)
    for number, (rate, high) in enumerate(zip(rates, highest, strict=True)):
        text = f"{rate:,.0f}" if rate >= 10 else f"{rate:,.2f}"
        axes.text(high * 1.12, number, text, va="center", color=_TEXT, fontsize=9)
    axes.set_xlabel("samples/s, logarithmic; whiskers: range over repeats", color=_TEXT)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_title(f"{title}\n{subtitle}", loc="left", fontsize=10, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_TEXT)
    figure.savefig(path, dpi=130)
