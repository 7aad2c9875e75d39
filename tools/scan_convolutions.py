"""Whether each convolution that this project's networks hold computes what it should on this processor.

A CPU library's convolution may be wrong for some shape, on some processors, with some number of threads; once one
wrote beyond its memory, and runs trained on wrong numbers or crashed (`SubsamplingConv2d`). So each convolution of each
recipe, and of narrower networks, is run forward and backward, channels-last, in a process of its own, under glibc's
checks of the heap, for one and two threads and each instruction set that oneDNN can be held to; outputs and gradients
are compared with float64.

    python tools/scan_convolutions.py        # prints a table; exit code 1 if any was wrong, crashed or hung

The control is the strided form that this project does not run: on a processor with the fault the scan has to find it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fast_essl.config_io import load_config
from fast_essl.photonics.config import load_preset
from fast_essl.photonics.model import CellNet
from fast_essl.resnet import build_backbone

ROOT = Path(__file__).resolve().parents[1]
NARROW_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)
NUM_REPEATS = 3
GROUP = 20
TIME_LIMIT_S = 20
TOLERANCE = 1e-4
"""Largest error of float32, as a share of the largest value; measured: below 3e-6."""
INSTRUCTION_SETS = {
    "SSE41": "sse4_1",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX512_CORE": "avx512f",
    "AVX512_CORE_AMX": "amx_tile",
}
"""Values of ONEDNN_MAX_CPU_ISA, each with the flag in /proc/cpuinfo of a processor that has it."""
EXIT_CODES = {0: "right", 1: "wrong"}


def project_convolutions() -> list[nn.Conv2d]:
    """One of each kind: of all recipes, of narrower ResNets, and of the photonic crystals' network."""
    networks: list[nn.Module] = []
    recipes = [
        path for path in sorted((ROOT / "configs").glob("*.toml")) if not path.stem.startswith("study_")
    ]
    models = [load_config(path).model for path in recipes]
    shapes = {(model.backbone, model.width, model.stem) for model in models}
    shapes |= {(name, width, "imagenet") for name in ("resnet10", "resnet50") for width in NARROW_WIDTHS}
    shapes |= {("resnet10", width, "cifar") for width in NARROW_WIDTHS}
    networks += [build_backbone(name, width=width, stem=stem) for name, width, stem in sorted(shapes)]
    presets = sorted((ROOT / "fast_essl" / "photonics" / "presets").glob("*.toml"))
    channels = {load_preset(path).model.channels for path in presets}
    channels |= {(width, width, width) for width in NARROW_WIDTHS}
    networks += [CellNet(three, 16) for three in sorted(channels)]
    found = {}
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                found.setdefault(describe(module), module)
    return [found[key] for key in sorted(found)]


def describe(convolution: nn.Conv2d) -> str:
    """Such as `3→64 7×7/2`."""
    rows, stride = convolution.kernel_size[0], convolution.stride[0]
    groups = f" groups {convolution.groups}" if convolution.groups > 1 else ""
    return f"{convolution.in_channels}→{convolution.out_channels} {rows}×{rows}/{stride}{groups}"


def check(convolution: nn.Conv2d) -> bool:
    """Whether outputs and gradients, channels-last, are those of float64."""
    torch.manual_seed(0)
    is_large = convolution.weight.numel() > 20_000  # float64 has no fast kernel
    images = torch.randn(5 if is_large else 17, convolution.in_channels, *([8, 8] if is_large else [16, 16]))
    return all(_is_near(convolution, images) for _ in range(1 if is_large else NUM_REPEATS))


def _is_near(convolution: nn.Conv2d, images: torch.Tensor) -> bool:
    results = []
    for dtype in (torch.float32, torch.float64):
        module = convolution.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = images.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        output = module(x)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(
            output, (x, *module.parameters()), torch.randn(output.shape).to(output)
        )
        results.append([tensor.detach().double() for tensor in (output, *gradients)])
    return all(
        bool((found - right).abs().max() <= TOLERANCE * right.abs().max())
        for found, right in zip(*results, strict=True)
    )


