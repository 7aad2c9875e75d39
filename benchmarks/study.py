"""What does a study's table say? `fast-essl study` as a record, with the machine and all that it ran.

    python benchmarks/study.py study_methods_photo_digits [--out runs/study_methods_photo_digits]

Runs that are finished in --out are reused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import machine_facts, write_record

from fast_essl.config_io import config_to_table, find_config
from fast_essl.study import load_study, run_study, study_cells


def main() -> None:
    """Run the study and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts = machine_facts()
    path = find_config(arguments.study)
    cells = study_cells(load_study(path), source=str(path))
    configs = {f"{cell.row}, {cell.column}": config_to_table(cell.configs[0]) for cell in cells}
    result = run_study(path, arguments.out or Path("runs") / path.stem)
    print(
        write_record(path.stem.replace("_", "-"), {**result, "configs_of_first_seed": configs}, facts=facts)
    )


if __name__ == "__main__":
    main()
