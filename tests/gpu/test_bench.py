"""`fast-essl bench` on a CUDA device: its own rows and columns, and the kernels beside their peers."""

from __future__ import annotations

import json

import pytest
import torch

from fast_essl.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_device_has_an_upload_and_tells_its_memory(tiny_config, tmp_path, capsys):
    words = [
        "bench",
        "loader",
        "step",
        str(tiny_config),
        "--quick",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert main([*words, "--train.device", "cuda"]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["rows"]["upload"]["mb_per_s"] > 0
    assert results["rows"]["step"]["peak_gib"] > 0
    assert results["rows"]["step"]["tflop_per_s"] > 0
    assert "TFLOP/s" in capsys.readouterr().out
    # Measured on a GPU, it plans a cluster of such.
    plan = ["bench", "plan", str(tmp_path / "bench.json"), "--gpus", "8", "--cores-per-gpu", "8"]
    assert main([*plan, "--storage-mb-per-s", "1000"]) == 0


def test_kernels_are_timed_beside_their_peers(monkeypatch):
    from fast_essl.bench import kernels

    every = kernels.workloads()
    some = {name: every[name] for name in ("head 2048", "info_nce 512×2048 float32")}
    monkeypatch.setattr(kernels, "workloads", lambda: some)
    results = kernels.measure_kernels(torch.device("cuda"), 2)
    assert set(results) == set(some)
    for rows in results.values():
        assert {"eager", "compiled", "triton"} <= set(rows)
        for row in rows.values():
            assert 0 < row["min"] <= row["median"] <= row["max"]
            assert row["n"] == 2
            assert row["peak_mib"] > 0
