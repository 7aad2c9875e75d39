"""The `fast-essl` command: each subcommand a thin call into one module, imported only when it is asked for.

Exit codes: 0 done; 1 a run failed (loss not finite, no memory); 2 bad usage, configuration, data or path, or results
that cannot be printed, told in one line; 130 and 143 stopped by Ctrl-C or SIGTERM (`pretrain` saves a checkpoint first;
the same command continues); 141 done, but the reader of the output has gone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

from fast_essl import __version__
from fast_essl.bench.cli import add_parser as add_bench
from fast_essl.config import Config, ConfigError
from fast_essl.errors import NonFiniteLossError, explain
from fast_essl.parser import NO_OVERRIDES, Parser, check_options
from fast_essl.photonics.cli import add_parser as add_photonics
from fast_essl.speedrun_command import add_speedrun
from fast_essl.streams import Output, prepare_streams
from loaders.signals import terminated_as_exit

PRETRAIN_USAGE = "fast-essl pretrain CONFIG [--run-dir DIR] [--section.field VALUE ...]"


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code."""
    output = prepare_streams()
    try:
        # A rank may wait for others inside of a collective, where no exception reaches it: it ends as signals end it.
        with nullcontext() if _is_rank() else terminated_as_exit():
            code = _run_command(argv)
    except SystemExit as end:  # the parser, after a help or a mistake
        raise SystemExit(_finish(output, int(end.code or 0))) from None
    except KeyboardInterrupt:
        code = _fail("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        code, message = explained
        # A loss that is not finite is not finite on all ranks.
        if not isinstance(error, NonFiniteLossError) or os.environ.get("RANK", "0") == "0":
            _fail(message, code)
    return _finish(output, code)


def _finish(output: Output | None, code: int) -> int:
    """The exit code, once all that was printed is written, or cannot be."""
    sys.stdout.flush()
    if code or output is None or output.error is None:
        return code
    if isinstance(output.error, BrokenPipeError):  # the reader, as `head`, has all it wants
        return 128 + signal.SIGPIPE
    return _fail(f"standard output: {output.error.strerror}; all but the printing is done")


def _run_command(argv: list[str] | None) -> int:
    parser = _build_parser()
    words = sys.argv[1:] if argv is None else argv
    if not _is_rank():  # ranks have their errors told once, by the command
        check_options(parser, words)
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.command in NO_OVERRIDES:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    if _is_rank() and arguments.command not in (*NO_OVERRIDES, "pretrain"):
        raise ConfigError(f"{arguments.command} runs in one process; start it without torchrun")
    return int(arguments.run(arguments))


def _fail(message: str, code: int = 2) -> int:
    print(f"fast-essl: error: {_this_rank()}{' '.join(message.split())}", file=sys.stderr)
    return code


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '?')} on {socket.gethostname()}: " if _is_rank() else ""


