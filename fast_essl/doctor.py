"""What is installed, what this machine has, which implementations the defaults choose, and whether files fit."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import torch

from fast_essl.config import Config, ConfigError, DataConfig, ViewsConfig
from fast_essl.evaluate_run import resolve_device
from fast_essl.kernels import require_kernels
from fast_essl.nvidia_apex import is_nvidias
from fast_essl.optim import sgd_form
from loaders.beton import IMAGE_RAW, read_tables
from loaders.errors import DataError
from loaders.machine import free_memory_bytes, num_cores, total_memory_bytes
from loaders.manifest import check_opening
from loaders.recipe import Recipe
from loaders.views import resolve_view_stage

_GIB = 2**30
_CHECKOUT = "run `make setup` in the checkout, or see `FFCV by hand` in CONTRIBUTING.md"
_DALI = "pip install 'fast_essl[dali]', or `make setup-dali` in the checkout"
_DALI_WHEELS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
# Name, what it is for, the distributions that bring it, how to install it.
_PACKAGES = (
    ("ffcv", "the default loader", ("ffcv",), _CHECKOUT),
    ("cv2", "imported by ffcv", ("opencv-python-headless", "opencv-python"), _CHECKOUT),
    ("triton", "view stage and kernels of a GPU", ("triton",), "comes with torch's CUDA build"),
    ("matplotlib", "the chart of `fast-essl bench`", ("matplotlib",), "pip install 'fast_essl[chart]'"),
    ("DALI", "the optional loader `dali`", _DALI_WHEELS, _DALI),
    (
        "apex",
        "optimizer.backend = 'apex', head.layer_norm = 'apex'",
        ("apex",),
        "built from https://github.com/NVIDIA/apex (the package called apex on PyPI is another project)",
    ),
)
_NEEDED = ("ffcv", "cv2")
"""Packages without which the defaults do not work."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table."""

    subject: str
    text: str
    good: bool = True
    """False where the default path, or the file, cannot be used as it is."""


def doctor(paths: Sequence[Path] = ()) -> int:
    """Print the table, for people.

    Args: `paths` are `.beton` files to tell about, checked as a loader does when it opens them.
    Returns: 0 when the defaults can train here and every file can be opened, else 1.
    """
    sections = {"installed": installed(), "machine": machine(), "would be used": would_be_used()}
    for path in paths:
        sections[str(path)] = about_file(path, available_bytes=free_memory_bytes())
    num_bad = 0
    for title, findings in sections.items():
        print(title)
        for finding in findings:
            print(f"{' ' if finding.good else '!'} {finding.subject:<15} {finding.text}")
            num_bad += not finding.good
        print()
    if num_bad:
        print(f"{num_bad} of these lines need attention: they begin with !")
    else:
        print("all is well: the defaults can train here")
    return 1 if num_bad else 0


def installed() -> list[Finding]:
    """Versions of the packages; an optional one that is missing is no fault."""
    found = [Finding(subject="python", text=f"{platform.python_version()} ({sys.executable})")]
    found += [
        Finding(subject=name, text=importlib.metadata.version(name)) for name in ("torch", "numpy", "numba")
    ]
    for name, purpose, distributions, how in _PACKAGES:
        version = next(filter(None, map(_version, distributions)), None)
        if version is not None and name == "apex" and not is_nvidias():
            text = f"{version} is PyPI's project of that name, not NVIDIA's; NVIDIA's is {how}"
            found.append(Finding(subject=name, text=text))
        elif version is not None:
            found.append(Finding(subject=name, text=f"{version}, {purpose}"))
        else:
            found.append(Finding(subject=name, text=f"missing ({purpose}): {how}", good=name not in _NEEDED))
    return found


def machine() -> list[Finding]:
    """Cores, memory and GPUs as this process may use them."""
    memory = f"{free_memory_bytes() / _GIB:.1f} GiB free of {total_memory_bytes() / _GIB:.1f} GiB"
    found = [Finding(subject="cores", text=f"{num_cores()}"), Finding(subject="memory", text=memory)]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        text = f"{gpu.name}, {gpu.total_memory / _GIB:.0f} GiB"
        found.append(Finding(subject=f"GPU {index}", text=text))
    if not torch.cuda.is_available():
        found.append(_no_gpu(driver_sees_one=Path("/dev/nvidia0").exists(), cuda_build=torch.version.cuda))
    return found


def _no_gpu(*, driver_sees_one: bool, cuda_build: str | None) -> Finding:
    if not driver_sees_one:
        return Finding(subject="GPU", text="none")
    why = f"for CUDA {cuda_build} cannot use its driver" if cuda_build else "is a build for CPUs"
    return Finding(subject="GPU", text=f"there is one, but the installed torch {why}", good=False)