def outcomes_of(convolutions: list[nn.Conv2d], num_threads: int) -> dict[str, str]:
    """{convolution: outcome}; groups of them share a process, and those of a group that is not right get one each."""
    outcomes = {}
    for start in range(0, len(convolutions), GROUP):
        group = convolutions[start : start + GROUP]
        together = outcome(group, num_threads)
        for convolution in group:
            what = "right" if together == "right" else outcome([convolution], num_threads)
            outcomes[describe(convolution)] = what
        if together != "right" and all(outcomes[describe(convolution)] == "right" for convolution in group):
            outcomes[describe(group[0])] = f"{together} with the {len(group) - 1} after it"
    return outcomes


def outcome(convolutions: list[nn.Conv2d], num_threads: int) -> str:
    """`right`, `wrong`, `crashed` or `hung`, found in a child process; torch has started no thread before."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(num_threads)
        os._exit(0 if all(map(check, convolutions)) else 1)
    deadline = time.monotonic() + TIME_LIMIT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return EXIT_CODES.get(os.waitstatus_to_exitcode(status), "crashed")
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.002)


def scan_here(num_threads: int) -> dict[str, str]:
    """{convolution: outcome} with this process's environment, the control's under `control`."""
    torch.set_num_threads(1)
    check(nn.Conv2d(1, 1, 1))  # imports what torch imports at first use, once for all child processes
    outcomes = outcomes_of(project_convolutions(), num_threads)
    strided = [nn.Conv2d(channels, 2 * channels, 1, 2, bias=False) for channels in range(1, 16)]
    bad = [f"{name} {what}" for name, what in outcomes_of(strided, num_threads).items() if what != "right"]
    return {**outcomes, "control": ", ".join(bad) or "right"}


def scan(instruction_set: str, num_threads: int) -> dict[str, str]:
    """`scan_here` in a new interpreter, with oneDNN held to an instruction set and the heap checked."""
    environment = {**os.environ, "MALLOC_CHECK_": "3", "LD_PRELOAD": "libc_malloc_debug.so.0"}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to other processes
    environment["PYTHONPATH"] = str(ROOT)
    if instruction_set != "default":
        environment["ONEDNN_MAX_CPU_ISA"] = instruction_set
    command = [sys.executable, __file__, "--here", str(num_threads)]
    answer = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    result: dict[str, str] = json.loads(answer.stdout)
    return result


def instruction_sets() -> list[str]:
    """What oneDNN can be held to on this processor, and its own choice."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return [name for name, flag in INSTRUCTION_SETS.items() if flag in flags] + ["default"]


def scan_all() -> Iterator[dict[str, Any]]:
    """One row a setting: instruction set, threads, counts of outcomes, what was not right, the control."""
    for instruction_set in instruction_sets():
        for num_threads in (1, 2):
            outcomes = scan(instruction_set, num_threads)
            control = outcomes.pop("control")
            yield {
                "isa": instruction_set,
                "threads": num_threads,
                "counts": Counter(outcomes.values()),
                "bad": {name: what for name, what in outcomes.items() if what != "right"},
                "control": control,
            }


def main() -> int:
    """Print the table, or with --here the outcomes of this process as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(scan_here(arguments.here)))
        return 0
    print(f"torch {torch.__version__}")
    print(
        f"{'oneDNN up to':<16} threads  right  wrong  crashed  hung  control: strided 1×1 of 1 to 15 channels"
    )
    bad = []
    for row in scan_all():
        counts = row["counts"]
        print(
            f"{row['isa']:<16} {row['threads']:>7}  {counts['right']:>5}  {counts['wrong']:>5}  "
            f"{counts['crashed']:>7}  {counts['hung']:>4}  {row['control']}",
            flush=True,
        )
        if row["bad"]:
            bad.append(f"{row['isa']}, {row['threads']} threads: {row['bad']}")
    print("\n".join(bad) or "all right")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
