"""The images and the device of a run, and the evaluation of its checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numba
import torch
from torch import nn

from fast_essl import records, run_folder
from fast_essl.checkpoint import load_file, weights_digest
from fast_essl.config import Config, ConfigError, RunConfig
from fast_essl.config_io import load_config
from fast_essl.distributed import num_ranks, rank
from fast_essl.evaluate import evaluate_backbone, extract_features, knn_accuracy
from fast_essl.interchange import load_backbone
from fast_essl.methods import build_method
from fast_essl.ranks import all_or_none, num_cores, ranks_on_this_machine
from fast_essl.resnet import ResNet
from fast_essl.staging import to_device
from loaders import open_loader
from loaders.batch import Views
from loaders.errors import DataError
from loaders.manifest import check_opening
from loaders.recipe import Recipe
from loaders.views import resolve_view_stage

MAX_THREADS_A_CORE = 64
"""With 512 a core, a step of 16 small images took six minutes."""


def resolve_device(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """Where a run, or this rank of it, computes and in which autocast type.

    Errors: `ConfigError` for what this machine cannot do.
    """
    wanted, precision = config.train.device, config.train.precision
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda': there is no CUDA device here; use 'auto' or 'cpu'")
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if precision not in ("auto", "fp32"):
            raise ConfigError(f"train.precision = {precision!r}: needs a CUDA device; use 'auto' or 'fp32'")
        return device, torch.float32
    num_gpus, num_here = torch.cuda.device_count(), ranks_on_this_machine()
    if num_here > num_gpus:
        raise ConfigError(
            f"{num_here} ranks on this machine, but only {num_gpus} of its GPUs can be used: start no more, or set "
            "train.device = 'cpu'"
        )
    if num_ranks() > 1:
        device = torch.device("cuda", torch.cuda.current_device())
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def open_split(
    config: Config,
    split: Literal["train", "test"],
    recipes: tuple[Recipe, ...],
    *,
    shuffle: bool,
    **plan: Any,
) -> Any:
    """Open a split with the configured loader; without `shuffle` every sample once, in order, the last batch short.

    Each rank has its part of every batch. A batch of the loader is a micro-batch where the training accumulates.

    Args: `plan` fields of `EpochPlan` that are to differ from the pretraining's: `batch_size`, `seed`, `subset`.
    Errors: `DataError`; `ConfigError` for what the loader refuses.
    """
    path = config.data.train if split == "train" else config.data.test
    micro_batch_size = config.train.batch_size // config.train.accumulate
    options = {"batch_size": micro_batch_size, "seed": config.train.seed, **plan}
    if config.data.loader == "dali":
        options["decoder"] = dali_decoder(config)
    if config.data.loader == "device":
        options["device"], _ = resolve_device(config)
    try:
        return open_loader(
            config.data.loader,
            path,
            recipes,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=config.data.num_workers or num_cores(),
            rank=rank(),
            num_ranks=num_ranks(),
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"{path}, opened with data.loader = {config.data.loader!r}: {error}") from None


def dali_decoder(config: Config) -> Literal["cpu", "mixed"]:
    """Where DALI decodes: `auto` follows the training device. Errors: `ConfigError` for crops that end up elsewhere."""
    device, _ = resolve_device(config)
    wanted = config.data.dali_decoder
    if wanted == "mixed" and device.type == "cpu":
        raise ConfigError("data.dali_decoder = 'mixed': needs a CUDA device to train on; use 'auto' or 'cpu'")
    if wanted == "auto":
        return "cpu" if device.type == "cpu" else "mixed"
    return wanted


def use_threads(config: RunConfig) -> None:
    """Let torch compute on the configured number of CPU threads, by default one a core of this rank's share.

    Errors: `ConfigError` for so many that they would only wait for each other.
    """
    wanted, most = config.train.num_threads, MAX_THREADS_A_CORE * num_cores()
    if wanted > most:
        raise ConfigError(
            f"train.num_threads = {wanted}: must be at most {most} on the {num_cores()} cores here, or 0 for one a core"
        )
    torch.set_num_threads(wanted or num_cores())
    if num_ranks() > 1:  # the view stage's threads
        numba.set_num_threads(min(num_cores(), numba.config.NUMBA_NUM_THREADS))


def count_classes(config: Config) -> int:
    """Number of classes of both splits, from their manifests.

    Errors: `DataError` when the splits differ in their classes, for then the same label means different things.
    """
    train, test = (check_opening(path).class_names for path in (config.data.train, config.data.test))
    if train != test:
        raise DataError(
            f"{config.data.test}: its classes are not those of {config.data.train}; convert both from one source"
        )
    return len(train)


class EvaluationSplits:
    """Both splits under the evaluation recipe; opened at first use and kept, since FFCV compiles for seconds."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        self._recipes = (config.views.evaluation(),)
        self._loaders: dict[str, Any] = {}

    def batches(self, split: Literal["train", "test"]) -> Iterator[Views]:
        """Every sample of a split once, in order, on the device."""
        if split not in self._loaders:
            loader = open_split(self._config, split, self._recipes, shuffle=False)
            self._loaders[split] = loader
            if loader.num_samples < num_ranks():
                raise DataError(
                    f"the {split} split: {loader.num_samples} samples cannot be dealt to {num_ranks()} ranks; "
                    "train without --train.knn-every"
                )
        make_views = resolve_view_stage(self._config.data.view_stage, self._device)
        with contextlib.closing(self._loaders[split].epoch(0)) as batches:
            for crops in batches:
                yield make_views(to_device(crops, self._device), self._recipes)

    def knn_top1(self, backbone: nn.Module) -> float:
        """Top-1 of plain kNN: the online evaluation. Each rank sees its part of both splits; all have the answer."""
        with all_or_none():
            bank, bank_labels = extract_features(backbone, self.batches("train"))
            queries, labels = extract_features(backbone, self.batches("test"))
        return knn_accuracy(bank, bank_labels, queries, labels)

    def close(self) -> None:
        """Close the loaders."""
        for loader in self._loaders.values():
            loader.close()


