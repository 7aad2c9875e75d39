"""What the kernels and apex need is said in one line before any work; nothing here runs a kernel."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from fast_essl.cli import main
from fast_essl.config import ConfigError, MethodConfig
from fast_essl.config_io import load_config
from fast_essl.heads import prediction_head
from fast_essl.kernels import require_kernels
from fast_essl.methods import build_method

CPU = torch.device("cpu")


@pytest.mark.parametrize("setting", ["head.layer_norm", "method.contrastive_backend"])
def test_kernels_without_a_device_are_refused_before_the_run(
    setting, tiny_config, tmp_path, capsys, monkeypatch
):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    run_dir = tmp_path / "run"
    overrides = ["--train.device", "cpu", f"--{setting}", "triton"]
    code = main(["pretrain", str(tiny_config), "--run-dir", str(run_dir), *overrides])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert f"{setting} = 'triton': needs a CUDA device; use 'torch'" in error
    assert not run_dir.exists()


def test_a_missing_triton_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="Triton is not installed"):
        require_kernels("head.layer_norm", torch.device("cuda"))


def test_the_fused_loss_is_info_nce_alone():
    with pytest.raises(
        ValueError, match="contrastive_backend = 'triton': must be 'torch' with contrastive_loss"
    ):
        MethodConfig(contrastive_backend="triton", contrastive_loss="nt_xent")


def stub_apex(monkeypatch, *, extension):
    """NVIDIA's apex as far as it is used: a LayerNorm of torch's arguments and names."""

    class FusedLayerNorm(torch.nn.LayerNorm):
        pass

    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["apex.normalization"].FusedLayerNorm = FusedLayerNorm
    if extension:
        module = ModuleType("fused_layer_norm_cuda")
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return FusedLayerNorm


def test_apex_brings_its_layer_norm_under_the_same_names(monkeypatch):
    norm = stub_apex(monkeypatch, extension=True)
    head, plain = (prediction_head(6, hidden=8, backend=backend) for backend in ("apex", "torch"))
    assert sum(type(layer) is norm for layer in head) == 2
    assert head.state_dict().keys() == plain.state_dict().keys()
    head.load_state_dict(plain.state_dict())
    features = torch.randn(8, 6)
    assert torch.equal(head.loss(features)[0], plain.loss(features)[0])
    with pytest.raises(ConfigError, match=r"head\.layer_norm = 'apex': needs a CUDA device"):
        head.check(CPU)


def test_an_apex_that_cannot_be_used_is_an_error(tiny_config, monkeypatch):
    config = load_config(tiny_config, ["--head.layer-norm", "apex"])
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match="PyPI is another project") as caught:
        build_method(config, num_classes=2)
    assert "\n" not in str(caught.value)
    stub_apex(monkeypatch, extension=False)
    with pytest.raises(ConfigError, match="without its CUDA extensions"):
        build_method(config, num_classes=2)
