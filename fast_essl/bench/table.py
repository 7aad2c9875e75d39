"""The measured rows and times as people read them."""

from __future__ import annotations

from fast_essl.bench.measuring import Row


def table_head(*, on_gpu: bool) -> str:
    """The titles of the columns."""
    device = f"{'TFLOP/s':>9}{'GiB':>7}" if on_gpu else ""
    return (
        f"{'room':22}{'batch':>6}{'samples/s':>11}{'range':>19}{'ms a batch':>12}{'MB/s':>9}"
        f"{'CPU ms a sample':>17}{device}{'set-up s':>10}"
    )


def table_line(row: Row, *, on_gpu: bool) -> str:
    """A row for people."""
    low, high = (1000 * row.batch_size / row.batch_ms[end] for end in ("max", "min"))
    device = f"{number(row.tflop_per_s):>9}{number(row.peak_gib):>7}" if on_gpu else ""
    return (
        f"{row.name:22}{row.batch_size:>6}{number(row.samples_per_s):>11}{f'{number(low)} – {number(high)}':>19}"
        f"{number(row.batch_ms['median']):>12}{number(row.mb_per_s):>9}{number(row.cpu_ms_per_sample):>17}{device}"
        f"{number(row.setup_s):>10}"
    )


def number(value: float | None) -> str:
    """Three digits or more, with a thousands separator; empty for what was not measured."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def describe_kernels(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of what `measure_kernels` returns, with each implementation's speed as a multiple of eager's."""
    lines = [f"{'kernels':34}{'ms':>9}{'range':>20}{'× eager':>9}{'MiB':>8}"]
    for name, rows in results.items():
        for implementation, row in rows.items():
            span = f"{row['min']:.3f} – {row['max']:.3f}"
            ratio = rows["eager"]["median"] / row["median"]
            label = f"{name}, {implementation}"
            lines.append(f"{label:34}{row['median']:9.3f}{span:>20}{ratio:9.2f}{row['peak_mib']:8.0f}")
    return "\n".join(lines)
