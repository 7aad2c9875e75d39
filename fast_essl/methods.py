"""E-SSL methods: an SSL loss on two views plus λ times the equivariance loss on the transformed copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fast_essl.config import Config, ConfigError, MethodConfig, ModelConfig
from fast_essl.heads import PredictionHead, prediction_head, predictor, projector
from fast_essl.kernels import require_kernels
from fast_essl.losses import barlow_twins, classification, info_nce, negative_cosine, nt_xent
from fast_essl.resnet import build_backbone
from fast_essl.transformations import config_transformations
from loaders.batch import Views


@dataclass(frozen=True, kw_only=True)
class MethodOutput:
    """The losses of one batch; scalars on the device. All but `loss` are detached, for the log."""

    loss: Tensor
    """L_ssl + λ · L_equivariance, plus the online classifier's, which moves that alone."""
    ssl_loss: Tensor
    equivariance_loss: Tensor | None
    """None without an equivariance objective, as the next."""
    equivariance_accuracy: Tensor | None
    """Share of the transformed copies whose transformation is told."""
    online_accuracy: Tensor | None
    """Share of the first views whose class the online classifier tells; None without one."""


class SimCLR(nn.Module):
    """Two views of an image are told from those of other images (Chen et al., ICML 2020)."""

    by_sample = False
    """Whether the loss is the mean of what each sample has by itself: then micro-batches need not meet in it."""

    def __init__(self, model: ModelConfig, method: MethodConfig, num_features: int) -> None:
        super().__init__()
        self.projector = _projector(model, num_features)
        self._temperature = method.temperature
        self.embedding_size = model.projector_out
        self.fused = method.contrastive_backend == "triton"
        self._loss: Callable[[Tensor, Tensor, float], Tensor] = (
            info_nce if method.contrastive_loss == "info_nce" else nt_xent
        )

    def embed(self, features1: Tensor, features2: Tensor) -> tuple[Tensor, ...]:
        """(N, D) features of both views → what the loss takes, (N, E) each."""
        return self.projector(features1), self.projector(features2)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """(N, E) embeddings of both views → scalar loss."""
        if self.fused:
            from fast_essl.kernels.info_nce import info_nce_fused

            return info_nce_fused(z1, z2, self._temperature)
        with _full_precision(z1):
            return self._loss(z1.float(), z2.float(), self._temperature)


