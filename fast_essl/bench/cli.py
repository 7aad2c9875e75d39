"""The commands `fast-essl bench` and `fast-essl bench plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from fast_essl.config import ConfigError
from fast_essl.config_io import find_config

PARTS = ("all", "loader", "views", "kernels", "step")

DESCRIPTION = """\
How fast is each room between the disk and the optimizer on this machine, for this configuration and these data, and
which one limits the run? Prints a table and a verdict; writes bench.json and bench.png. A PART is one of all (the
default), loader, views, kernels and step; CONFIG is a TOML file or a recipe, by default e_simclr_imagenet.

  fast-essl bench                               all parts of e_simclr_imagenet, on photographs made for this
  fast-essl bench loader --data train.beton     storage, decode, crops and loader alone
  fast-essl bench all e_simclr_cifar10 --data train.beton --data.num-workers 4
  fast-essl bench plan --help                   what limits a cluster, from such figures
"""

PLAN_OPTIONS: tuple[tuple[str, type, float | None, str], ...] = (
    ("--gpus", int, None, "of all nodes together"),
    ("--cores-per-gpu", int, None, "CPU cores a GPU"),
    ("--storage-mb-per-s", float, None, "what the storage gives to all nodes together"),
    ("--gpus-per-node", int, 8, "GPUs of a node"),
    ("--network-gb-per-s", float, 25, "between nodes, GB/s a node and direction"),
    ("--gpu-link-gb-per-s", float, 200, "between the GPUs of a node, GB/s; PCIe has about 20"),
    ("--latency-us", float, 20, "of a small exchange between all GPUs"),
    ("--node-memory-gib", float, 0, "of a node, for the dataset"),
    ("--max-side", int, 0, "as of `convert` (default: the images as they are)"),
    ("--samples", int, 0, "an epoch (default: ImageNet's 1,281,167)"),
    ("--epochs", int, 0, "(default: the configuration's)"),
    ("--batch-size", int, 0, "of all GPUs together (default: the configuration's)"),
    ("--step-samples-per-s", float, 0, "of one GPU without a loader (default: as measured, if on a GPU)"),
)
"""Option, type, default (None: it must be given), and what it is."""


def add_parser(commands: Any) -> None:
    """Add `bench` to the commands.

    Its words are not declared: argparse would take the value of an override, as in `--train.device cpu`, for one. They
    come with the overrides. The first may be `plan`, which has options, and so a parser, of its own.
    """
    bench = commands.add_parser(
        "bench",
        help="how fast each room of a run is here and which one limits it; `bench plan`: the same for a cluster",
        usage="fast-essl bench [PART ...] [CONFIG] [options] [--section.field VALUE ...]",
        description=DESCRIPTION,
        epilog="Any field of the configuration can be overridden: --data.loader torch, --train.device cpu, ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    bench.add_argument("-h", "--help", action="store_true")
    bench.add_argument("--data", type=Path, metavar="FILE.beton", help="the images (default: made for this)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: runs/bench)")
    bench.add_argument(
        "--batch-size", type=int, metavar="N", help="samples a step (default: the config's, or what fits)"
    )
    bench.add_argument("--quick", action="store_true", help="hardly any work: whether it runs, not how fast")
    # Of the same class, for its errors of one line.
    planner = _plan_parser(type(bench))
    bench.set_defaults(run=partial(_bench, bench, planner), within={"plan": planner})


def _plan_parser(parser_class: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = parser_class(
        prog="fast-essl bench plan",
        description="What limits a run on a cluster, and how long it takes, from what `fast-essl bench all` measured "
        "on one machine. The model and its assumptions stand in fast_essl/bench/plan.py.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "measured",
        nargs="?",
        type=Path,
        default=Path("runs/bench/bench.json"),
        metavar="BENCH.json",
        help="the figures (default: runs/bench/bench.json)",
    )
    for option, kind, default, text in PLAN_OPTIONS:
        required = default is None
        told = text if required or "default" in text else f"{text} (default: {default:g})"
        parser.add_argument(
            option,
            type=kind,
            default=default,
            required=required,
            help=told,
            metavar="N" if kind is int else "X",
        )
    return parser


def _bench(
    bench: argparse.ArgumentParser, planner: argparse.ArgumentParser, arguments: argparse.Namespace
) -> int:
    words = list(takewhile(lambda word: not word.startswith("--"), arguments.overrides))
    if words[:1] == ["plan"]:
        return _plan(planner, arguments)
    if arguments.help:
        bench.print_help()
        return 0
    parts, config = split_words(words)
    if arguments.batch_size is not None and arguments.batch_size < 2:
        raise ConfigError(f"command line: --batch-size {arguments.batch_size}: must be 2 or more")

    from fast_essl.bench.run import BenchOptions, run_bench

    chosen = {
        "config": config,
        "data": arguments.data,
        "out": arguments.out,
        "batch_size": arguments.batch_size,
        "parts": parts,
    }
    options = {name: value for name, value in chosen.items() if value is not None}
    run_bench(
        BenchOptions(**options, quick=arguments.quick, overrides=tuple(arguments.overrides[len(words) :]))
    )
    return 0


def split_words(words: list[str]) -> tuple[tuple[str, ...] | None, Path | None]:
    """The parts and the configuration among the words; None for what is not there.

    Errors: `ConfigError` for a word that is neither.
    """
    parts = tuple(part for part in PARTS[1:] if part in words)
    others = [word for word in words if word not in PARTS]
    if len(others) > 1:
        raise ConfigError(
            f"command line: bench takes parts and one configuration, not {' and '.join(others)}"
        )
    config = Path(others[0]) if others else None
    if config is not None:
        try:
            find_config(config, (*PARTS, "plan"))
        except ConfigError as error:
            raise ConfigError(f"{error}; the parts are {', '.join(PARTS)}") from None
    return (None if "all" in words or not parts else parts), config


def _plan(planner: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    for option in ("data", "out", "quick"):
        if getattr(arguments, option):
            raise ConfigError(f"command line: bench plan measures nothing and takes no --{option}")
    words = arguments.overrides[1:]
    if arguments.batch_size is not None:
        words = [*words, "--batch-size", str(arguments.batch_size)]
    given = planner.parse_args([*words, "--help"] if arguments.help else words)

    from fast_essl.bench.plan import Cluster, describe, plan, read_job

    given.num_gpus = given.gpus
    cluster = Cluster(**{field.name: getattr(given, field.name) for field in fields(Cluster)})
    job = read_job(
        given.measured,
        num_samples=given.samples,
        epochs=given.epochs,
        batch_size=given.batch_size,
        max_side=given.max_side,
        step_samples_per_s=given.step_samples_per_s,
    )
    answer = plan(job, cluster)
    print(describe(job, cluster, answer))
    print(json.dumps(asdict(answer)))
    return 0
