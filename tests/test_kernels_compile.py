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
SUMS = {"num_blocks": 25, "sums_width": 32}

KERNELS: dict[str, tuple[str, str, dict[str, str], dict[str, object], dict[str, int]]] = {
    "views, grey sums": (
        VIEWS,
        "_grey_sums",
        {"images": "*u8", "rows": "*i32", "row_floats": "*fp32", "sums": "*fp32", "num_blocks": "i32"},
        {"size": 224, "block": 2048},
        {},
    ),
    "views, colour": (VIEWS, "_colour", COLOUR, {**VIEW, **SUMS}, {}),
    "views, colour of copies": (VIEWS, "_colour", COLOUR, {**COPIES, **SUMS}, {}),
    "views, colour of an odd size in fp32": (
        VIEWS,
        "_colour",
        {**COLOUR, "out": "*fp32"},
        {**COPIES, **SUMS, "size": 5, "tile": 8},
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


@pytest.fixture(scope="module", params=SHARED_BYTES)
def compiled(request, tmp_path_factory):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, "-c", COMPILE, str(request.param), json.dumps(KERNELS)]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return request.param, json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(compiled, name):
    capability, results = compiled
    shared, num_bytes, error = results[name]
    assert error == "" and num_bytes > 0
    assert shared <= SHARED_BYTES[capability]
