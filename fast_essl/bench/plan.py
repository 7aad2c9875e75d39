"""What limits an ImageNet run on a cluster, and how long it takes, from figures measured on one machine.

A model, with no measurement of its own. It takes the cluster's rate as that of its slowest part, in samples/s over all
GPUs, and these assumptions:

- **loader**: its CPU time a sample is as measured, it scales with the cores, and each GPU's trainer keeps one core to
  itself: (cores a GPU - 1) / CPU time. With `max_side`, bytes and decoding time fall with the number of pixels,
  (max_side / mean longer side)², when that is below 1; cutting crops costs what it did.
- **network storage**: one figure for what all nodes together are given; every sample is read once an epoch. Where a
  node's memory holds the whole dataset (with a fifth to spare), only the first epoch reads: each node sees another part
  of the samples in every epoch, so a part of the dataset would not do.
- **compute**: each GPU does the measured samples/s, whatever its share of the batch; a share above the measured batch
  is done in pieces (gradient accumulation).
- **gradient all-reduce**: a ring over all GPUs moves 2 · (n - 1) / n times the fp32 gradients over the slowest link:
  the GPUs' own within a node, the node's network beyond. It runs beside the backward pass of the last piece, two
  thirds of that piece's time, except for the last bucket of 25 MB, which waits for the end of it (PyTorch DDP).
- **SyncBatchNorm**: every BatchNorm layer waits for two exchanges of a few kilobytes, one forward and one backward, in
  each of the method's backbone passes and each piece; they cost latency alone.
- Left out: the second forward pass of the views that SimCLR and Barlow Twins take with gradient accumulation,
  evaluation, checkpoints, restarts, and the gathering of embeddings (a few MB a step).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fast_essl.config import ConfigError

NUM_IMAGENET_SAMPLES = 1_281_167
BUCKET_BYTES = 25e6
BACKWARD_SHARE = 2 / 3
MEMORY_SHARE = 0.8
GRADIENT_BYTES = 4

Limit = Literal["loader", "network storage", "gradient all-reduce", "compute"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and what was measured of it on one machine."""

    num_samples: int = NUM_IMAGENET_SAMPLES
    """Samples an epoch."""
    epochs: int
    batch_size: int
    """Samples a step over all GPUs."""
    step_samples_per_s: float
    """One GPU's rate on views made on the device: the loader-free ceiling."""
    step_batch_size: int
    """Samples a GPU had at once when that was measured."""
    loader_cpu_ms: float
    """CPU milliseconds of the loader a sample."""
    decode_cpu_ms: float
    """The part of that which is decoding."""
    bytes_per_sample: float
    """Mean stored size."""
    longer_side: float
    """Mean of the stored images' longer sides, pixels."""
    max_side: int = 0
    """Pixels that the longer side is to be brought down to by another conversion; 0 leaves the images as they are."""
    num_parameters: int
    """Of the whole method."""
    num_norms: int
    """BatchNorm layers of the method."""
    num_passes: int
    """Backbone passes a step: the two views, and the transformed copies."""
    doubt: str = ""
    """Why `bench` would not rely on the figures; empty where it gave a verdict."""

    @property
    def pixel_share(self) -> float:
        """Pixels of an image at `max_side`, share of those it has."""
        return min(1.0, (self.max_side / self.longer_side) ** 2) if self.max_side else 1.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What it is to be trained on."""

    num_gpus: int
    gpus_per_node: int = 8
    cores_per_gpu: int
    """CPU cores a GPU."""
    storage_mb_per_s: float
    """What the storage gives to all nodes together, MB/s."""
    network_gb_per_s: float = 25.0
    """Between nodes, GB/s a node and direction: 25 is 200 Gbit/s."""
    gpu_link_gb_per_s: float = 200.0
    """Between the GPUs of a node, GB/s of a ring; NVLink has hundreds, PCIe about 20."""
    latency_us: float = 20.0
    """Of one small exchange over all GPUs, microseconds."""
    node_memory_gib: float = 0.0
    """Memory of a node that may hold the dataset; 0 for none."""

    def __post_init__(self) -> None:
        for name, least in (("num_gpus", 1), ("gpus_per_node", 1), ("cores_per_gpu", 2)):
            if getattr(self, name) < least:
                option = "--gpus" if name == "num_gpus" else f"--{name.replace('_', '-')}"
                raise ConfigError(f"command line: {option} {getattr(self, name)}: must be {least} or more")
        for name in ("storage_mb_per_s", "network_gb_per_s", "gpu_link_gb_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"command line: --{name.replace('_', '-')} {getattr(self, name)}: must be above 0"
                )
        for name in ("latency_us", "node_memory_gib"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"command line: --{name.replace('_', '-')} {getattr(self, name)}: must be 0 or more"
                )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The model's answer."""

    samples_per_s: dict[Limit, float]
    """What each part allows by itself, over all GPUs; compute without communication, all-reduce, which one GPU does not
    have, without compute."""
    step_ms: float
    """A step of the trainers, communication included."""
    communication_ms: float
    """The part of that which communication adds to computing."""
    limit: Limit
    """The part that limits the run."""
    rate: float
    """samples/s of the run, over all GPUs, once the dataset is where it stays."""
    hours: float
    """Of all epochs."""
    dataset_gb: float
    """At `max_side`."""
    cached: bool
    """Whether each node's memory holds it, so that storage limits the first epoch alone."""
    wanted_mb_per_s: float
    """What the storage would have to give for all epochs to run at the rate that the others allow."""


