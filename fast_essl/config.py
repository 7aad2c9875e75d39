"""The typed configuration of a run; every default stands here. `config_io` reads it from files and overrides.

A value out of range is a `ValueError` that begins with the field's name, as `size = 0: must be …`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from fast_essl import limits
from fast_essl.config_commands import FinetuneConfig, ProbeConfig, SpeedrunConfig
from fast_essl.limits import require as _require
from fast_essl.limits import require_range as _require_range
from loaders.recipe import MAX_SIDE, Interpolation, Recipe


class ConfigError(Exception):
    """A bad configuration; the message is one line that names the source, the key, the value and what to do."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are read."""

    train: Path
    """The `.beton` file to pretrain on, relative to the working directory; also the bank of the evaluations."""
    test: Path
    """The `.beton` file that evaluations score on."""
    loader: Literal["ffcv", "dali", "device", "torch"] = "ffcv"
    """Which loader reads the files; `device` keeps small images of one size on the training device and cuts there."""
    num_workers: int = 0
    """Threads (ffcv, dali) or processes (torch) of the loader, at most 1,024; 0 means all cores."""
    dali_decoder: Literal["auto", "cpu", "mixed"] = "auto"
    """Where DALI decodes and cuts: `mixed` with nvJPEG on the GPU, `cpu`; `auto` follows the training device."""
    view_stage: Literal["auto", "reference", "cpu", "cuda"] = "auto"
    """Implementation of the view stage; `auto` takes the fastest one of the training device."""

    def __post_init__(self) -> None:
        _require_range(self, "num_workers", 0, limits.MAX_THREADS)


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The recipes of the two views, of the crop that is transformed, and of evaluation."""

    view1: Recipe
    """First view of the SSL loss."""
    view2: Recipe
    """Second view of the SSL loss."""
    transformed: Recipe
    """Crop that is transformed in all ways; not cut when the equivariance weight is 0."""
    eval_size: int = 32
    """Side of the evaluation image, pixels."""
    eval_center_fraction: float = 1.0
    """Side of the centred square that evaluation keeps, share of the shorter image side (ImageNet: 224/256)."""
    eval_interpolation: Interpolation = "bilinear"
    """Filter of the evaluation resize."""
    sizes: tuple[int, ...] = ()
    """Sides of both views, stage by stage, pixels, the last one theirs; none means one stage. Blur stays in pixels."""
    size_epochs: tuple[int, ...] = ()
    """The epochs, counted from 0, that the stages after the first begin with."""

    def __post_init__(self) -> None:
        _require(self, "eval_size", 1 <= self.eval_size <= MAX_SIDE, f"from 1 to {MAX_SIDE} pixels")
        _require(self, "eval_center_fraction", 0 < self.eval_center_fraction <= 1, "above 0 and at most 1")
        last = {self.view1.size, self.view2.size}
        _require(
            self,
            "sizes",
            not self.sizes
            or (1 <= min(self.sizes) <= max(self.sizes) <= MAX_SIDE and {self.sizes[-1]} == last),
            f"from 1 to {MAX_SIDE} pixels, the last one both views' size, {' and '.join(map(str, sorted(last)))}",
        )
        begins = (0, *self.size_epochs)
        ascending = all(before < after for before, after in pairwise(begins))
        _require(
            self,
            "size_epochs",
            ascending and len(begins) == max(1, len(self.sizes)),
            "ascending epochs above 0, one less than the sizes",
        )

    def evaluation(self) -> Recipe:
        """The deterministic recipe of kNN and linear probe, normalised as the first view."""
        return Recipe.evaluation(
            self.eval_size,
            self.eval_center_fraction,
            mean=self.view1.mean,
            std=self.view1.std,
            interpolation=self.eval_interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone, projector and predictor."""

    backbone: Literal["resnet10", "resnet18", "resnet50"] = "resnet18"
    """Architecture of the backbone (He et al., 2016); resnet10 has one block a stage."""
    width: int = 64
    """Channels of the first stage, up to 1,024; the paper's ResNets have 64."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """`cifar`: 3×3 convolution, no max-pool; `imagenet`: 7×7 of stride 2, then a 3×3 max-pool."""
    zero_init_residual: bool = False
    """Whether the last BatchNorm of each block starts at 0 (the paper's ImageNet runs)."""
    projector_layers: int = 2
    """Linear layers of the projector (official release: 2 for CIFAR-10)."""
    projector_hidden: int = 2048
    """Width of the projector's hidden layers."""
    projector_out: int = 2048
    """Size of the embedding."""
    projector_norm: Literal["plain", "affine", "none"] = "plain"
    """BatchNorm after the projector's last layer: without affine, with it (SimCLR, ImageNet), none (Barlow Twins)."""
    predictor_hidden: int = 512
    """Width of SimSiam's predictor (official release: 512)."""

    def __post_init__(self) -> None:
        _require_range(self, "width", 1, 1024)
        _require_range(self, "projector_layers", 1, 100)
        _require_range(self, "projector_hidden projector_out predictor_hidden", 1, limits.MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The prediction head."""

    form: Literal["cifar_simclr", "cifar_simsiam", "imagenet"] = "cifar_simclr"
    """Which of the paper's prediction heads."""
    hidden: int = 2048
    """Width of the hidden layers."""
    bottleneck: int = 128
    """Width before the logits of the `imagenet` head (official release: 128 for SimCLR, 256 for the others)."""
    layer_norm: Literal["torch", "triton", "apex"] = "torch"
    """Whose LayerNorm: torch's, the fused kernels with ReLU and loss (CUDA), or apex's `FusedLayerNorm` (CUDA)."""

    def __post_init__(self) -> None:
        _require_range(self, "hidden bottleneck", 1, limits.MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The SSL loss and the equivariance loss."""

    name: Literal["simclr", "simsiam", "barlow_twins"] = "simclr"
    """The SSL method; with an equivariance weight above 0 it is its E-SSL variant."""
    contrastive_loss: Literal["info_nce", "nt_xent"] = "info_nce"
    """SimCLR's loss: cross-view negatives alone (the paper's), or all others of the batch (Chen et al., 2020)."""
    contrastive_backend: Literal["torch", "triton"] = "torch"
    """Whose InfoNCE: torch's, or the fused kernel, which keeps no similarities in memory (CUDA)."""
    temperature: float = 0.5
    """Temperature of the contrastive loss, 0.0001 to 10,000 (paper: 0.5 on CIFAR-10, 0.2 on ImageNet)."""
    off_diagonal_weight: float = 0.0051
    """Weight of Barlow Twins' redundancy term (Zbontar et al., 2021)."""
    equivariance_weight: float = 0.4
    """λ in L = L_ssl + λ · L_equivariance (paper, section 3); 0 is the plain SSL baseline."""
    passes: Literal["separate", "joint_views", "joint_all"] = "separate"
    """Inputs that pass the backbone together and share BatchNorm's statistics: none (the paper's), the two views, or
    the transformed copies, too; these must then be of the views' size."""
    online_classifier: bool = False
    """Whether to train a linear classifier on detached features beside the method (the paper's ImageNet runs)."""

    def __post_init__(self) -> None:
        _require(
            self,
            "contrastive_backend",
            self.contrastive_backend == "torch"
            or (self.name, self.contrastive_loss) == ("simclr", "info_nce"),
            "'torch' with another loss than SimCLR's info_nce",
        )
        # Similarities, divided by it, are exponents.
        _require_range(self, "temperature", 1e-4, 1e4)
        _require_range(self, "off_diagonal_weight equivariance_weight", 0, limits.MAX_WEIGHT)


@dataclass(frozen=True, kw_only=True)
class TransformationConfig:
    """What the features are to be sensitive to, and what insensitive; names of `fast_essl.transformations`.

    A transformation of one's own is named as `file.py:function`.
    """

    equivariance: str = "four_fold_rotation"
    """Transformation of the third crop that the prediction head tells."""
    equivariance_elements: tuple[int, ...] = ()
    """Numbers of the elements to use, in the order of their labels; none means all."""
    equivariance_copies: Literal["all", "one"] = "all"
    """Whether a step sees the third crop of each sample in all ways (the paper's), or in one drawn for it."""
    invariance: str = "none"
    """Transformation of which each of the two views gets a random element, as one augmentation more."""
    invariance_elements: tuple[int, ...] = ()
    """As `equivariance_elements`."""

    def __post_init__(self) -> None:
        # Which of them there are is known when the transformation is built.
        _require_range(self, "equivariance_elements invariance_elements", 0, limits.MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule: linear warm-up from 0, then a cosine."""

    name: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS (You et al., 2017; the paper's ImageNet runs of SimCLR and Barlow Twins)."""
    backend: Literal["torch", "apex"] = "torch"
    """Whose implementation: torch's (LARS: our own), or apex's `FusedSGD`."""
    base_learning_rate: float = 0.06
    """Peak learning rate for 256 samples a batch; times batch_size / 256 (official release: 0.03, with λ > 0 0.06)."""
    base_learning_rate_biases: float = 0.0
    """The same for biases and norms (official release: 0.0048 for Barlow Twins); 0 means as the weights."""
    final_learning_rate: float = 0.0
    """Where the cosine ends, share of the peak."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up."""
    schedule: Literal["step", "epoch"] = "step"
    """Whether the learning rate moves each step, or once an epoch (the official release's SimSiam on ImageNet)."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 5e-4
    """L2 penalty, at most 1,000 (official release: 5e-4 on CIFAR-10)."""
    decay_biases: bool = True
    """Whether the penalty includes biases and norms (official release: with SGD it does, with LARS not)."""
    trust_coefficient: float = 0.001
    """LARS: share of a weight's norm that a step of rate 1 moves it by."""

    def __post_init__(self) -> None:
        _require_range(self, "base_learning_rate", limits.MIN_RATE, limits.MAX_RATE)
        _require_range(self, "base_learning_rate_biases", 0, limits.MAX_RATE)
        _require_range(self, "weight_decay", 0, limits.MAX_DECAY)
        _require(self, "final_learning_rate", 0 <= self.final_learning_rate <= 1, "in [0, 1]")
        _require_range(self, "warmup_epochs", 0, limits.MAX_EPOCHS)
        _require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _require_range(self, "trust_coefficient", limits.MIN_RATE, limits.MAX_RATE)
        _require(self, "backend", self.backend == "torch" or self.name == "sgd", "'torch' with LARS")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches, on what, and what is written down on the way."""

    epochs: int = 800
    """Passes over the training images; the schedule's length (official release: 800)."""
    max_steps: int = 0
    """Stop after so many steps, the schedule unchanged; 0 runs all epochs. A larger value later continues the run."""
    batch_size: int = 512
    """Samples a step over all ranks (official release: 512); the last, smaller batch of an epoch is dropped."""
    accumulate: int = 1
    """Micro-batches a step, one after the other on the device, for a batch that does not fit; the losses stay those of
    the whole batch, BatchNorm sees a micro-batch."""
    sync_batch_norm: bool = True
    """With several ranks: whether BatchNorm's statistics are those of all ranks (the paper), or each rank's own."""
    seed: int = 0
    """Of initialisation, sample order and augmentations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` takes CUDA where there is a device."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; `auto` is bf16 (fp16 on older devices) on CUDA and fp32 on the CPU."""
    num_threads: int = 0
    """CPU threads of torch, at most 1,024; 0 means all cores."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl; only these steps wait for the device."""
    knn_every: int = 10
    """Epochs between online kNN evaluations; 0 never evaluates."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end and on Ctrl-C or SIGTERM."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """Mode of torch.compile for the backbone; `reduce-overhead` replays it as CUDA graphs."""
    init_from: str = ""
    """A checkpoint whose backbone the run starts from: of fast_essl or of the official release; empty for none."""

    def __post_init__(self) -> None:
        _require_range(self, "epochs", 1, limits.MAX_EPOCHS)
        _require_range(self, "max_steps", 0, limits.MAX_STEPS)
        _require_range(self, "log_every checkpoint_every", 1, limits.MAX_STEPS)
        _require_range(self, "knn_every", 0, limits.MAX_EPOCHS)
        _require_range(self, "num_threads", 0, limits.MAX_THREADS)
        # BatchNorm and negatives need another sample.
        _require_range(self, "batch_size", 2, limits.MAX_BATCH_SIZE)
        _require_range(self, "accumulate", 1, limits.MAX_BATCH_SIZE)
        divides = self.batch_size % self.accumulate == 0 and self.batch_size // self.accumulate >= 2
        wanted = f"a divisor of batch_size = {self.batch_size} that leaves 2 samples or more"
        _require(self, "accumulate", divides, wanted)
        _require(
            self,
            "compile",
            self.accumulate == 1 or self.compile in ("none", "default"),
            "'none' or 'default' with accumulate above 1: CUDA graphs give the memory of gradients out anew",
        )
        _require_range(self, "seed", 0, limits.MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    data: DataConfig
    """Which images, and how they are read."""
    views: ViewsConfig
    """Crops and augmentations."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone, projector and predictor."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The prediction head."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """The losses."""
    transformation: TransformationConfig = field(default_factory=TransformationConfig)
    """What the features are to be sensitive and insensitive to."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batches, device, logging."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The linear probe of `fast-essl probe`."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """The fine-tuning of `fast-essl finetune`."""
    speedrun: SpeedrunConfig = field(default_factory=SpeedrunConfig)
    """The end of a run of `fast-essl speedrun`."""

    def __post_init__(self) -> None:
        if self.optimizer.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs = {self.optimizer.warmup_epochs}: must be at most "
                f"train.epochs = {self.train.epochs}"
            )
        if self.views.size_epochs and self.views.size_epochs[-1] >= self.train.epochs:
            raise ValueError(
                f"views.size_epochs = {list(self.views.size_epochs)}: must be below train.epochs = "
                f"{self.train.epochs}, or the last size is never reached"
            )
        sizes = [recipe.size for recipe in self.crop_recipes()]
        if self.method.passes == "joint_all" and self.views.sizes:
            raise ValueError("method.passes = 'joint_all': needs inputs of one size; leave views.sizes away")
        num_joint = {"separate": 1, "joint_views": 2, "joint_all": len(sizes)}[self.method.passes]
        if len(set(sizes[:num_joint])) > 1:
            raise ValueError(
                f"method.passes = {self.method.passes!r}: the inputs' sizes {sizes[:num_joint]} must be equal"
            )

    def stage_recipes(self) -> tuple[tuple[Recipe, ...], ...]:
        """`crop_recipes` of each stage of the views' sizes."""
        views, others = self.crop_recipes()[:2], self.crop_recipes()[2:]
        sizes = self.views.sizes or (None,)
        return tuple(
            (*(view if size is None else replace(view, size=size) for view in views), *others)
            for size in sizes
        )

    def crop_recipes(self) -> tuple[Recipe, ...]:
        """What the loader cuts from each image: two views and, for an equivariance weight above 0, the third crop."""
        views = (self.views.view1, self.views.view2)
        return (*views, self.views.transformed) if self.method.equivariance_weight > 0 else views


class RunConfig(Protocol):
    """What the training loop asks of a configuration: a `Config`, or that of another kind of data."""

    @property
    def train(self) -> TrainConfig:
        """Length, batches, device, logging."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Optimizer and schedule."""
