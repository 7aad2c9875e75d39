"""Optimizers: the official traces, plain loops, and which parameter gets which rate."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support import assert_close, parity
from torch.utils._python_dispatch import TorchDispatchMode

from fast_essl.config import ConfigError, OptimizerConfig
from fast_essl.optim import LARS, build_optimizer, set_learning_rates

SGD = OptimizerConfig(base_learning_rate=0.1, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("name", ["simclr", "barlow_twins"])
def test_lars_equals_the_official_traces(name):
    """The official runs decay and adapt weights alone; each step has its own rates."""
    official = parity(f"lars_{name}")
    weight, bias = (torch.nn.Parameter(torch.tensor(official[key])) for key in ("weight", "bias"))
    decay = float(official["weight_decay"])
    optimizer = LARS(
        [{"params": [weight], "weight_decay": decay}, {"params": [bias], "adapt": False}],
        lr=0.0,
        momentum=float(official["momentum"]),
        trust_coefficient=float(official["eta"]),
    )
    for step in range(len(official["weights"])):
        rates = [
            official[key][step] for key in (("lr", "lr") if name == "simclr" else ("lr_weight", "lr_bias"))
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate)
        weight.grad, bias.grad = (torch.tensor(official[f"grad_{key}"][step]) for key in ("weight", "bias"))
        optimizer.step()
        assert_close(weight, official["weights"][step])
        assert_close(bias, official["biases"][step])


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (5,), (6, 2, 3, 3), (1, 1), (7,), (3, 2)]
    made = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes
    ]
    made[2].data = made[2].data.contiguous(memory_format=torch.channels_last)
    made[5].data.zero_()
    return made


def give_gradients(made, step):
    generator = torch.Generator().manual_seed(100 + step)
    for number, parameter in enumerate(made):
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # One parameter never has a gradient, one has a gradient of zero at first.
        parameter.grad = None if number == 0 else gradient * (number != 3 or step > 1)


@pytest.mark.parametrize(("decay", "decay_biases"), [(0.02, False), (0.02, True), (0.0, False)])
def test_lars_is_its_update_rule(decay, decay_biases):
    """Without decay a gradient of zero makes an update of norm 0, which nothing may scale."""
    config = OptimizerConfig(
        name="lars",
        base_learning_rate=0.4,
        base_learning_rate_biases=0.05,
        weight_decay=decay,
        decay_biases=decay_biases,
        trust_coefficient=0.01,
    )
    made = parameters()
    expected = [parameter.detach().clone() for parameter in made]
    velocities = [torch.zeros_like(parameter) for parameter in expected]
    optimizer = build_optimizer(made, config, batch_size=512)
    for step in range(4):
        give_gradients(made, step)
        set_learning_rates(optimizer, 0.5 + step)
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in made]
        optimizer.step()
        for number, (parameter, gradient) in enumerate(zip(made, before, strict=True)):
            if gradient is None:
                assert torch.equal(parameter, expected[number])
                continue
            assert torch.equal(parameter.grad, gradient)
            is_weight = parameter.ndim > 1
            update = gradient + (decay if is_weight or decay_biases else 0.0) * expected[number]
            if is_weight and expected[number].norm() > 0 and update.norm() > 0:
                update = update * 0.01 * expected[number].norm() / update.norm()
            velocities[number] = 0.9 * velocities[number] + update
            rate = (0.4 if is_weight else 0.05) * 2 * (0.5 + step)
            expected[number] = expected[number] - rate * velocities[number]
            assert torch.allclose(parameter, expected[number], rtol=1e-12, atol=1e-14), (number, step)


def test_lars_adapts_a_bias_where_it_is_told_to():
    """As the SimSiam paper's linear probe does, whose bias is a layer like any other."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(5, 3).double()
    made = [layer.bias, layer.weight]
    optimizer = LARS(made, lr=0.7, momentum=0.9, weight_decay=0.1, trust_coefficient=0.02)
    expected = [parameter.detach().clone() for parameter in made]
    velocities = [torch.zeros_like(parameter) for parameter in expected]
    for _ in range(3):
        for number, parameter in enumerate(made):
            parameter.grad = torch.randn_like(parameter)
            update = parameter.grad + 0.1 * expected[number]
            update = update * 0.02 * expected[number].norm() / update.norm()
            velocities[number] = 0.9 * velocities[number] + update
            expected[number] = expected[number] - 0.7 * velocities[number]
        optimizer.step()
        for parameter, wanted in zip(made, expected, strict=True):
            assert torch.allclose(parameter, wanted, rtol=1e-12, atol=1e-14)


def test_lars_under_a_gradient_scaler():
    """Scaled gradients move parameters as plain ones do, and an overflow moves none."""
    config = replace(SGD, name="lars")
    plain, scaled = parameters(), parameters()
    one, other = (build_optimizer(made, config, batch_size=256) for made in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))  # which makes the scale's tensor
    for step in range(4):
        for made in (plain, scaled):
            give_gradients(made, step)
        for parameter in scaled[1:]:
            parameter.grad *= scaler.get_scale()
        if step == 2:
            scaled[1].grad[0] = float("inf")
        else:
            one.step()
        scaler.step(other)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(plain, scaled, strict=True)), step
    assert scaler.get_scale() == 32.0


