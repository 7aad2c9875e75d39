"""The planner's model, against cases worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fast_essl.bench.plan import Cluster, Job, describe, plan, read_job
from fast_essl.config import ConfigError

JOB = Job(
    num_samples=1_000_000,
    epochs=100,
    batch_size=4096,
    step_samples_per_s=1000,
    step_batch_size=256,
    loader_cpu_ms=3.0,
    decode_cpu_ms=2.0,
    bytes_per_sample=100_000,
    longer_side=500,
    num_parameters=25_000_000,
    num_norms=50,
    num_passes=3,
)
CLUSTER = Cluster(
    num_gpus=8,
    cores_per_gpu=16,
    storage_mb_per_s=2000,
    network_gb_per_s=10,
    gpu_link_gb_per_s=100,
    latency_us=20,
)


def planned(job: dict[str, Any] | None = None, **cluster: Any) -> Any:
    return plan(dataclasses.replace(JOB, **(job or {})), dataclasses.replace(CLUSTER, **cluster))


def test_computing_limits_where_all_else_is_plenty() -> None:
    answer = planned()
    # 512 samples a GPU at 1,000/s: two pieces of 256 in 512 ms.
    assert answer.samples_per_s["compute"] == pytest.approx(8000)
    # Seven loading cores' worth of 15 each: 8 · 15 / 3 ms.
    assert answer.samples_per_s["loader"] == pytest.approx(40_000)
    assert answer.samples_per_s["network storage"] == pytest.approx(20_000)
    # 100 MB of gradients, 2 · 7/8 of it at 100 GB/s: 1.75 ms, within the last piece's backward pass of 171 ms; the last
    # bucket, a quarter, is not: 0.4375 ms. 50 norms · 3 passes · 2 exchanges · 2 pieces · 20 µs: 12 ms.
    assert answer.communication_ms == pytest.approx(12.4375)
    assert answer.step_ms == pytest.approx(524.4375)
    assert answer.samples_per_s["gradient all-reduce"] == pytest.approx(4096 / 0.01375)
    assert answer.limit == "compute"
    assert answer.rate == pytest.approx(4096 / 0.5244375)
    assert answer.hours == pytest.approx(1e8 / answer.rate / 3600)
    assert answer.dataset_gb == pytest.approx(100)
    assert answer.wanted_mb_per_s == pytest.approx(answer.rate * 0.1)


def test_one_gpu_has_nobody_to_talk_to() -> None:
    answer = planned(num_gpus=1)
    assert answer.communication_ms == 0
    assert "gradient all-reduce" not in answer.samples_per_s
    assert answer.rate == pytest.approx(1000)


def test_few_cores_make_the_loader_the_limit_and_smaller_images_help_its_decoding() -> None:
    answer = planned(cores_per_gpu=3)
    assert answer.limit == "loader"
    assert answer.rate == pytest.approx(8 * 2 / 0.003)
    # (250/500)² of the pixels: 2 ms of decoding become 0.5 ms, the other millisecond stays; bytes become a quarter.
    smaller = planned({"max_side": 250}, cores_per_gpu=3)
    assert smaller.samples_per_s["loader"] == pytest.approx(8 * 2 / 0.0015)
    assert smaller.samples_per_s["network storage"] == pytest.approx(80_000)
    assert smaller.dataset_gb == pytest.approx(25)
    # Nothing is made larger.
    assert planned({"max_side": 900}).samples_per_s == planned().samples_per_s


def test_a_slow_storage_limits_every_epoch_or_the_first_alone() -> None:
    answer = planned(storage_mb_per_s=100)
    assert answer.limit == "network storage"
    assert answer.rate == pytest.approx(1000)
    assert answer.hours == pytest.approx(1e8 / 1000 / 3600)
    # 100 GB fit in 80% of 117 GiB (125.6 GB), and not in 80% of 116 GiB (124.6 GB).
    assert not planned(storage_mb_per_s=100, node_memory_gib=116).cached
    cached = planned(storage_mb_per_s=100, node_memory_gib=117)
    assert cached.cached
    assert cached.limit == "compute"
    assert cached.hours == pytest.approx((1e6 / 1000 + 99e6 / cached.rate) / 3600)


def test_a_slow_network_between_nodes_makes_the_all_reduce_the_limit() -> None:
    # 64 GPUs: 64 samples each in one piece of 64 ms, its backward pass 42.7 ms.
    # 100 MB · 2 · 63/64 at 0.5 GB/s: 393.75 ms.
    answer = planned(num_gpus=64, network_gb_per_s=0.5, storage_mb_per_s=1e6)
    assert answer.communication_ms == pytest.approx(393.75 - 64 * 2 / 3 + 6)
    assert answer.limit == "gradient all-reduce"
    # In one node the GPUs' own link counts.
    assert planned(num_gpus=8, network_gb_per_s=0.5).communication_ms == planned().communication_ms


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_gpus", 0, "--gpus 0: must be 1 or more"),
        ("cores_per_gpu", 1, "--cores-per-gpu 1: must be 2 or more"),
        ("storage_mb_per_s", 0.0, "--storage-mb-per-s 0.0: must be above 0"),
        ("network_gb_per_s", math.nan, "--network-gb-per-s nan: must be above 0"),
        ("node_memory_gib", -1.0, "--node-memory-gib -1.0: must be 0 or more"),
    ],
)
def test_a_cluster_that_cannot_be(name: str, value: float, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(CLUSTER, **{name: value})


def test_the_description_marks_the_limit_and_tells_the_hours() -> None:
    answer = planned()
    text = describe(JOB, CLUSTER, answer)
    assert "* compute" in text
    assert (
        text.splitlines()[-1]
        == "compute limits the run: 7,810 samples/s, 3.6 hours for 100 epochs of 1,000,000 samples"
    )


def bench_file(folder: Path, **changes: Any) -> Path:
    path = folder / "bench.json"
    rows = {
        "loader": {"cpu_ms_per_sample": 3.0},
        "decode": {"cpu_ms_per_sample": 2.0},
        "step": {"samples_per_s": 1000.0, "batch_size": 256},
    }
    content = {
        "device": "cuda",
        "rows": rows,
        "config": {"train": {"epochs": 100}, "method": {"equivariance_weight": 0.4, "passes": "separate"}},
        "config_batch_size": 4096,
        "data": {"bytes_per_sample": 100_000, "longer_side": 500},
        "method": {"num_parameters": 25_000_000, "num_norms": 50},
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_job_is_read_from_what_bench_wrote(tmp_path: Path) -> None:
    assert read_job(bench_file(tmp_path), num_samples=1_000_000) == JOB
    job = read_job(bench_file(tmp_path), epochs=2, batch_size=512, max_side=400, step_samples_per_s=7.0)
    assert (job.num_samples, job.epochs, job.batch_size, job.max_side) == (1_281_167, 2, 512, 400)
    assert job.step_samples_per_s == 7


def test_a_plan_from_doubtful_figures_says_so_first(tmp_path: Path) -> None:
    for bottleneck, said in (("decode", False), ("unclear", True)):
        verdict = {"bottleneck": bottleneck, "sentence": "no verdict: end to end is faster than the step"}
        job = read_job(bench_file(tmp_path, verdict=verdict))
        first = describe(job, CLUSTER, plan(job, CLUSTER)).splitlines()[0]
        assert (first == f"doubtful figures: {verdict['sentence']}") == said


@pytest.mark.parametrize(
    ("weight", "passes", "num_passes"),
    [(0.4, "joint_views", 2), (0.4, "joint_all", 1), (0, "separate", 2), (0, "joint_views", 1)],
)
def test_joint_passes_are_counted(tmp_path: Path, weight: float, passes: str, num_passes: int) -> None:
    method = {"equivariance_weight": weight, "passes": passes}
    config = {"train": {"epochs": 100}, "method": method}
    assert read_job(bench_file(tmp_path, config=config)).num_passes == num_passes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": "cpu"}, "its step was measured on a CPU; give one GPU's rate with --step-samples-per-s"),
        ({"rows": {}}, "not what `fast-essl bench all` writes"),
        ({"method": None}, "not what `fast-essl bench all` writes"),
    ],
)
def test_a_file_that_says_too_little(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_job(bench_file(tmp_path, **changes))


def test_numbers_below_zero_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--epochs -1: must be above 0"):
        read_job(bench_file(tmp_path), epochs=-1)
    (tmp_path / "bench.json").write_text("no JSON")
    with pytest.raises(ConfigError, match="not what `fast-essl bench all` writes"):
        read_job(tmp_path / "bench.json")