def would_be_used() -> list[Finding]:
    """What the defaults come to on this machine, and why."""
    crop = Recipe(size=32)
    config = Config(
        data=DataConfig(train=Path(), test=Path()),
        views=ViewsConfig(view1=crop, view2=crop, transformed=crop),
    )
    device, dtype = resolve_device(config)
    precision = f"{str(dtype).removeprefix('torch.')}: what `{config.train.precision}` takes on {device.type}"
    return [
        _loader(config.data.loader),
        *_dali(),
        _view_stage(config.data.view_stage, device),
        Finding(subject="device", text=f"{device.type}: what `{config.train.device}` takes here"),
        Finding(subject="precision", text=precision),
        *_losses(config, device),
        _optimizer(device),
        _threading_layer(),
    ]


def _loader(name: str) -> Finding:
    """Whether the default loader imports: a package may be installed and still lack a system library."""
    try:
        importlib.import_module(f"loaders.{name}_loader")
    except (ImportError, OSError, DataError) as error:
        reason = " ".join(str(error).split())
        text = f"{name} cannot be imported ({reason}); until then use --data.loader torch"
        return Finding(subject="loader", text=text, good=False)
    return Finding(subject="loader", text=f"{name}: the default, and it imports")


def _view_stage(name: str, device: torch.device) -> Finding:
    """Which implementation of the view stage `name` takes."""
    try:
        stage = resolve_view_stage(name, device).__module__.rpartition(".")[2]
    except DataError as error:
        return Finding(subject="view stage", text=str(error), good=False)
    return Finding(subject="view stage", text=f"{stage}: what `{name}` takes on {device.type}")


def _dali() -> list[Finding]:
    """Where DALI would decode, if it is installed: it takes no part in the defaults."""
    if not any(map(_version, _DALI_WHEELS)):
        return []
    try:
        decoder = importlib.import_module("loaders.dali_loader").resolve_decoder("auto")
    except (ImportError, OSError) as error:
        return [Finding(subject="loader dali", text=f"cannot be imported ({' '.join(str(error).split())})")]
    return [Finding(subject="loader dali", text=f"decoder {decoder}: what `auto` takes here, if asked for")]


def _losses(config: Config, device: torch.device) -> list[Finding]:
    """Who computes the prediction head and InfoNCE, and whether the fused kernels could."""
    found = []
    for subject, setting, chosen in (
        ("head", "head.layer_norm", config.head.layer_norm),
        ("InfoNCE", "method.contrastive_backend", config.method.contrastive_backend),
    ):
        try:
            require_kernels(setting, device)
            fused = f"the fused kernels run here, with --{setting} triton"
        except ConfigError as error:
            fused = str(error).partition("; ")[0]
        found.append(Finding(subject=subject, text=f"{chosen}: the default; {fused}"))
    return found


def _optimizer(device: torch.device) -> Finding:
    """Which implementation of SGD the trainer builds. Building one here would import torch's compiler, 1.2 s."""
    fused = sgd_form(device.type == "cuda")["fused"]
    text = "fused: all parameters in one kernel" if fused else "foreach: one kernel a list of parameters"
    return Finding(subject="optimizer", text=f"SGD, {text}")


def _threading_layer() -> Finding:
    """How many threads the trainer has; those of numba are on the layer that `loaders` chooses."""
    layer = numba.config.THREADING_LAYER
    try:
        num_threads = numba.get_num_threads()  # starts the layer
    except ValueError:
        text = f"numba has no layer `{layer}`; on Debian: apt install libgomp1"
        return Finding(subject="threads", text=text, good=False)
    text = f"torch {torch.get_num_threads()}, numba {num_threads} on `{layer}`, thread-safe"
    return Finding(subject="threads", text=text)


def about_file(path: Path, *, available_bytes: int) -> list[Finding]:
    """Facts of a `.beton` file, and whether the page cache can hold it in `available_bytes` of memory."""
    try:
        manifest = check_opening(path)
        tables = read_tables(path)
    except DataError as error:
        return [Finding(subject="cannot be used", text=str(error), good=False)]
    num_raw = int((tables.modes == IMAGE_RAW).sum())
    mean_bytes = tables.data_sizes.mean() if tables.num_samples else 0.0
    kinds = f"{tables.num_samples - num_raw} JPEG, {num_raw} raw"
    if manifest.num_bytes <= available_bytes:
        fits = "yes: after the first epoch it is read from memory"
    else:
        fits = f"no: {available_bytes / _GIB:.1f} GiB are free, so every epoch reads the disk"
    return [
        Finding(
            subject="samples", text=f"{tables.num_samples} in {len(manifest.class_names)} classes ({kinds})"
        ),
        Finding(
            subject="size", text=f"{manifest.num_bytes / 2**20:.1f} MiB, {mean_bytes:.0f} bytes a sample"
        ),
        Finding(subject="fits in memory", text=fits),
    ]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