def test_a_reloaded_lars_goes_on_as_if_nothing_had_been():
    config = replace(SGD, name="lars")
    whole, halves = parameters(), parameters()
    optimizer = build_optimizer(whole, config, batch_size=256)
    before = build_optimizer(halves, config, batch_size=256)
    for step in range(4):
        if step == 2:
            after = build_optimizer(halves, config, batch_size=256)
            after.load_state_dict(before.state_dict())
            before = after
        for made, each in ((whole, optimizer), (halves, before)):
            give_gradients(made, step)
            each.step()
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_calls += 1
        return function(*args, **(kwargs or {}))


def test_a_step_of_lars_has_as_many_calls_for_many_tensors_as_for_few():
    def calls(count):
        made = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(count)]
        optimizer = LARS(made, lr=0.1, weight_decay=0.1)
        for _ in range(2):
            for parameter in made:
                parameter.grad = torch.randn(3, 2)
            with CountCalls() as counted:
                optimizer.step()
        return counted.num_calls

    assert 5 < calls(3) == calls(30)


def test_a_step_of_lars_reads_no_value_on_the_host():
    """Tensors of the meta device have none, so that whatever waits for one raises."""
    made = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 2), (4,), (2, 2, 3, 3))]
    optimizer = LARS(made, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for parameter in made:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        made[0].norm().item()


@pytest.mark.parametrize("decay_all", [True, False])
def test_sgd_is_its_update_rule(decay_all):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    start = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = build_optimizer(layer.parameters(), replace(SGD, decay_biases=decay_all), batch_size=256)
    velocity = {name: torch.zeros_like(value) for name, value in start.items()}
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        for name, parameter in layer.named_parameters():
            decay = 0.01 if decay_all or parameter.ndim > 1 else 0.0
            velocity[name] = 0.9 * velocity[name] + parameter.grad + decay * start[name]
            start[name] = start[name] - 0.1 * velocity[name]
        optimizer.step()
        for name, parameter in layer.named_parameters():
            assert torch.allclose(parameter, start[name], atol=1e-6)


def test_rates_are_those_of_the_batch_and_the_predictor_s_is_not_scheduled():
    made = parameters()
    frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    config = replace(SGD, base_learning_rate_biases=0.02, decay_biases=False)
    optimizer = build_optimizer([*made, frozen], config, batch_size=512, constant_rate_parameters=made[3:5])
    groups = [
        (
            {id(p) for p in group["params"]},
            group["peak_learning_rate"],
            group["scheduled"],
            group["weight_decay"],
        )
        for group in optimizer.param_groups
    ]
    assert groups == [
        ({id(made[n]) for n in (0, 2, 5)}, pytest.approx(0.2), True, 0.01),
        ({id(made[1])}, pytest.approx(0.04), True, 0.0),
        ({id(made[3])}, pytest.approx(0.2), False, 0.01),
        ({id(made[4])}, pytest.approx(0.04), False, 0.0),
    ]
    set_learning_rates(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01, 0.2, 0.04])
    assert len(build_optimizer(made[:1], SGD, batch_size=256).param_groups) == 1


def test_a_state_of_another_device_leaves_the_form_of_sgd_alone(monkeypatch):
    """Else a run begun on the CPU would go on with the slower form on CUDA."""
    on_cpu = build_optimizer(parameters(), SGD, batch_size=256)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        on_cuda = build_optimizer(parameters(), SGD, batch_size=256)
    state = on_cpu.state_dict()
    assert state["param_groups"][0]["foreach"] and not state["param_groups"][0]["fused"]
    on_cuda.load_state_dict(state)
    assert all(group["fused"] and not group["foreach"] for group in on_cuda.param_groups)


def stub_apex(monkeypatch, *, available):
    """NVIDIA's apex as far as it is used: FusedSGD's arguments, and whether its extensions are built."""

    class FusedSGD(torch.optim.SGD):
        def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False):
            super().__init__(
                params,
                lr=lr,
                momentum=momentum,
                dampening=dampening,
                weight_decay=weight_decay,
                nesterov=nesterov,
            )

    modules = {name: ModuleType(name) for name in ("apex", "apex.optimizers", "apex.multi_tensor_apply")}
    modules["apex.optimizers"].FusedSGD = FusedSGD
    modules["apex.multi_tensor_apply"].multi_tensor_applier = SimpleNamespace(available=available)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return FusedSGD


def test_apex_gets_the_groups_and_settings_that_torch_gets(monkeypatch):
    fused_sgd = stub_apex(monkeypatch, available=True)
    plain, made = parameters(), parameters()
    config = replace(SGD, base_learning_rate_biases=0.02, decay_biases=False)
    one = build_optimizer(plain, config, batch_size=512)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        other = build_optimizer(made, replace(config, backend="apex"), batch_size=512)
    assert type(other) is fused_sgd
    for step in range(3):
        for each, optimizer in ((plain, one), (made, other)):
            give_gradients(each, step)
            set_learning_rates(optimizer, 0.5)
            optimizer.step()
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(plain, made, strict=True))


def test_apex_is_used_on_cuda_only():
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        build_optimizer(parameters(), replace(SGD, backend="apex"), batch_size=256)


def test_an_apex_that_cannot_be_used_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    stub_apex(monkeypatch, available=False)
    with pytest.raises(ConfigError, match="without its CUDA extensions") as caught:
        build_optimizer(parameters(), replace(SGD, backend="apex"), batch_size=256)
    assert "\n" not in str(caught.value)
    for name in ("apex.optimizers", "apex.multi_tensor_apply"):
        monkeypatch.delitem(sys.modules, name)  # what is left is PyPI's: a package without optimizers
    with pytest.raises(ConfigError, match="PyPI is another project") as caught:
        build_optimizer(parameters(), replace(SGD, backend="apex"), batch_size=256)
    assert "\n" not in str(caught.value)
