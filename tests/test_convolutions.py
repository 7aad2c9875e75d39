"""Every convolution of every recipe, on the processor at hand: see `tools/scan_convolutions.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

TOOL = Path(__file__).resolve().parents[1] / "tools" / "scan_convolutions.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("scan_convolutions", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _OffByABit(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + (1e-3 if x.dtype is torch.float32 else 0)


class _WrongGradient(nn.Conv2d):
    def forward(self, x):
        output = super().forward(x)
        return output + 0.01 * (output - output.detach()) if x.dtype is torch.float32 else output


@pytest.mark.parametrize("wrong", [_OffByABit, _WrongGradient])
def test_a_wrong_convolution_is_noticed(tool, wrong):
    assert tool.check(nn.Conv2d(4, 8, 3))
    assert not tool.check(wrong(4, 8, 3))


@pytest.mark.slow
def test_every_convolution_of_every_recipe_is_right_on_this_processor(tool):
    rows = list(tool.scan_all())
    assert [row["threads"] for row in rows] == [1, 2] * len(tool.instruction_sets())
    for row in rows:
        assert row["bad"] == {}, row
        assert row["counts"]["right"] == len(tool.project_convolutions()) > 100
