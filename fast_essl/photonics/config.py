"""The typed configuration of the photonics experiment: cells, labels, pretraining, fine-tuning, study.

One TOML file holds all of it, as the presets do; each command takes its sections and any override of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from fast_essl.config import ConfigError, MethodConfig, OptimizerConfig, TrainConfig, TransformationConfig
from fast_essl.config_io import load_settings
from fast_essl.limits import (
    MAX_BATCH_SIZE,
    MAX_DECAY,
    MAX_EPOCHS,
    MAX_RATE,
    MAX_SEED,
    MAX_STEPS,
    MAX_THREADS,
    MAX_WIDTH,
    MIN_RATE,
    require,
    require_range,
)
from fast_essl.nearest import proposal
from fast_essl.photonics.cells import CellsConfig
from fast_essl.photonics.generate import MAX_CELLS, CountsConfig
from fast_essl.photonics.solver import SolverConfig

Row = Literal["none", "simclr", "simclr_poor", "e_simclr"]
ROWS: dict[str, str] = {
    "none": "no pretraining",
    "simclr": "SimCLR",
    "simclr_poor": "SimCLR, transformation as augmentation",
    "e_simclr": "E-SimCLR",
}
"""The rows of the paper's table, by the names that commands take."""
PRESETS = Path(__file__).resolve().parent / "presets"


@dataclass(frozen=True, kw_only=True)
class CellDataConfig:
    """Where the cells are."""

    file: Path
    """The HDF5 file of `fast-essl photonics generate`, relative to the working directory."""


