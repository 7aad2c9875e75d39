from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch

from fast_essl import doctor as doctor_module
from fast_essl.doctor import about_file, doctor, installed, machine, would_be_used
from loaders.beton import read_tables
from loaders.convert import convert


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("doctor")
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(folder / "images" / name)
    convert(str(folder / "images"), folder / "x.beton", workers=1, progress=False)
    return folder / "x.beton"


def by_subject(findings: list[doctor_module.Finding]) -> dict[str, doctor_module.Finding]:
    assert len({finding.subject for finding in findings}) == len(findings)
    return {finding.subject: finding for finding in findings}


def test_a_sound_machine(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor([digits]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all is well: the defaults can train here"
    assert {"installed", "machine", "would be used", str(digits)} <= set(lines)
    assert not [line for line in lines if line.startswith("!")]


def test_versions_are_the_installed_ones() -> None:
    found = by_subject(installed())
    assert found["torch"].text == torch.__version__
    assert found["numba"].text == numba.__version__
    assert found["ffcv"].text.startswith("1.0.2")


def test_a_missing_default_is_a_fault_and_an_optional_package_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_version", lambda distribution: None)
    found = by_subject(installed())
    assert not found["ffcv"].good
    assert "make setup" in found["ffcv"].text
    assert found["DALI"].good
    assert "pip install 'fast_essl[dali]'" in found["DALI"].text
    assert "loader dali" not in by_subject(would_be_used())


def test_the_other_apex_is_told_from_nvidias(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_module, "_version", lambda distribution: "0.9")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    for file, text in (
        ("__init__.py", "not NVIDIA's"),
        ("normalization.py", "0.9, optimizer.backend = 'apex'"),
    ):
        (tmp_path / "apex" / file).touch()
        sys.modules.pop("apex", None)
        importlib.invalidate_caches()
        assert text in by_subject(installed())["apex"].text
    sys.modules.pop("apex", None)


def test_who_computes_head_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    for interpret, text in (
        (False, "needs a CUDA device"),
        (True, "the fused kernels run here, with --head"),
    ):
        monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
        found = by_subject(would_be_used())
        if not torch.cuda.is_available():
            assert found["head"].text.startswith("torch: the default") and text in found["head"].text
        assert found["InfoNCE"].text.startswith("torch: the default")


def test_where_dali_would_decode() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed", exc_type=ImportError)
    decoder = "mixed" if torch.cuda.is_available() else "cpu"
    assert by_subject(would_be_used())["loader dali"].text.startswith(f"decoder {decoder}: ")


def test_a_loader_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "loaders.ffcv_loader", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)  # as where it is not installed
    assert doctor() == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    assert len(lines) == 1
    assert lines[0].startswith("! loader          ffcv cannot be imported (")
    assert lines[0].endswith("until then use --data.loader torch")


def test_choices_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = by_subject(would_be_used())
    assert found["device"].text == "cpu: what `auto` takes here"
    assert found["precision"].text == "float32: what `auto` takes on cpu"
    assert found["view stage"].text == "cpu: what `auto` takes on cpu"
    assert found["threads"].text.endswith(" on `omp`, thread-safe")
    assert by_subject(machine())["GPU"].text.startswith(("none", "there is one"))


@pytest.mark.parametrize(
    ("cuda_build", "reason"), [(None, "is a build for CPUs"), ("13.0", "for CUDA 13.0 cannot use its driver")]
)
def test_a_gpu_that_torch_cannot_use_is_a_fault(cuda_build: str | None, reason: str) -> None:
    found = doctor_module._no_gpu(driver_sees_one=True, cuda_build=cuda_build)
    assert not found.good
    assert found.text.endswith(reason)


def test_facts_of_a_file(digits: Path) -> None:
    num_bytes, mean_bytes = digits.stat().st_size, read_tables(digits).data_sizes.mean()
    found = by_subject(about_file(digits, available_bytes=num_bytes))
    assert found["samples"].text == "3 in 2 classes (0 JPEG, 3 raw)"
    assert found["size"].text == f"{num_bytes / 2**20:.1f} MiB, {mean_bytes:.0f} bytes a sample"
    assert mean_bytes == 8 * 6 * 3
    assert found["fits in memory"].text.startswith("yes")
    found = by_subject(about_file(digits, available_bytes=num_bytes - 1))
    assert found["fits in memory"].text.startswith("no: ")
    assert found["fits in memory"].good


def test_bad_files_are_told_and_the_good_one_too(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes(digits.read_bytes()[:-1])
    (tmp_path / "damaged.beton.json").write_bytes(digits.with_name("x.beton.json").read_bytes())
    assert doctor([damaged, tmp_path / "none.beton", digits]) == 1
    out = capsys.readouterr().out
    bad = [line for line in out.splitlines() if line.startswith("!")]
    assert len(bad) == 2
    assert f"{damaged}: " in bad[0]
    assert "no such file" in bad[1]
    assert "3 in 2 classes" in out
    assert out.endswith("2 of these lines need attention: they begin with !\n")


def test_only_what_the_lines_need_is_imported() -> None:
    """The default loader is imported, as the table says; torch's compiler is not, and FFCV has nothing compiled."""
    program = (
        "import sys\n"
        "from fast_essl.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "import ffcv.fields.rgb_image, numba\n"
        "print(type(ffcv.fields.rgb_image.IMAGE_MODES).__name__, numba.typed.Dict.__module__, *sorted(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modes, restored, *modules = run.stdout.splitlines()[-1].split()
    assert (modes, restored) == ("dict", "numba.typed.typeddict")
    assert "loaders.ffcv_loader" in modules
    unneeded = {
        "torch._dynamo",
        "sympy",
        "matplotlib",
        "tyro",
        "pyarrow",
        "h5py",
        "sklearn",
        "loaders.convert",
    }
    assert unneeded & set(modules) == set()


def test_a_view_stage_that_cannot_be_had_is_a_fault_and_no_crash():
    found = doctor_module._view_stage("cuda", torch.device("cpu"))
    assert not found.good and found.text.startswith("view stage 'cuda' does not run on cpu")