class SimSiam(nn.Module):
    """One view's embedding predicts the other's, which no gradient reaches (Chen and He, CVPR 2021)."""

    by_sample = True

    def __init__(self, model: ModelConfig, method: MethodConfig, num_features: int) -> None:
        super().__init__()
        self.projector = _projector(model, num_features)
        self.predictor = predictor(model.projector_out, hidden=model.predictor_hidden)

    def embed(self, features1: Tensor, features2: Tensor) -> tuple[Tensor, ...]:
        """(N, D) features of both views → what the loss takes, (N, E) each."""
        z1, z2 = self.projector(features1), self.projector(features2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return p1, p2, z1, z2

    def loss(self, p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        """(N, E) predictions and embeddings of both views → scalar loss."""
        with _full_precision(z1):
            return negative_cosine(p1.float(), p2.float(), z1.float(), z2.float())


class BarlowTwins(nn.Module):
    """The views' embeddings agree in each dimension, and the dimensions differ (Zbontar et al., ICML 2021)."""

    by_sample = False

    def __init__(self, model: ModelConfig, method: MethodConfig, num_features: int) -> None:
        super().__init__()
        self.projector = _projector(model, num_features)
        self._off_diagonal_weight = method.off_diagonal_weight

    def embed(self, features1: Tensor, features2: Tensor) -> tuple[Tensor, ...]:
        """(N, D) features of both views → what the loss takes, (N, E) each."""
        return self.projector(features1), self.projector(features2)

    def loss(self, z1: Tensor, z2: Tensor) -> Tensor:
        """(N, E) embeddings of both views → scalar loss."""
        with _full_precision(z1):
            return barlow_twins(z1.float(), z2.float(), self._off_diagonal_weight)


class ESSL(nn.Module):
    """An SSL method on a backbone, made equivariant to a transformation (Dangovski et al., ICLR 2022)."""

    def __init__(
        self,
        backbone: nn.Module,
        ssl: SimCLR | SimSiam | BarlowTwins,
        *,
        equivariance_weight: float,
        passes: Literal["separate", "joint_views", "joint_all"] = "separate",
        head: PredictionHead | None = None,
        online_classifier: nn.Module | None = None,
    ) -> None:
        """Put the parts together; `head` is None for the plain SSL method."""
        super().__init__()
        self.backbone: Any = backbone  # a ResNet for images
        self.ssl = ssl
        self.head = head
        self.online_classifier = online_classifier
        self.equivariance_weight = equivariance_weight
        self.passes = passes

    def check(self, device: torch.device) -> None:
        """Errors: `ConfigError` for a kernel that is asked for and does not run on the device."""
        if self.head is not None:
            self.head.check(device)
        if isinstance(self.ssl, SimCLR) and self.ssl.fused:
            require_kernels("method.contrastive_backend", device)
            from fast_essl.kernels.checks import check_width

            try:
                check_width(self.ssl.embedding_size)
            except ValueError as error:
                raise ConfigError(f"method.contrastive_backend = 'triton': {error}; use 'torch'") from None

    def constant_rate_parameters(self) -> list[nn.Parameter]:
        """The predictor's, whose learning rate no schedule lowers (SimSiam paper, section 4.3)."""
        return list(self.ssl.predictor.parameters()) if isinstance(self.ssl, SimSiam) else []

    def embed(self, views: Views) -> tuple[Tensor, ...]:
        """What the SSL loss takes of a batch, (N, E) each."""
        features1, features2 = self._features(views, for_ssl_alone=True)[:2]
        return self.ssl.embed(features1, features2)

    def forward(self, views: Views, ssl_loss_of: Callable[..., Tensor] | None = None) -> MethodOutput:
        """The losses of a batch, on the backbone's features of every input.

        Args: `ssl_loss_of` the embeddings stands in for the method's own SSL loss (gradient accumulation).
        """
        features1, features2, *transformed_features = self._features(views)
        ssl_loss = (ssl_loss_of or self.ssl.loss)(*self.ssl.embed(features1, features2))
        loss, equivariance_loss, equivariance_accuracy, online_accuracy = ssl_loss, None, None, None
        if self.head is not None:
            if views.transformed is None or views.transformed_labels is None:
                raise ValueError("equivariance_weight is above 0, but the batch has no transformed copies")
            # With all copies of each sample there, the labels follow from the position, and no kernel reads them.
            complete = len(views.transformed) == self.head.num_classes * len(views.labels)
            equivariance_loss, equivariance_accuracy = self.head.loss(
                transformed_features[0], None if complete else views.transformed_labels
            )
            loss = loss + self.equivariance_weight * equivariance_loss
            equivariance_loss = equivariance_loss.detach()
        if self.online_classifier is not None:
            online_loss, online_accuracy = classification(
                self.online_classifier(features1.detach()), views.labels
            )
            loss = loss + online_loss
        return MethodOutput(
            loss=loss,
            ssl_loss=ssl_loss.detach(),
            equivariance_loss=equivariance_loss,
            equivariance_accuracy=equivariance_accuracy,
            online_accuracy=online_accuracy,
        )

    def _features(self, views: Views, *, for_ssl_alone: bool = False) -> list[Tensor]:
        """Of both views and, where there is a head, of the transformed copies, in as many passes as configured.

        On its own, each input is normalised by its own statistics; together they share them, in fewer, larger kernels.

        Args: `for_ssl_alone` leaves the copies out where the views' features do not depend on them.
        """
        inputs = list(views.views)
        wanted = not for_ssl_alone or self.passes == "joint_all"
        if self.head is not None and views.transformed is not None and wanted:
            inputs.append(views.transformed)
        if self.passes == "separate":
            return [self.backbone(images) for images in inputs]
        num_joint = 2 if self.passes == "joint_views" else len(inputs)
        together, apart = inputs[:num_joint], inputs[num_joint:]
        features = self.backbone(torch.cat(together)).split([len(images) for images in together])
        return [*features, *(self.backbone(images) for images in apart)]


_SSL: dict[str, type[SimCLR] | type[SimSiam] | type[BarlowTwins]] = {
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "barlow_twins": BarlowTwins,
}


def build_method(config: Config, *, num_classes: int) -> ESSL:
    """The configured method, initialised from the configuration's seed, on the CPU.

    Args: `num_classes` of the data, for the online classifier.
    Errors: `ConfigError` for a transformation that cannot be built.
    """
    model, method = config.model, config.method
    equivariance, _ = config_transformations(config)
    torch.manual_seed(config.train.seed)
    backbone = build_backbone(
        model.backbone, width=model.width, stem=model.stem, zero_init_residual=model.zero_init_residual
    )
    ssl = _SSL[method.name](model, method, backbone.num_features)
    head = online_classifier = None
    # Made last: a method and its E-SSL variant start from the same backbone and projector for the same seed.
    if equivariance is not None:
        head = prediction_head(
            backbone.num_features,
            hidden=config.head.hidden,
            form=config.head.form,
            num_classes=equivariance.num_elements,
            bottleneck=config.head.bottleneck,
            backend=config.head.layer_norm,
        )
    if method.online_classifier:
        online_classifier = nn.Linear(backbone.num_features, num_classes)
    return ESSL(
        backbone,
        ssl,
        equivariance_weight=method.equivariance_weight,
        passes=method.passes,
        head=head,
        online_classifier=online_classifier,
    )


def _projector(model: ModelConfig, num_features: int) -> nn.Sequential:
    return projector(
        num_features,
        hidden=model.projector_hidden,
        out=model.projector_out,
        num_layers=model.projector_layers,
        norm=model.projector_norm,
    )


def _full_precision(like: Tensor) -> torch.autocast:
    """The losses are computed in fp32 whatever the autocast type, which would round their matrix products."""
    return torch.autocast(like.device.type, enabled=False)
