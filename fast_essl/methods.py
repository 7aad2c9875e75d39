"""E-SSL methods: an SSL loss on two views plus λ times the equivariance loss on the transformed copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fast_essl.heads import HeadForm, prediction_head, projector
from fast_essl.losses import info_nce
from fast_essl.resnet import ResNet
from loaders.batch import NUM_ROTATIONS, Views


@dataclass(frozen=True, kw_only=True)
class MethodOutput:
    """The losses of one batch; scalars on the device. All but `loss` are detached, for the log."""

    loss: Tensor
    """L_ssl + λ · L_equivariance."""
    ssl_loss: Tensor
    equivariance_loss: Tensor | None
    """None without an equivariance objective, as the next."""
    equivariance_accuracy: Tensor | None
    """Share of the transformed copies whose transformation is told."""


class ESimCLR(nn.Module):
    """SimCLR, equivariant to four-fold rotation (Dangovski et al., ICLR 2022); with weight 0 SimCLR alone."""

    def __init__(
        self,
        backbone: ResNet,
        *,
        projector_hidden: int = 2048,
        projector_out: int = 2048,
        projector_layers: int = 2,
        temperature: float = 0.5,
        equivariance_weight: float = 0.4,
        head_hidden: int = 2048,
        head_form: HeadForm = "cifar_simclr",
    ) -> None:
        """Put projector and, for a weight above 0, prediction head on a backbone."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(
            backbone.num_features, hidden=projector_hidden, out=projector_out, num_layers=projector_layers
        )
        self.temperature = temperature
        self.equivariance_weight = equivariance_weight
        # Made last: SimCLR and E-SimCLR start from the same backbone and projector for the same seed.
        self.head = (
            prediction_head(
                backbone.num_features, hidden=head_hidden, form=head_form, num_classes=NUM_ROTATIONS
            )
            if equivariance_weight > 0
            else None
        )

    def forward(self, views: Views) -> MethodOutput:
        """Each input passes the backbone on its own, so that BatchNorm sees each view's own statistics."""
        view1, view2 = views.views
        z1, z2 = self.projector(self.backbone(view1)), self.projector(self.backbone(view2))
        # In fp32 whatever the autocast type: the similarities are exponentiated.
        ssl_loss = info_nce(z1.float(), z2.float(), self.temperature)
        if self.head is None:
            return MethodOutput(
                loss=ssl_loss,
                ssl_loss=ssl_loss.detach(),
                equivariance_loss=None,
                equivariance_accuracy=None,
            )
        if views.transformed is None or views.transformed_labels is None:
            raise ValueError("equivariance_weight is above 0, but the batch has no transformed copies")
        logits = self.head(self.backbone(views.transformed)).float()
        equivariance_loss = F.cross_entropy(logits, views.transformed_labels)
        return MethodOutput(
            loss=ssl_loss + self.equivariance_weight * equivariance_loss,
            ssl_loss=ssl_loss.detach(),
            equivariance_loss=equivariance_loss.detach(),
            equivariance_accuracy=(logits.detach().argmax(dim=1) == views.transformed_labels).float().mean(),
        )