def read_job(
    path: Path,
    *,
    num_samples: int = 0,
    epochs: int = 0,
    batch_size: int = 0,
    max_side: int = 0,
    step_samples_per_s: float = 0.0,
) -> Job:
    """The job that `fast-essl bench all` measured and wrote to `path`; figures above 0 replace what stands there.

    Without a step measured on a GPU, the rate given is taken as that of a GPU's whole share of the batch.

    Errors: `ConfigError` for a file that is none of bench's or lacks a part, for a step that was measured on a CPU, and
    for numbers below 0; `OSError`.
    """
    for name, value in (
        ("samples", num_samples),
        ("epochs", epochs),
        ("batch-size", batch_size),
        ("max-side", max_side),
        ("step-samples-per-s", step_samples_per_s),
    ):
        if not 0 <= value < math.inf:
            raise ConfigError(f"command line: --{name} {value}: must be above 0")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows, train = results["rows"], results["config"]["train"]
        loader, step = rows["loader"], rows["step"]
        weight = results["config"]["method"]["equivariance_weight"]
        on_gpu = results["device"] == "cuda"
        if not step_samples_per_s and not on_gpu:
            raise ConfigError(
                f"{path}: its step was measured on a CPU; give one GPU's rate with --step-samples-per-s, or measure "
                "on a GPU"
            )
        return Job(
            num_samples=num_samples or NUM_IMAGENET_SAMPLES,
            epochs=epochs or train["epochs"],
            batch_size=batch_size or results["config_batch_size"],
            step_samples_per_s=step_samples_per_s or step["samples_per_s"],
            step_batch_size=step["batch_size"] if on_gpu else batch_size or results["config_batch_size"],
            loader_cpu_ms=loader["cpu_ms_per_sample"],
            decode_cpu_ms=rows["decode"]["cpu_ms_per_sample"] if "decode" in rows else 0.0,
            bytes_per_sample=results["data"]["bytes_per_sample"],
            longer_side=results["data"]["longer_side"],
            max_side=max_side,
            num_passes=_num_passes(results["config"]["method"]["passes"], with_copies=weight > 0),
            doubt=_doubt(results.get("verdict")),
            **results["method"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not what `fast-essl bench all` writes ({error!r}); measure again"
        ) from None


def _doubt(verdict: dict[str, str] | None) -> str:
    return verdict["sentence"] if verdict and verdict["bottleneck"] == "unclear" else ""


def _num_passes(passes: str, *, with_copies: bool) -> int:
    """Backbone passes of a step."""
    if passes == "separate":
        return 3 if with_copies else 2
    return 2 if passes == "joint_views" and with_copies else 1


def plan(job: Job, cluster: Cluster) -> Plan:
    """How fast, how long, and what limits it."""
    num_gpus = cluster.num_gpus
    loader_s = (job.loader_cpu_ms - job.decode_cpu_ms * (1 - job.pixel_share)) / 1000
    loader = num_gpus * (cluster.cores_per_gpu - 1) / loader_s
    bytes_per_sample = job.bytes_per_sample * job.pixel_share
    storage = cluster.storage_mb_per_s * 1e6 / bytes_per_sample
    compute_s, added_s, moved_s = _step(job, cluster)
    step_s = compute_s + added_s
    trainers = job.batch_size / step_s

    dataset_bytes = bytes_per_sample * job.num_samples
    cached = dataset_bytes <= MEMORY_SHARE * cluster.node_memory_gib * 2**30
    others = min(loader, trainers)
    first = min(others, storage)
    rate = others if cached else first
    num_later = job.num_samples * (job.epochs - 1)
    hours = (job.num_samples / first + num_later / rate) / 3600

    limit: Limit
    if rate < others:
        limit = "network storage"
    elif loader < trainers:
        limit = "loader"
    else:
        limit = "gradient all-reduce" if added_s > compute_s else "compute"
    samples_per_s: dict[Limit, float] = {
        "loader": loader,
        "network storage": storage,
        "compute": job.batch_size / compute_s,
    }
    if num_gpus > 1:
        samples_per_s["gradient all-reduce"] = job.batch_size / moved_s
    return Plan(
        samples_per_s=samples_per_s,
        step_ms=1000 * step_s,
        communication_ms=1000 * added_s,
        limit=limit,
        rate=rate,
        hours=hours,
        dataset_gb=dataset_bytes / 1e9,
        cached=cached,
        wanted_mb_per_s=others * bytes_per_sample / 1e6,
    )


def _step(job: Job, cluster: Cluster) -> tuple[float, float, float]:
    """Seconds of a step: computing, what communication adds to it, and all communication by itself."""
    num_gpus = cluster.num_gpus
    share = job.batch_size / num_gpus
    num_pieces = math.ceil(share / job.step_batch_size)
    compute_s = share / job.step_samples_per_s
    if num_gpus == 1:
        return compute_s, 0.0, 0.0
    link = cluster.gpu_link_gb_per_s if num_gpus <= cluster.gpus_per_node else cluster.network_gb_per_s
    ring_s_per_byte = 2 * (num_gpus - 1) / num_gpus / (link * 1e9)
    gradient_bytes = GRADIENT_BYTES * job.num_parameters
    ring_s = ring_s_per_byte * gradient_bytes
    last_bucket_s = ring_s_per_byte * min(BUCKET_BYTES, gradient_bytes)
    backward_s = BACKWARD_SHARE * compute_s / num_pieces
    norms_s = 2 * job.num_norms * job.num_passes * num_pieces * cluster.latency_us / 1e6
    added_s = max(ring_s - backward_s, last_bucket_s) + norms_s
    return compute_s, added_s, ring_s + norms_s


def describe(job: Job, cluster: Cluster, answer: Plan) -> str:
    """The plan for people: a line a part, and the conclusion."""
    lines = [f"doubtful figures: {job.doubt}"] if job.doubt else []
    lines += [f"{'':24}{'samples/s':>12}{'hours':>9}"]
    for name, rate in answer.samples_per_s.items():
        hours = job.num_samples * job.epochs / rate / 3600
        lines.append(f"{'* ' if name == answer.limit else '  '}{name:22}{rate:>12,.0f}{hours:>9,.1f}")
    shrunk = f" at --max-side {job.max_side}" if job.max_side else ""
    where = (
        "each node's memory holds it, so only the first epoch reads it from the storage"
        if answer.cached
        else f"every epoch reads it from the storage, which would have to give {answer.wanted_mb_per_s:,.0f} MB/s"
    )
    lines += [
        f"dataset{shrunk}: {answer.dataset_gb:,.1f} GB; {where}",
        f"a step of {job.batch_size} samples on {cluster.num_gpus} GPUs takes {answer.step_ms:,.1f} ms, "
        f"{answer.communication_ms:,.1f} ms of that because of communication",
        f"{answer.limit} limits the run: {answer.rate:,.0f} samples/s, {answer.hours:,.1f} hours for "
        f"{job.epochs} epochs of {job.num_samples:,} samples",
    ]
    return "\n".join(lines)
