"""`fast-essl photonics`: generate, pretrain, finetune, study. What they need is imported when they run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

PRETRAINED_ROWS = ("e_simclr", "simclr", "simclr_poor")
"""The rows of the study that pretrain; what they are is said in `config.ROWS`."""


def add_parser(commands: Any) -> None:
    """Add the command to those of `fast-essl`."""
    photonics = commands.add_parser(
        "photonics",
        help="E-SSL on photonic crystals: predict a density of states",
        description="Unit cells of photonic crystals and their densities of states, by a solver of our own; "
        "pretraining, fine-tuning and the paper's study on them.",
        allow_abbrev=False,
    )
    actions = photonics.add_subparsers(dest="action", metavar="ACTION", required=True)

    generate = _add(actions, "generate", "unit cells and labels to one HDF5 file, and a page that shows some")
    generate.set_defaults(run=_generate)
    generate.add_argument("--overwrite", action="store_true", help="replace a file of other cells")

    pretrain = _add(actions, "pretrain", "train one of the rows that pretrain, or continue its run")
    pretrain.set_defaults(run=_pretrain)
    pretrain.add_argument("--row", choices=PRETRAINED_ROWS, default="e_simclr", help="default: e_simclr")
    pretrain.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="default: runs/photonics-<row>-seed<seed>"
    )

    finetune = actions.add_parser(
        "finetune",
        help="fit a run's backbone to labelled cells",
        description="Fine-tune the backbone of a run; tells the error on the test cells and writes it to the folder.",
        epilog="Any field of the run's config.toml can be overridden: --finetune.num-labels 300, ...",
        allow_abbrev=False,
    )
    finetune.set_defaults(run=_finetune)
    finetune.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")

    study = _add(
        actions, "study", "the paper's table: four rows, over numbers of labels and seeds, and its pages"
    )
    study.set_defaults(run=_study)
    study.add_argument("--out", type=Path, metavar="DIR", help="default: runs/photonics-<preset>")


def _add(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="Any field of the preset can be overridden: --train.epochs 2, --cells.kind gpm, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--preset",
        type=Path,
        default=Path("cpu"),
        metavar="NAME|FILE",
        help="smoke, cpu, paper, or a TOML file (default: cpu)",
    )
    return parser


def _generate(arguments: argparse.Namespace) -> int:
    from fast_essl.evaluate_run import resolve_device
    from fast_essl.photonics.config import load_preset
    from fast_essl.photonics.generate import generate
    from fast_essl.photonics.pages import write_cells_page
    from loaders.machine import num_cores

    config = load_preset(arguments.preset, arguments.overrides)
    device, _ = resolve_device(config)
    file = generate(
        config.data.file,
        cells=config.cells,
        solver=config.solver,
        counts=config.counts,
        device=device,
        num_threads=config.train.num_threads or num_cores(),
        overwrite=arguments.overwrite,
    )
    counts = ", ".join(f"{len(split)} {name}" for name, split in file.splits.items())
    print(f"{config.data.file}: {counts}")
    print(write_cells_page(file, config.data.file.with_suffix(".html")))
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from fast_essl.photonics.config import load_preset, of_row
    from fast_essl.photonics.pretrain import pretrain_cells

    config = load_preset(arguments.preset, arguments.overrides)
    seed = config.train.seed
    run_dir = arguments.run_dir or Path("runs") / f"photonics-{arguments.row}-seed{seed}"
    summary = pretrain_cells(of_row(config, arguments.row, seed), run_dir)
    if summary.signal_number is not None:
        print(f"{run_dir}: stopped at step {summary.step} of {summary.num_steps}; the same command continues")
        return 128 + summary.signal_number
    print(f"{run_dir}: {summary.status} at step {summary.step}, {summary.elapsed_s:.0f} s in all")
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from fast_essl.photonics.finetune import finetune_run

    print(json.dumps(finetune_run(arguments.run_dir, overrides=arguments.overrides)))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from fast_essl.photonics.config import load_preset
    from fast_essl.photonics.pages import write_pages
    from fast_essl.photonics.study import run_study

    config = load_preset(arguments.preset, arguments.overrides)
    out = arguments.out or Path("runs") / f"photonics-{arguments.preset.stem}"
    run_study(config, out)
    for page in write_pages(config, out):
        print(page)
    return 0