@dataclass(frozen=True, kw_only=True)
class CellModelConfig:
    """The paper's CNN and what stands on it."""

    channels: tuple[int, int, int] = (64, 256, 256)
    """Of the convolutions, which have kernel 7 and are followed by max-pooling of 2, 4 and 4."""
    hidden: int = 1024
    """Width of the two linear layers; the second gives the features."""
    projector_hidden: int = 512
    """Width of the projector's two hidden layers, and of the prediction head's."""
    projector_out: int = 256
    """Size of the embedding."""
    predictor: tuple[int, ...] = (1024, 1024, 512)
    """Widths of the hidden layers between the features and the density of states."""

    def __post_init__(self) -> None:
        require_range(self, "channels hidden projector_hidden projector_out predictor", 1, MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What the views of a cell differ by, and the cells in fine-tuning: moves that the density of states ignores."""

    flips: bool = True
    """As it is, mirrored top to bottom, or left to right."""
    rotations: bool = True
    """By a multiple of 90°."""
    translations: bool = False
    """By any number of pixels, periodically."""


@dataclass(frozen=True, kw_only=True)
class DosFinetuneConfig:
    """Fine-tuning of the whole network on labelled cells: Adam, mean squared error."""

    num_labels: int = 3000
    """Labelled cells to train on, drawn by the seed; those of a smaller number are among those of a larger one."""
    epochs: int = 100
    """Passes over them (paper: 100)."""
    min_steps: int = 0
    """At least so many steps, with more epochs where the labels are few."""
    batch_size: int = 64
    """Cells a step (official release: 64)."""
    learning_rate: float = 1e-4
    """Of Adam (official release: 1e-4)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Whether the rate stays (official release), or falls to 0 in a half cosine, each step."""
    weight_decay: float = 1e-5
    """L2 penalty (official release: 1e-5)."""

    def __post_init__(self) -> None:
        require(
            self,
            "num_labels",
            self.num_labels >= 1,
            "1 or more: without labelled cells nothing can be fitted",
        )
        require_range(self, "num_labels", 1, MAX_CELLS)
        require_range(self, "epochs", 1, MAX_EPOCHS)
        require_range(self, "batch_size", 1, MAX_BATCH_SIZE)
        require_range(self, "min_steps", 0, MAX_STEPS)
        require_range(self, "learning_rate", MIN_RATE, MAX_RATE)
        require_range(self, "weight_decay", 0, MAX_DECAY)


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The paper's table: all rows, over seeds and numbers of labels."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """A seed is a run of its own: pretraining, choice of labels, fine-tuning."""
    num_labels: tuple[int, ...] = (100, 300, 1000, 3000)
    """Numbers of labelled cells."""
    workers: int = 0
    """Runs at a time, each in a process of its own; 0 means one a core on a CPU, and one on a GPU."""

    def __post_init__(self) -> None:
        distinct = len(set(self.seeds)) == len(self.seeds) > 0
        inside = distinct and 0 <= min(self.seeds) <= max(self.seeds) <= MAX_SEED
        require(self, "seeds", inside, f"different numbers of 0 or more, at most {MAX_SEED:,}")
        distinct = len(set(self.num_labels)) == len(self.num_labels) > 0
        require(self, "num_labels", distinct and min(self.num_labels) >= 1, "different numbers of 1 or more")
        require_range(self, "num_labels", 1, MAX_CELLS)
        require_range(self, "workers", 0, MAX_THREADS)


_USED_FIELDS = {
    "method": {"contrastive_loss", "contrastive_backend", "temperature", "equivariance_weight"},
    "transformation": {
        "equivariance",
        "equivariance_elements",
        "invariance",
        "invariance_elements",
    },
    "train": {
        "epochs",
        "max_steps",
        "batch_size",
        "seed",
        "device",
        "precision",
        "num_threads",
        "log_every",
        "knn_every",
        "checkpoint_every",
        "compile",
    },
}
"""Of the sections shared with images, what cells use; the other fields have to stay as they are."""


@dataclass(frozen=True, kw_only=True)
class PhotonicsConfig:
    """Everything that defines the experiment."""

    data: CellDataConfig
    """Where the cells are."""
    cells: CellsConfig = field(default_factory=CellsConfig)
    """Which cells."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """How their labels are computed."""
    counts: CountsConfig = field(default_factory=CountsConfig)
    """How many cells."""
    model: CellModelConfig = field(default_factory=CellModelConfig)
    """The network."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """What the features are to be invariant to."""
    transformation: TransformationConfig = field(
        default_factory=lambda: TransformationConfig(equivariance="cyclic_translations")
    )
    """What they are to be sensitive to; or, as one augmentation more, not."""
    method: MethodConfig = field(
        default_factory=lambda: MethodConfig(
            contrastive_loss="nt_xent", temperature=0.1, equivariance_weight=5.0
        )
    )
    """The losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule of pretraining."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(knn_every=0))
    """Length, batches, device, seed of pretraining."""
    finetune: DosFinetuneConfig = field(default_factory=DosFinetuneConfig)
    """Fine-tuning."""
    study: StudyConfig = field(default_factory=StudyConfig)
    """The table."""

    def __post_init__(self) -> None:
        if self.train.knn_every:
            raise ValueError(f"train.knn_every = {self.train.knn_every}: must be 0; cells have no classes")
        for section, used in _USED_FIELDS.items():
            values = getattr(self, section)
            for item in fields(values):
                value = getattr(values, item.name)
                if item.name not in used and value != item.default:
                    raise ValueError(
                        f"{section}.{item.name} = {value!r}: must be {item.default!r}; it has no use for cells"
                    )
        if self.optimizer.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs = {self.optimizer.warmup_epochs}: must be at most "
                f"train.epochs = {self.train.epochs}"
            )


def load_preset(name: Path, overrides: list[str] | None = None) -> PhotonicsConfig:
    """A preset by its name, or a TOML file of one's own.

    Errors: `ConfigError` naming the presets; `OSError`.
    """
    path = name
    if not name.suffix and not name.exists():
        path = PRESETS / f"{name}.toml"
        if not path.exists():
            known = sorted(preset.stem for preset in PRESETS.glob("*.toml"))
            raise ConfigError(
                f"{name}: neither a file nor a preset of photonics; the presets are {', '.join(known)}"
                f"{proposal(str(name), known)}"
            )
    return load_settings(PhotonicsConfig, path, overrides)


def of_row(config: PhotonicsConfig, row: Row, seed: int) -> PhotonicsConfig:
    """The configuration of one row of the table: the presets' own is that of E-SimCLR."""
    assert row in get_args(Row)
    transformation, weight = config.transformation, config.method.equivariance_weight
    if weight == 0:
        raise ConfigError("method.equivariance_weight = 0.0: must be above 0 for the study's row E-SimCLR")
    if row != "e_simclr":
        weight = 0.0
    if row == "simclr_poor":
        transformation = dataclasses.replace(
            transformation,
            invariance=transformation.equivariance,
            invariance_elements=transformation.equivariance_elements,
        )
    return dataclasses.replace(
        config,
        transformation=transformation,
        method=dataclasses.replace(config.method, equivariance_weight=weight),
        train=dataclasses.replace(config.train, seed=seed),
    )