def load_run(
    run_dir: Path, overrides: list[str] | None = None, *, random_init: bool = False
) -> tuple[Config, ResNet, int]:
    """A run's configuration, its backbone on the CPU as the checkpoint has it, and the step of that.

    Args: `overrides` of the run's configuration, for data that moved or another device; with `random_init` the
    backbone is the one that the run started from, at step 0.
    Errors: `ConfigError` where there is no run, `DataError` for a damaged checkpoint or bad data.
    """
    if not (run_dir / run_folder.CONFIG).is_file() or not (run_dir / run_folder.CHECKPOINT).is_file():
        raise ConfigError(f"{run_dir}: no run with a checkpoint is here; `fast-essl pretrain` makes one")
    config = load_config(run_dir / run_folder.CONFIG, overrides)
    # The names are the same, and apex, if the run had its LayerNorm, need not be here.
    plain = dataclasses.replace(config, head=dataclasses.replace(config.head, layer_norm="torch"))
    method = build_method(plain, num_classes=count_classes(config))
    if random_init:
        if config.train.init_from:
            load_backbone(method.backbone, Path(config.train.init_from))
        return config, method.backbone, 0
    state = load_file(run_dir / run_folder.CHECKPOINT, method=dict, step=int)
    try:
        method.load_state_dict(state["method"])
    except (RuntimeError, TypeError, AttributeError):
        raise ConfigError(
            f"{run_dir}: the checkpoint's network is not the configuration's; leave [model] as it is"
        ) from None
    return config, method.backbone, int(state["step"])


def evaluate_run(
    run_dir: Path, *, overrides: list[str] | None = None, random_init: bool = False
) -> dict[str, Any]:
    """Evaluate a run's backbone: kNN, weighted kNN and the fast linear probe on the test split.

    Args: as `load_run`.
    Returns: `step`, `num_train`, `num_test`, `accuracy`, shares in [0, 1] by the names of `evaluate_backbone`, and
    `measured`, digests of the weights and images with the recipe; also written to evaluation.json in the run's folder,
    or to evaluation-random.json with `random_init`.
    Errors: as `load_run`; `OSError` when it cannot be written.
    """
    loaded = load_run(run_dir, overrides, random_init=random_init)
    return _evaluate_and_write(run_dir / _evaluation_name(random_init), *loaded)


def run_accuracy(run_dir: Path, *, random_init: bool = False) -> dict[str, float]:
    """The accuracy of a run's backbone, or of the one that it started from, measured where that is not done yet.

    An evaluation that is there counts when it is as it was written, and of this step, these weights and these images.

    Errors: as `evaluate_run`.
    """
    loaded = load_run(run_dir, random_init=random_init)
    path = run_dir / _evaluation_name(random_init)
    result = _read_evaluation(path, *loaded)
    return dict((result or _evaluate_and_write(path, *loaded))["accuracy"])


def _evaluation_name(random_init: bool) -> str:
    return run_folder.EVALUATION_RANDOM if random_init else run_folder.EVALUATION


def _evaluate_and_write(path: Path, config: Config, backbone: ResNet, step: int) -> dict[str, Any]:
    records.refuse_irregular(path)
    # First: evaluating moves the backbone to the device and into another memory format.
    measured = _what_is_measured(config, backbone)
    result = records.sealed({"step": step, **_evaluate(config, backbone), "measured": measured})
    records.write_json(path, result)
    return result


def _read_evaluation(path: Path, config: Config, backbone: ResNet, step: int) -> dict[str, Any] | None:
    """What was measured before of this very backbone; None where nothing was."""
    result = records.read_earlier(path)
    if result is None:
        return None
    if not records.is_sealed(result):
        records.remark(f"{path}: of version 0.1.0, or changed since it was written; measured again")
        return None
    wanted = {"step": step, "measured": _what_is_measured(config, backbone)}
    return result if wanted == {name: result.get(name) for name in wanted} else None


def _what_is_measured(config: Config, backbone: ResNet) -> dict[str, Any]:
    recipe = json.loads(json.dumps(dataclasses.asdict(config.views.evaluation())))
    return {**weights_and_images(config, backbone), "recipe": recipe}


def weights_and_images(config: Config, backbone: ResNet) -> dict[str, str]:
    """The digests of what every evaluation depends on. Errors: `DataError` for a bad manifest."""
    return {
        "weights": weights_digest(backbone.state_dict()),
        "train": check_opening(config.data.train).digest,
        "test": check_opening(config.data.test).digest,
    }


def evaluate_file(path: Path, config: Config) -> dict[str, Any]:
    """Evaluate the backbone in a checkpoint of any origin, as `evaluate_run` does; writes nothing.

    Args: `config` describes the network in [model], and names the images.
    Errors: as `load_backbone`.
    """
    backbone = build_method(config, num_classes=count_classes(config)).backbone
    load_backbone(backbone, path)
    return _evaluate(config, backbone)


def _evaluate(config: Config, backbone: ResNet) -> dict[str, Any]:
    device, _ = resolve_device(config)
    use_threads(config)
    backbone = backbone.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with contextlib.closing(EvaluationSplits(config, device)) as splits:
        accuracy = evaluate_backbone(
            backbone,
            splits.batches("train"),
            splits.batches("test"),
            num_classes=count_classes(config),
        )
    num_samples = {name: accuracy.pop(name) for name in ("num_train", "num_test")}
    return {**num_samples, "accuracy": accuracy}