def _is_rank() -> bool:
    """Whether torchrun started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fast-essl",
        description="Equivariant Self-Supervised Learning (Dangovski et al., ICLR 2022), pretrained fast.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fast-essl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    convert = commands.add_parser(
        "convert",
        help="images of any source to one .beton file and its manifest",
        usage="fast-essl convert SOURCE DEST.beton [options]\n       fast-essl convert --verify DEST.beton",
        allow_abbrev=False,
        any_order=True,
    )
    convert.set_defaults(run=_convert)
    convert.add_argument(
        "source",
        nargs="?",
        help="an image folder (one folder a class), parquet file(s) or a folder of them, the CIFAR-10 archive or "
        "its folder, `cifar10` (downloads it), or `photo-digits` (built in)",
    )
    convert.add_argument("dest", nargs="?", type=Path, metavar="DEST.beton", help="the file to write")
    convert.add_argument("--verify", type=Path, metavar="DEST.beton", help="re-read all of a converted file")
    convert.add_argument(
        "--split",
        default="train",
        metavar="NAME",
        help="of a source that holds several, by name (default: train)",
    )
    convert.add_argument(
        "--max-side", type=int, metavar="N", help="shrink longer images to N pixels (default: never)"
    )
    convert.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="refuse larger images (default: 178,956,970; with --max-side four times that, and more of a JPEG)",
    )
    convert.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of encoded JPEGs (default: 90)"
    )
    convert.add_argument(
        "--encoding",
        choices=("auto", "jpeg", "raw"),
        default="auto",
        help="auto: small lossless images as raw pixels, others as JPEG; a fitting JPEG byte for byte (default)",
    )
    convert.add_argument("--workers", type=int, default=0, metavar="N", help="0 means all cores (default)")
    convert.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail", help="at a damaged image (default: fail)"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace an existing DEST.beton")

    pretrain = commands.add_parser(
        "pretrain", help="train a configuration, or continue its run", add_help=False, allow_abbrev=False
    )
    pretrain.set_defaults(run=_pretrain)
    pretrain.add_argument("config", nargs="?", type=Path, metavar="CONFIG")
    pretrain.add_argument("--run-dir", type=Path, metavar="DIR")
    pretrain.add_argument("-h", "--help", action="store_true")

    evaluate = commands.add_parser(
        "evaluate",
        help="kNN and the fast linear probe of a run's backbone, or of a checkpoint's",
        description="Evaluate the checkpoint in a run's folder and write evaluation.json there; or the backbone in a "
        "checkpoint file of fast_essl or of the official release, with the network and images of CONFIG.",
        epilog="Any field of the configuration can be overridden: --data.test FILE, --train.device cpu, ...",
        allow_abbrev=False,
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("source", type=Path, metavar="RUN|FILE", help="a run's folder, or a checkpoint")
    evaluate.add_argument("--config", type=Path, metavar="CONFIG", help="what a checkpoint FILE is")

    for name, text in (
        ("probe", "the paper's linear probe: SGD on augmented images, the backbone frozen"),
        ("finetune", "semi-supervised fine-tuning on a share of the labels"),
    ):
        protocol = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}; writes its JSON to the run's folder.",
            epilog=f"Any field of the run's config.toml can be overridden: --{name}.epochs 10, ...",
            allow_abbrev=False,
        )
        protocol.set_defaults(run=_protocol)
        protocol.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")

    export = commands.add_parser(
        "export",
        help="a backbone with torchvision's key names, as .pth or .safetensors",
        description="Write the backbone of a run or a checkpoint as a bare state dict with torchvision's key names.",
        allow_abbrev=False,
    )
    export.set_defaults(run=_export)
    export.add_argument("source", type=Path, metavar="RUN|FILE", help="a run's folder, or a checkpoint")
    export.add_argument("out", type=Path, metavar="OUT", help="the file to write, .pth or .safetensors")
    export.add_argument("--overwrite", action="store_true", help="replace an existing OUT")

    study = commands.add_parser(
        "study",
        help="a table of runs: rows against columns, over seeds",
        description="Pretrain and evaluate all runs of STUDY, print their table and write study.json.",
        epilog="Any configuration field can be overridden for all runs: --train.epochs 2, ...",
        allow_abbrev=False,
    )
    study.set_defaults(run=_study)
    study.add_argument(
        "study", type=Path, metavar="STUDY", help="a TOML file, or the name of one in configs/"
    )
    study.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs (default: runs/<STUDY's name>)"
    )

    add_speedrun(commands)

    transformations = commands.add_parser(
        "transformations", help="what features can be made sensitive or insensitive to", allow_abbrev=False
    )
    transformations.set_defaults(run=_transformations)

    report = commands.add_parser("report", help="one HTML page of a run", allow_abbrev=False)
    report.set_defaults(run=_report)
    report.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")

    doctor = commands.add_parser("doctor", help="what is installed and would be used", allow_abbrev=False)
    doctor.set_defaults(run=_doctor)
    doctor.add_argument(
        "files", nargs="*", type=Path, metavar="FILE.beton", help="tell whether it fits in memory"
    )

    add_bench(commands)

    demo = commands.add_parser(
        "demo",
        help="see E-SSL work in a few minutes, on data that is built in",
        description="Convert photo-digits, pretrain SimCLR and E-SimCLR from one seed, compare them, write a report.",
        epilog="Any configuration field can be overridden for both runs: --train.epochs 2, ...",
        allow_abbrev=False,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of both runs (default: 0)")
    demo.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of runs and report (default: runs/photo-digits)"
    )
    add_photonics(commands)
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    from loaders.convert import convert
    from loaders.manifest import verify
    from loaders.names import printable

    if arguments.verify is not None:
        if arguments.source is not None:
            raise ConfigError("command line: --verify takes one file and no SOURCE")
        manifest = verify(arguments.verify)
        print(f"{arguments.verify}: {manifest.num_samples} images, all as written")
        return 0
    if arguments.dest is None:
        raise ConfigError("command line: convert takes SOURCE and DEST.beton; see `fast-essl convert --help`")
    manifest = convert(
        arguments.source,
        arguments.dest,
        split=arguments.split,
        max_side=arguments.max_side,
        max_pixels=arguments.max_pixels,
        quality=arguments.quality,
        encoding=arguments.encoding,
        workers=arguments.workers,
        on_error=arguments.on_error,
        overwrite=arguments.overwrite,
    )
    skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
    num_repaired = manifest.storage.get("repaired", 0)
    repaired = f", {num_repaired} JPEGs repaired and encoded again" if num_repaired else ""
    num_mib = manifest.num_bytes / 2**20
    print(
        f"{printable(arguments.dest)}: {manifest.num_samples} images of {len(manifest.class_names)} classes, "
        f"{num_mib:.1f} MiB{repaired}{skipped}"
    )
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    if arguments.help:
        return _pretrain_help(arguments.config)
    if not _is_rank():
        return _train(arguments, _pretrain_config(arguments))
    from fast_essl.ranks import EndedByAnotherRankError, LostRankError, all_or_none, process_group

    try:
        with process_group():
            with all_or_none():
                config = _pretrain_config(arguments)
            return _train(arguments, config)
    except EndedByAnotherRankError as error:  # whose error it is
        print(f"fast-essl: {_this_rank()}{error}", file=sys.stderr)
        return 2
    except LostRankError as error:
        _fail(str(error), 1)
        os._exit(1)  # the group's threads may still wait for the rank that is gone


def _pretrain_config(arguments: argparse.Namespace) -> Config:
    from fast_essl.config_io import find_config, load_config

    if arguments.config is None:
        raise ConfigError(f"command line: pretrain takes a configuration first: {PRETRAIN_USAGE}")
    return load_config(find_config(arguments.config), arguments.overrides)


def _train(arguments: argparse.Namespace, config: Config) -> int:
    from fast_essl.distributed import rank
    from fast_essl.pretrain import pretrain

    run_dir = arguments.run_dir or Path("runs") / f"{arguments.config.stem}-seed{config.train.seed}"
    summary = pretrain(config, run_dir)
    rate = f"{summary.elapsed_s:.0f} s in all, {summary.samples_per_s:.0f} samples/s"
    outcome = f"finished at step {summary.step}, {rate}"
    if summary.status == "already finished":
        outcome = f"already finished at step {summary.step}; nothing to do"
    elif summary.signal_number is not None:
        outcome = f"stopped at step {summary.step} of {summary.num_steps}; the same command continues"
    if rank() == 0:
        print(f"{run_dir}: {outcome}")
    return 128 + summary.signal_number if summary.signal_number is not None else 0


def _pretrain_help(config_path: Path | None) -> int:
    """All fields with their docstrings and, where a configuration is given, its values."""
    import tyro

    from fast_essl.config_io import find_config, load_config

    description = (
        "Train CONFIG, a TOML file or the name of a recipe such as e_simclr_cifar10, in DIR, by default "
        "runs/<CONFIG's name>-seed<seed>, or continue the run that is there. Ctrl-C and SIGTERM save a checkpoint. "
        "Every field can be overridden:"
    )
    tyro.cli(
        Config,
        prog=PRETRAIN_USAGE.partition(" [--section")[0],
        description=description,
        default=load_config(find_config(config_path)) if config_path is not None else tyro.MISSING_NONPROP,
        args=["--help"],
        config=(tyro.conf.FlagConversionOff,),
    )
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fast_essl.config_io import find_config, load_config
    from fast_essl.evaluate_run import evaluate_file, evaluate_run

    if arguments.config is None:
        if arguments.source.is_file():
            raise ConfigError(
                f"{arguments.source}: a checkpoint file needs --config CONFIG, which describes it"
            )
        result = evaluate_run(arguments.source, overrides=arguments.overrides)
    else:
        if arguments.source.is_dir():
            raise ConfigError(
                "command line: --config is for a checkpoint file; a run has its own configuration"
            )
        if not arguments.source.exists():
            raise ConfigError(f"{arguments.source}: no such file")
        config = load_config(find_config(arguments.config), arguments.overrides)
        result = evaluate_file(arguments.source, config)
    width = max(len(name) for name in result["accuracy"])
    for name, accuracy in result["accuracy"].items():
        print(f"{name:<{width}}  {accuracy:6.2%}")
    print(json.dumps(result))
    return 0


def _protocol(arguments: argparse.Namespace) -> int:
    from fast_essl.protocols import finetune_run, probe_run

    measure = {"probe": probe_run, "finetune": finetune_run}[arguments.command]
    print(json.dumps(measure(arguments.run_dir, overrides=arguments.overrides)))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fast_essl.export import export_backbone

    print(export_backbone(arguments.source, arguments.out, overwrite=arguments.overwrite))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from fast_essl.config_io import find_config
    from fast_essl.study import run_study

    path = find_config(arguments.study)
    run_study(path, arguments.out or Path("runs") / path.stem, overrides=arguments.overrides)
    return 0


def _transformations(arguments: argparse.Namespace) -> int:
    from fast_essl.transformations import describe_transformations

    print(describe_transformations())
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from fast_essl.report import write_report

    print(write_report(arguments.run_dir))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from fast_essl.doctor import doctor

    return doctor(arguments.files)


def _demo(arguments: argparse.Namespace) -> int:
    from fast_essl.demo import DemoOptions, run_demo

    out = arguments.out or DemoOptions.out
    run_demo(DemoOptions(seed=arguments.seed, out=out, overrides=tuple(arguments.overrides)))
    return 0
