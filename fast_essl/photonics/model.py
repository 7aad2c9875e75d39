"""The paper's CNN for unit cells, the method on it, and the network that predicts densities of states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast_essl.config import ModelConfig
from fast_essl.heads import PredictionHead, projector
from fast_essl.methods import ESSL, SimCLR
from fast_essl.photonics.config import CellModelConfig, PhotonicsConfig
from fast_essl.photonics.dos import NUM_PREDICTED
from fast_essl.photonics.source import cell_transformations

KERNEL = 7
POOLING = (2, 4, 4)
NUM_LAYERS = 3
"""Linear layers of the projector and of the prediction head."""


class CellNet(nn.Module):
    """Three convolutions, each with BatchNorm, ReLU and max-pooling, and two linear layers.

    Source: official release, `photonics/phc_models.py`.
    """

    def __init__(self, channels: tuple[int, int, int], hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width, pooling in zip(channels, POOLING, strict=True):
            layers += [
                nn.Conv2d(before, width, KERNEL, padding=KERNEL // 2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(pooling),
            ]
            before = width
        self.convolutions = nn.Sequential(*layers)
        self.linear = nn.Sequential(
            nn.Linear(before, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden)
        )
        self.num_features = hidden

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 32, 32) → (N, num_features)."""
        return self.linear(self.convolutions(images).flatten(1))


class DosNet(nn.Module):
    """A backbone and the layers that predict, from its features, the density of states less the empty lattice's."""

    def __init__(self, backbone: CellNet, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        before = backbone.num_features
        for width in widths:
            layers += [nn.Linear(before, width), nn.ReLU(inplace=True)]
            before = width
        self.predictor = nn.Sequential(*layers, nn.Linear(before, NUM_PREDICTED))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 32, 32) → (N, 400)."""
        return self.predictor(self.backbone(images))


def build_cell_net(model: CellModelConfig, seed: int) -> CellNet:
    """The backbone as initialised by a seed, on the CPU."""
    torch.manual_seed(seed)
    return CellNet(model.channels, model.hidden)


def build_dos_net(backbone: CellNet, model: CellModelConfig, seed: int) -> DosNet:
    """A backbone with fresh layers on it, initialised by a seed."""
    torch.manual_seed(seed)
    return DosNet(backbone, model.predictor)


def build_cell_method(config: PhotonicsConfig) -> ESSL:
    """SimCLR or E-SimCLR on cells, initialised from the configuration's seed, on the CPU.

    Errors: `ConfigError` for a transformation that cannot be built.
    """
    model = config.model
    equivariance, _ = cell_transformations(config.transformation, config.method.equivariance_weight)
    backbone = build_cell_net(model, config.train.seed)
    heads = ModelConfig(
        projector_layers=NUM_LAYERS,
        projector_hidden=model.projector_hidden,
        projector_out=model.projector_out,
        projector_norm="none",
    )
    ssl = SimCLR(heads, config.method, backbone.num_features)
    head = None
    # Made last: a method and its E-SSL variant start from the same backbone and projector for the same seed.
    if equivariance is not None:
        # The official release's head has the projector's form.
        layers = projector(
            backbone.num_features,
            hidden=model.projector_hidden,
            out=equivariance.num_elements,
            num_layers=NUM_LAYERS,
            norm="none",
        )
        head = PredictionHead(*layers, backend="torch")
    return ESSL(backbone, ssl, equivariance_weight=config.method.equivariance_weight, head=head)
