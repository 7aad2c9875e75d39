"""The paper's evaluation protocols, on augmented images through the loaders: linear probe and fine-tuning.

`evaluate.linear_probe` on pre-computed features is the fast way to a similar number; these are the published ones.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fast_essl import records
from fast_essl.config import Config, ConfigError
from fast_essl.errors import NonFiniteLossError
from fast_essl.evaluate import top_accuracy
from fast_essl.evaluate_run import (
    count_classes,
    load_run,
    open_split,
    resolve_device,
    use_threads,
    weights_and_images,
)
from fast_essl.optim import LARS, set_learning_rates
from fast_essl.resnet import ResNet
from fast_essl.schedule import learning_rate_share
from fast_essl.staging import to_device
from loaders.images import open_beton
from loaders.manifest import check_opening
from loaders.order import epoch_order
from loaders.recipe import Recipe
from loaders.views import resolve_view_stage

PROBE = "probe.json"
IMAGE_FIELDS = ("size", "scale", "center_fraction", "interpolation")
"""Fields of [probe] that fine-tuning shares."""
_SUBSET_EPOCH = 2**32 - 1
"""Draws the order in which labels are given out; no run has so many epochs."""


def probe_run(
    run_dir: Path,
    *,
    overrides: list[str] | None = None,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> dict[str, Any]:
    """The linear probe: a linear classifier on the frozen backbone of a run, by SGD on augmented images.

    Returns: `step` of the checkpoint, digests of the weights and images `measured`, `protocol` (the section [probe]),
    a `checksum` of the rest, `num_train`, `num_test`, and `top1`, `top5` as
    n, mean, sample standard deviation and values of the fits, shares of 1; also written to probe.json in its folder.
    Errors: `ConfigError`, `DataError`, before the first step; `NonFiniteLossError` for a fit that diverged.
    Source: paper, section 4; its official release's `eval_loop` (CIFAR-10) and `linear_probe.py` (ImageNet).
    """
    records.refuse_irregular(run_dir / PROBE)
    config, backbone, step = load_run(run_dir, overrides)
    device, _ = resolve_device(config)
    probe = config.probe
    measured = weights_and_images(config, backbone)
    backbone = _on(device, backbone).eval().requires_grad_(False)

    def fit(seed: int) -> Callable[[Tensor], Tensor]:
        classifier = _classifier(config, backbone, seed).to(device)
        rate = probe.base_learning_rate * probe.batch_size / 256
        group = {"params": list(classifier.parameters()), "peak_learning_rate": rate, "scheduled": True}
        optimizer: torch.optim.Optimizer
        if probe.optimizer == "lars":
            # The bias is adapted like the weight, as in the SimSiam paper's probe.
            optimizer = LARS([group], lr=rate, momentum=probe.momentum, weight_decay=probe.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                [group], lr=rate, momentum=probe.momentum, weight_decay=probe.weight_decay
            )

        def logits(images: Tensor) -> Tensor:
            with torch.no_grad():
                features = backbone(images)
            # In fp32: a rate of 30 moves weights by steps that fewer bits would round away.
            with torch.autocast(device.type, enabled=False):
                return classifier(features.float())

        loader = open_split(
            config, "train", (_train_recipe(config),), shuffle=True, batch_size=probe.batch_size, seed=seed
        )
        with contextlib.closing(loader):
            _train(config, loader, logits, optimizer, probe.epochs, probe.schedule == "epoch", show_progress)
        return logits

    fits = _fits(config, probe.num_fits, fit, say)
    result = {"step": step, "measured": measured, "protocol": asdict(probe), **fits}
    return _write(run_dir / PROBE, result)


def finetune_run(
    run_dir: Path,
    *,
    overrides: list[str] | None = None,
    say: Callable[[str], None] = print,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Semi-supervised fine-tuning: a run's backbone and a linear classifier, trained on a share of the labels.

    Returns: as `probe_run`, with `protocol` the section [finetune], `images` the fields of [probe] that say what was
    cut, and `num_labelled`; also written to finetune-<label_share>.json in the run's folder. The run itself stays as
    it is.
    Errors: `ConfigError`, `DataError`, before the first step; `NonFiniteLossError` for a fit that diverged.
    Source: paper, section 4, after Zbontar et al., ICML 2021; BatchNorm is trained, too.
    """
    config, pretrained, step = load_run(run_dir, overrides)
    device, _ = resolve_device(config)
    settings = config.finetune
    path = run_dir / f"finetune-{settings.label_share:g}.json"
    records.refuse_irregular(path)
    labels = open_beton(config.data.train).labels
    num_labelled = len(labelled_subset(labels, share=settings.label_share, seed=config.train.seed))
    batch_size = min(settings.batch_size, num_labelled)
    if batch_size < 2:
        raise ConfigError(
            f"finetune: a batch of {batch_size} ({num_labelled} labels): must be 2 or more, BatchNorm needs another "
            "sample; give a larger finetune.batch_size or finetune.label_share"
        )
    say(f"{run_dir}: {num_labelled} of {len(labels)} labels, {batch_size} a batch")

    def fit(seed: int) -> Callable[[Tensor], Tensor]:
        backbone = _on(device, copy.deepcopy(pretrained)).train()
        classifier = _classifier(config, backbone, seed).to(device)
        groups = []
        for module, base in (
            (backbone, settings.base_learning_rate_backbone),
            (classifier, settings.base_learning_rate_classifier),
        ):
            rate = base * settings.batch_size / 256
            groups.append(
                {"params": list(module.parameters()), "peak_learning_rate": rate, "scheduled": True}
            )
        optimizer = torch.optim.SGD(
            groups, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        model = nn.Sequential(backbone, classifier)
        loader = open_split(
            config,
            "train",
            (_train_recipe(config),),
            shuffle=True,
            batch_size=batch_size,
            seed=seed,
            subset=labelled_subset(labels, share=settings.label_share, seed=seed),
        )
        with contextlib.closing(loader):
            _train(config, loader, model, optimizer, settings.epochs, True, show_progress)
        return model.eval()

    fits = _fits(config, settings.num_fits, fit, say)
    images = {name: getattr(config.probe, name) for name in IMAGE_FIELDS}
    result = {
        "step": step,
        "measured": weights_and_images(config, pretrained),
        "protocol": asdict(settings),
        "images": images,
        **fits,
        "num_labelled": num_labelled,
    }
    return _write(path, result)


def labelled_subset(labels: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """The samples whose labels are given: this share of each class, rounded, and at least one of it.

    Args: `labels` (N,) class numbers.
    Returns: ascending sample indices, a pure function of the arguments; a smaller share's are among a larger one's.
    """
    order = epoch_order(len(labels), seed=seed, epoch=_SUBSET_EPOCH)
    chosen = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        chosen.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def _train_recipe(config: Config) -> Recipe:
    """The training images of both protocols: a resized crop, flipped with probability 0.5, and no colour."""
    probe, view = config.probe, config.views.view1
    return Recipe(
        size=probe.size,
        scale=probe.scale,
        interpolation=probe.interpolation,
        flip_p=0.5,
        jitter_p=0.0,
        grey_p=0.0,
        mean=view.mean,
        std=view.std,
    )


def _test_recipe(config: Config) -> Recipe:
    """The test images of both protocols: a centred square."""
    probe, view = config.probe, config.views.view1
    return Recipe.evaluation(
        probe.size, probe.center_fraction, mean=view.mean, std=view.std, interpolation=probe.interpolation
    )


def _on(device: torch.device, backbone: ResNet) -> ResNet:
    return backbone.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _classifier(config: Config, backbone: ResNet, seed: int) -> nn.Linear:
    """Initialised as `nn.Linear` is (the release's CIFAR-10 probe)."""
    torch.manual_seed(seed)
    return nn.Linear(backbone.num_features, count_classes(config))


def _train(
    config: Config,
    loader: Any,
    logits_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    per_epoch: bool,
    show_progress: bool,
) -> None:
    """Cross-entropy for so many epochs; a cosine takes the rates to 0, moving each step or once an epoch."""
    device, dtype = resolve_device(config)
    use_threads(config)
    make_views = resolve_view_stage(config.data.view_stage, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    num_steps = num_epochs * len(loader)
    bar = tqdm(
        total=num_steps,
        unit="step",
        disable=not show_progress,
        mininterval=0.5 if sys.stderr.isatty() else 20,
    )
    with bar:
        for epoch in range(num_epochs):
            with contextlib.closing(loader.epoch(epoch)) as batches:
                for number, crops in enumerate(batches):
                    step = epoch * len(loader) + (0 if per_epoch else number)
                    set_learning_rates(optimizer, learning_rate_share(step, num_steps=num_steps))
                    views = make_views(to_device(crops, device), loader.plan.recipes, dtype=dtype)
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                        logits = logits_of(views.views[0])
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(F.cross_entropy(logits.float(), views.labels)).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    bar.update()


@torch.no_grad()
def _test(config: Config, loader: Any, logits_of: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Top-1 and top-5 on the test images. Errors: `NonFiniteLossError`, for NaN is in no order: a label would count."""
    device, dtype = resolve_device(config)
    make_views = resolve_view_stage(config.data.view_stage, device)
    logits, labels = [], []
    with contextlib.closing(loader.epoch(0)) as batches:
        for crops in batches:
            views = make_views(to_device(crops, device), loader.plan.recipes, dtype=dtype)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                logits.append(logits_of(views.views[0]).float())
            labels.append(views.labels)
    scores, classes = torch.cat(logits), torch.cat(labels)
    if not bool(scores.isfinite().all()):
        raise NonFiniteLossError(
            "the fit diverged: logits of the test images are not finite; lower the learning rate"
        )
    return top_accuracy(scores, classes, 1), top_accuracy(scores, classes, 5)


def _fits(
    config: Config,
    num_fits: int,
    fit: Callable[[int], Callable[[Tensor], Tensor]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    accuracies = []
    # Opened before the first fit: what is wrong with the test images is said before hours of training.
    with contextlib.closing(open_split(config, "test", (_test_recipe(config),), shuffle=False)) as loader:
        for number in range(num_fits):
            accuracies.append(_test(config, loader, fit(config.train.seed + number)))
            top1, top5 = accuracies[-1]
            say(f"fit {number + 1} of {num_fits}: top-1 {top1:.2%}, top-5 {top5:.2%}")
        num_test = loader.num_samples
    spreads = {
        name: _spread(values)
        for name, values in zip(("top1", "top5"), zip(*accuracies, strict=True), strict=True)
    }
    if num_fits > 1:
        say(
            f"top-1 {spreads['top1']['mean']:.2%} ± {100 * spreads['top1']['stdev']:.2f} "
            f"(sample standard deviation of {num_fits} fits)"
        )
    num_train = check_opening(config.data.train).num_samples
    return {"num_train": num_train, "num_test": num_test, **spreads}


def _spread(values: Iterable[float]) -> dict[str, Any]:
    shares = list(values)
    stdev = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return {"n": len(shares), "mean": statistics.fmean(shares), "stdev": stdev, "values": shares}


def _write(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    result = records.sealed(result)
    records.write_json(path, result)
    return result
