"""How large the numbers of a configuration may be, and the checks of them.

The limits stand far above what anyone trains with. They are there for slips of the keyboard, which would otherwise
end in a system without threads or memory, or overflow float32 in the middle of a run.
"""

from __future__ import annotations

MAX_STEPS = 10**12
"""Of steps, and of what counts them."""
MAX_EPOCHS = 10**6
MAX_BATCH_SIZE = 2**20
"""Samples."""
MAX_THREADS = 1024
"""Of threads or processes; the largest machines of 2026 have 768 cores."""
MAX_WIDTH = 2**16
"""Of a layer."""
MAX_WEIGHT = 1e6
"""Of a term of the loss."""
MIN_RATE, MAX_RATE = 1e-30, 1e4
"""Of learning rates for 256 samples."""
MAX_DECAY = 1e3
"""Of an L2 penalty."""
MAX_RUNS = 1000
"""Of runs or fits that differ in their seeds."""
MAX_MINUTES = 10**6
MAX_SEED = 2**63 - 1 - MAX_RUNS
"""Of the first of so many runs."""


def require(section: object, field_name: str, holds: bool, wanted: str) -> None:
    """Errors: `ValueError` that begins with the field's name, unless `holds`."""
    if not holds:
        raise ValueError(f"{field_name} = {getattr(section, field_name)!r}: must be {wanted}")


def require_range(section: object, field_names: str, low: float, high: float) -> None:
    """Errors: `ValueError` that begins with the field's name, unless `low` <= value <= `high` for each of the fields.

    Args: `field_names`, with spaces between them, of fields that hold a number or a tuple of numbers.
    """
    for name in field_names.split():
        value = getattr(section, name)
        numbers = value if isinstance(value, tuple) else (value,)
        # NaN is in no range.
        holds = all(low <= number <= high for number in numbers)
        require(section, name, holds, f"{_shown(low)} or more, at most {_shown(high)}")


def _shown(limit: float) -> str:
    return f"{int(limit):,}" if limit == int(limit) else f"{limit:g}"
