"""How long to wait for a worker process that gives no sign of life."""

from __future__ import annotations

import os
from typing import Final

from loaders.errors import DataError

MAX_WAIT_VARIABLE: Final = "FAST_ESSL_MAX_WAIT_S"
"""Environment variable with the seconds, 300 where it is not set: a large batch on a busy machine takes a minute."""


def max_wait_s() -> int:
    """Seconds without any result after which a worker process counts as hung. Errors: `DataError` for no number."""
    text = os.environ.get(MAX_WAIT_VARIABLE, "300")
    if not text.isdecimal() or int(text) < 1:
        raise DataError(f"{MAX_WAIT_VARIABLE} = {text!r}: give a whole number of seconds, 1 or more")
    return int(text)
