"""ResNets that return features (He et al., CVPR 2016), with torchvision's module names.

Bottlenecks stride in their 3×3 convolution, as torchvision's do. The CIFAR stem is one 3×3 convolution of stride 1
without max-pool (Chen et al., SimCLR, ICML 2020, appendix B.9).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Stem = Literal["cifar", "imagenet"]


class SubsamplingConv2d(nn.Conv2d):
    """A strided 1×1 convolution, which on the CPU is the 1×1 convolution of every `stride`-th pixel.

    Both are the same function of the same parameters. oneDNN's gradient of the strided form (torch 2.13, channels-last)
    writes beyond its memory for fewer than 8 input channels with AVX2, fewer than 16 with AVX-512: runs crash or train
    on wrong numbers. `tools/scan_convolutions.py` looks for others of the kind.
    """

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__(num_in, num_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in, H, W) → (N, num_out, ⌈H / stride⌉, ⌈W / stride⌉)."""
        if x.device.type != "cpu":
            return super().forward(x)
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(num_in, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in, H, W) → (N, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; four times as many channels out as in the middle."""

    expansion = 4

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(num_in, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, num_in, H, W) → (N, 4 · width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


def _shortcut(num_in: int, num_out: int, stride: int) -> nn.Sequential | None:
    if num_in == num_out and stride == 1:
        return None
    return nn.Sequential(SubsamplingConv2d(num_in, num_out, stride), nn.BatchNorm2d(num_out))


class ResNet(nn.Module):
    """A ResNet without its classifier: stem, four stages, global average pool."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        width: int = 64,
        stem: Stem = "cifar",
        zero_init_residual: bool = False,
    ) -> None:
        """Build and initialise (He et al., ICCV 2015, fan-out; BatchNorm 1 and 0).

        Args: `depths` blocks of each stage; `width` channels of the first stage, doubled at each further one;
        `zero_init_residual` starts every block as its shortcut (Goyal et al., 2017).
        """
        super().__init__()
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        num_in = width
        for stage, depth in enumerate(depths):
            stage_width = width * 2**stage
            blocks = []
            for number in range(depth):
                blocks.append(block(num_in, stage_width, 2 if stage > 0 and number == 0 else 1))
                num_in = stage_width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = num_in
        """D, the size of the features."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) images → (N, D) features."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


_BACKBONES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def build_backbone(
    name: str, *, width: int = 64, stem: Stem = "cifar", zero_init_residual: bool = False
) -> ResNet:
    """A backbone by name: resnet10, resnet18 or resnet50.

    Errors: `KeyError` for another name.
    """
    block, depths = _BACKBONES[name]
    return ResNet(block, depths, width=width, stem=stem, zero_init_residual=zero_init_residual)
