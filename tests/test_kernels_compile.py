"""Every Triton kernel compiles for the GPUs it is meant for; this needs no GPU, only triton's own compiler.

The interpreter, which runs the kernels in the other tests, allows what the compiler refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
SHARED_BYTES = {80: 163_840, 90: 232_448}
"""Shared memory that a block may have (A100; H100 and H200), {compute capability: bytes}."""

VIEWS = "loaders.views.cuda"
FINISH = {
    **{f"{kind}_{channel}": "fp32" for kind in ("mean", "scale") for channel in ("red", "green", "blue")},
    "destinations": "*i32",
    "transposed": "*i32",
    "num_images": "i32",
}
COLOUR = {
    "images": "*u8",
    "rows": "*i32",
    "row_floats": "*fp32",
    "grey_sums": "*fp32",
    "planes": "*fp32",
    "out": "*bf16",
    **FINISH,
}
BLUR = {
    "planes": "*fp32",
    "blurred": "*i32",
    "rows": "*i32",
    "weights": "*fp32",
    "max_radius": "i32",
}
VIEW = {"size": 224, "tile": 32, "num_copies": 1, "moved": False}
COPIES = {"size": 96, "tile": 32, "num_copies": 4, "moved": True}
GREY_SUMS = {"num_blocks": 25, "sums_width": 32}

NORM = "fast_essl.kernels.layer_norm_relu"
ROWS = {"x": "*bf16", "x_stride": "i32", "weight": "*fp32", "bias": "*fp32", "num_rows": "i32", "size": "i32"}
KEPT = {"means": "*fp32", "rstds": "*fp32"}
WIDE = {"rows": 2, "width": 2048, "relu": True}
LAYER_NORM = {
    "forward": (NORM, "_forward", {**ROWS, **KEPT, "out": "*bf16", "epsilon": "fp32"}, WIDE, {}),
    "forward of the longest row": (
        NORM,
        "_forward",
        {**ROWS, **KEPT, "x": "*fp32", "out": "*fp32", "epsilon": "fp32"},
        {"rows": 1, "width": 16_384, "relu": False},
        {"num_warps": 8},
    ),
    "backward": (
        NORM,
        "_backward",
        {**ROWS, **KEPT, "gradient": "*bf16", "dx": "*bf16", "partials": "*fp32"},
        WIDE,
        {},
    ),
}

TAIL = "fast_essl.kernels.head_tail"
SUMS = dict.fromkeys(("scores", "dnorm", "dweight", "dbias"), "*fp32")
LAST = {
    **ROWS,
    **SUMS,
    "norm_weight": "*fp32",
    "norm_bias": "*fp32",
    "labels": "*i64",
    "dx": "*bf16",
    "rows_a_class": "i32",
    "num_classes": "i32",
    "epsilon": "fp32",
}
HEAD_TAIL = {
    "CIFAR": (
        TAIL,
        "_loss_and_gradients",
        LAST,
        {"relu": True, "by_position": True, "width": 2048, "num_classes_padded": 4},
        {"num_warps": 8},
    ),
    "ImageNet with labels": (
        TAIL,
        "_loss_and_gradients",
        {**LAST, "x": "*fp16", "dx": "*fp16"},
        {"relu": False, "by_position": False, "width": 128, "num_classes_padded": 32},
        {"num_warps": 2},
    ),
    "scaled": (
        TAIL,
        "_scaled",
        {"x": "*fp16", "scale": "*fp32", "out": "*fp16", "num_elements": "i32"},
        {"block": 4096},
        {},
    ),
}

CONTRAST = "fast_essl.kernels.info_nce"
UNIT = {"unit": "*bf16", "inverse_norms": "*fp32", "num_rows": "i32", "size": "i32"}
PAIRS = {**UNIT, "everyone": "*bf16", "sums": "*fp32", "num_keys": "i32", "first_key": "i32", "scale": "fp32"}
BLOCKS = {"block": 64, "part": 64, "upcast": False}
INFO_NCE = {
    "normalise": (
        CONTRAST,
        "_normalise",
        {**UNIT, "z1": "*bf16", "z1_stride": "i32", "z2": "*bf16", "z2_stride": "i32", "epsilon": "fp32"},
        {"width": 2048},
        {},
    ),
    "log-sum-exp": (CONTRAST, "_log_sum_exp", {**PAIRS, "losses": "*fp32"}, BLOCKS, {}),
    "log-sum-exp in fp32": (
        CONTRAST,
        "_log_sum_exp",
        {**PAIRS, "unit": "*fp32", "everyone": "*fp32", "losses": "*fp32"},
        BLOCKS,
        {},
    ),
    "gradients": (
        CONTRAST,
        "_gradients",
        {**PAIRS, "all_sums": "*fp32", "dunit": "*fp32"},
        {**BLOCKS, "chunk": 128},
        {},
    ),
    "gradients in fp32": (
        CONTRAST,
        "_gradients",
        {**PAIRS, "unit": "*fp32", "everyone": "*fp32", "all_sums": "*fp32", "dunit": "*fp32"},
        {**BLOCKS, "chunk": 128},
        {},
    ),
    "unnormalise": (
        CONTRAST,
        "_unnormalise",
        {**UNIT, "dunit": "*fp32", "scale": "*fp32", "dz": "*bf16", "epsilon": "fp32"},
        {"width": 2048},
        {},
    ),
}

KERNELS: dict[str, tuple[str, str, dict[str, str], dict[str, object], dict[str, int]]] = {
    "views, grey sums": (
        VIEWS,
        "_grey_sums",
        {"images": "*u8", "rows": "*i32", "row_floats": "*fp32", "sums": "*fp32", "num_blocks": "i32"},
        {"size": 224, "block": 2048},
        {},
    ),
    "views, colour": (VIEWS, "_colour", COLOUR, {**VIEW, **GREY_SUMS}, {}),
    "views, colour of copies": (VIEWS, "_colour", COLOUR, {**COPIES, **GREY_SUMS}, {}),
    "views, colour of an odd size in fp32": (
        VIEWS,
        "_colour",
        {**COLOUR, "out": "*fp32"},
        {**COPIES, **GREY_SUMS, "size": 5, "tile": 8},
        {},
    ),
    "views, blur rows": (
        VIEWS,
        "_blur_rows",
        {**BLUR, "blurred_planes": "*fp32"},
        {"size": 224, "tile": 32},
        {},
    ),
    "views, blur columns": (VIEWS, "_blur_columns", {**BLUR, **FINISH, "out": "*bf16"}, VIEW, {}),
    "views, blur columns of copies": (VIEWS, "_blur_columns", {**BLUR, **FINISH, "out": "*fp16"}, COPIES, {}),
    **{f"layer norm and relu, {name}": kernel for name, kernel in LAYER_NORM.items()},
    **{f"head tail, {name}": kernel for name, kernel in HEAD_TAIL.items()},
    **{f"info_nce, {name}": kernel for name, kernel in INFO_NCE.items()},
}
"""{name: module, kernel, {argument: type}, {constexpr: value}, launch options}; types as triton writes them."""

# In a process of its own, since this one may have the interpreter on.
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

results = {}
for label, (module, name, types, constants, options) in json.loads(sys.argv[2]).items():
    kernel = getattr(importlib.import_module(module), name)
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    try:
        missing = [n for n in signature if n not in types and n not in constants]
        assert not missing, f"neither a type nor a value for {missing}"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
        results[label] = [compiled.metadata.shared, len(compiled.asm["cubin"]), ""]
    except Exception as error:
        results[label] = [0, 0, f"{type(error).__name__}: {error}"]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    """A process for each kind of GPU, side by side: one core compiles for 20 s each."""
    processes = {}
    for capability in SHARED_BYTES:
        folder = tmp_path_factory.mktemp("triton")
        processes[capability] = subprocess.Popen(
            [sys.executable, "-c", COMPILE, str(capability), json.dumps(KERNELS)],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=SHARED_BYTES)
def compiled(request, compilers):
    process = compilers[request.param]
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return request.param, json.loads(output.splitlines()[-1])


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(compiled, name):
    capability, results = compiled
    shared, num_bytes, error = results[name]
    assert error == "" and num_bytes > 0
    assert shared <= SHARED_BYTES[capability]
