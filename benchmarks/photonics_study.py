"""What does pretraining bring on photonic crystals? `fast-essl photonics study` as a record.

    python benchmarks/photonics_study.py [cpu] [--out runs/photonics-cpu]

Runs that are finished in --out are reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import machine_facts, write_record

from fast_essl.config_io import config_to_table
from fast_essl.photonics.config import load_preset
from fast_essl.photonics.pages import write_pages
from fast_essl.photonics.study import run_study


def main() -> None:
    """Run the study, write its record and its pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("preset", type=Path, nargs="?", default=Path("cpu"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts = machine_facts()
    config = load_preset(arguments.preset)
    out = arguments.out or Path("runs") / f"photonics-{arguments.preset.stem}"
    result = run_study(config, out)
    subject = f"photonics-{config.cells.kind}-{arguments.preset.stem}"
    print(write_record(subject, {**result, "config": config_to_table(config)}, facts=facts))
    for page in write_pages(config, out):
        print(page)


if __name__ == "__main__":
    main()
