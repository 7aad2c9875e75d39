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

KERNELS: dict[str, tuple[str, str, dict[str, str], dict[str, object], dict[str, int]]] = {}
"""{name: module, kernel, {argument: type}, {constexpr: value}, launch options}; types as triton writes them."""

# In a process of its own, since this one may have the interpreter on.
COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

capability, (module, name, types, constants, options) = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
missing = [n for n in signature if n not in types and n not in constants]
assert not missing, missing
source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
print(json.dumps({"shared": compiled.metadata.shared, "bytes": len(compiled.asm["cubin"])}))
"""


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name, capability, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, json.dumps([capability, KERNELS[name]])]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["bytes"] > 0 and result["shared"] <= SHARED_BYTES[capability]
