"""The command `fast-essl speedrun`: its options, what it prints, and its exit code. Importing it loads no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_speedrun(commands: Any) -> None:
    """Add the subcommand to the parser's."""
    speedrun = commands.add_parser(
        "speedrun",
        help="the time to an accuracy, or the accuracy after a time, over seeds; a record",
        description="Pretrain CONFIG until the target or the end of the budget in its section [speedrun], once a seed, "
        "and write a record and the leaderboard. Given again, the command goes on where it was stopped. Exit code 1 "
        "where a run did not reach the target.",
        epilog="Any configuration field can be overridden: --speedrun.target 0.9, --speedrun.budget-minutes 30, ...",
        allow_abbrev=False,
    )
    speedrun.set_defaults(run=_speedrun)
    speedrun.add_argument(
        "config", type=Path, metavar="CONFIG", help="a TOML file, or the name of one in configs/"
    )
    speedrun.add_argument("--runs", metavar="N", help="as --speedrun.runs: so many seeds, from train.seed on")
    speedrun.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/<CONFIG's name>)"
    )
    speedrun.add_argument(
        "--record-dir",
        type=Path,
        metavar="DIR",
        help="where record and leaderboard go (default: benchmarks/records of the checkout)",
    )


def _speedrun(arguments: argparse.Namespace) -> int:
    from fast_essl.config_io import find_config, load_config
    from fast_essl.speedrun import default_record_dir, result_lines, run_speedrun, shortfall

    runs = [] if arguments.runs is None else ["--speedrun.runs", arguments.runs]
    path = find_config(arguments.config)
    config = load_config(path, [*arguments.overrides, *runs])
    out = arguments.out or Path("runs") / path.stem
    record, record_path = run_speedrun(config, out, arguments.record_dir or default_record_dir())
    print("\n".join(result_lines(record, record_path)))
    missed = shortfall(record)
    if missed is None:
        return 0
    print(f"fast-essl: {missed}; {record_path} says how far each came", file=sys.stderr)
    return 1
