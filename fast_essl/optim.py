"""Optimizers: parameter groups by what they are, SGD in torch's or apex's fastest form, LARS of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fast_essl.config import OptimizerConfig
from fast_essl.nvidia_apex import fused_sgd_class


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    batch_size: int,
    constant_rate_parameters: Iterable[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The configured optimizer; its learning rates are to be set by `set_learning_rates` before each step.

    Biases and norms, which are the parameters of fewer than two dimensions, have groups of their own, and so have the
    parameters whose rate no schedule moves (SimSiam's predictor). Each group carries its `peak_learning_rate` and
    whether it is `scheduled`.

    Args: `batch_size` samples a step over all ranks: rates are for 256 (Goyal et al., 2017).
    Errors: `ConfigError` where apex is asked for and cannot be used.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    constant = {id(parameter) for parameter in constant_rate_parameters}
    groups: list[dict[str, Any]] = []
    for scheduled in (True, False):
        for is_weight in (True, False):
            members = [
                p for p in trained if (id(p) not in constant) == scheduled and (p.ndim >= 2) == is_weight
            ]
            base = (
                config.base_learning_rate
                if is_weight
                else config.base_learning_rate_biases or config.base_learning_rate
            )
            group: dict[str, Any] = {
                "params": members,
                "peak_learning_rate": base * batch_size / 256,
                "scheduled": scheduled,
                "weight_decay": config.weight_decay if is_weight or config.decay_biases else 0.0,
            }
            if config.name == "lars":
                group["adapt"] = is_weight
            if members:
                groups.append(group)
    rate = config.base_learning_rate * batch_size / 256
    if config.name == "lars":
        return LARS(groups, lr=rate, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    on_cuda = all(parameter.is_cuda for parameter in trained)
    if config.backend == "apex":
        return fused_sgd_class(on_cuda)(groups, lr=rate, momentum=config.momentum)
    form = sgd_form(on_cuda)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=config.momentum, **form)

    def keep_form(loaded: torch.optim.Optimizer) -> None:
        # A state saved on another device brings that device's form along: on CUDA the slower one.
        for group in loaded.param_groups:
            group.update(form)

    optimizer.register_load_state_dict_post_hook(keep_form)
    return optimizer


def sgd_form(on_cuda: bool) -> dict[str, bool]:
    """Which of torch's implementations of SGD is taken: all parameters in one kernel, or one kernel a list of them."""
    return {"fused": on_cuda, "foreach": not on_cuda}


def set_learning_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give each group of `build_optimizer` its peak rate times `share`, or its peak where no schedule moves it."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_learning_rate"] * (share if group["scheduled"] else 1.0)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017), as both official ImageNet runs have it.

    For each parameter p with gradient g: u = g + weight_decay · p; where `adapt`, u is scaled by trust_coefficient ·
    ‖p‖ / ‖u‖ unless one of the norms is 0; v = momentum · v + u; p = p - lr · v. All tensors of a group in one
    multi-tensor call an operation, without waiting for the device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        """Args: `params` parameters or groups; a group of biases and norms has `adapt` False."""
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all parameters that have a gradient; the gradients stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step_group(group, parameters)
        return loss

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        updates = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
        if group["adapt"]:
            norms, update_norms = torch._foreach_norm(parameters), torch._foreach_norm(updates)
            norm, update_norm = torch.stack(norms), torch.stack(update_norms)
            ratio = torch.where(
                (norm > 0) & (update_norm > 0), group["trust_coefficient"] * norm / update_norm, 1.0
            )
            torch._foreach_mul_(updates, ratio.unbind())
        fresh = [parameter for parameter in parameters if "momentum" not in self.state[parameter]]
        for parameter in fresh:  # in the first step alone
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        torch._foreach_add_(parameters, velocities, alpha=-group["lr"])
