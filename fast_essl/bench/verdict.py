"""What limits a run, and what to do about it, from the measured figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fast_essl.bench.table import number

Bottleneck = Literal[
    "storage",
    "decode",
    "crops",
    "upload",
    "view stage",
    "optimizer",
    "compute",
    "overlap",
    "balanced",
    "unclear",
]

LEVEL = 0.1
"""Loader and trainer whose rates differ by less than this share are called balanced."""
LOST = 0.15
"""A run that is slower than its slowest room by more than this share loses it between the rooms."""
LARGE_SHARE = 0.4
"""View stage and optimizer are named when they take more than this share of the step."""
SHORTER_SIDE = 400
"""Pixels of the longer side that is proposed for a conversion; ImageNet's photographs mostly have 500."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Measured rates in samples/s, None where a room was not measured, and what else the advice depends on."""

    loader: float
    """The loader alone."""
    step: float
    """View stage, forward, backward and optimizer on crops that lie on the device: the loader-free ceiling."""
    end_to_end: float
    """The whole."""
    decode: float | None = None
    """Decoding alone, with the loader's threads."""
    crops: float | None = None
    """Cutting and resizing alone, with the loader's threads."""
    storage_disk: float | None = None
    """Reading what is not in memory."""
    upload: float | None = None
    """Host to device."""
    view_stage: float | None = None
    optimizer: float | None = None
    on_gpu: bool = False
    """Whether the step runs beside the loader; on a CPU they share the cores."""
    loader_name: str = "ffcv"
    view_stage_name: str = "auto"
    compile: str = "none"
    num_workers: int = 1
    """Threads or processes of the loader."""
    fits_in_memory: bool = True
    """Whether the page cache can hold the file."""
    longer_side: float = 0.0
    """Mean of the samples' longer sides, pixels."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One sentence, and the word for it."""

    bottleneck: Bottleneck
    sentence: str

    @property
    def short(self) -> str:
        """The sentence up to its colon, as `loader-bound`."""
        return self.sentence.partition(":")[0]


def no_verdict(doubts: Sequence[str]) -> Verdict:
    """The answer where figures are not to be relied on: why, and what to do."""
    return Verdict(
        bottleneck="unclear",
        sentence=f"no verdict: {'; '.join(doubts)}; measure again while nothing else runs here, and if that does not "
        "help, with a larger --batch-size, whose rounds take longer",
    )


def judge(figures: Figures) -> Verdict:
    """Which room limits the run.

    On a GPU the rooms work beside one another, so the slowest one limits. On a CPU loader and step take turns on the
    same cores, so the one that takes more of the time does.
    """
    feed = figures.loader
    from_disk = not figures.fits_in_memory and figures.storage_disk is not None
    if from_disk and figures.storage_disk is not None:
        feed = min(feed, figures.storage_disk)
    if figures.on_gpu:
        slowest = min(feed, figures.step, figures.upload or figures.step)
        if figures.upload is not None and slowest == figures.upload and figures.upload < feed:
            return _upload(figures)
        if figures.end_to_end < (1 - LOST) * slowest:
            return _overlap(figures, slowest)
    if abs(feed - figures.step) < LEVEL * max(feed, figures.step):
        return _balanced(figures, feed)
    if feed < figures.step:
        return _storage(figures, feed) if feed < figures.loader else _loader(figures)
    return _trainer(figures, feed)


def _storage(figures: Figures, feed: float) -> Verdict:
    return Verdict(
        bottleneck="storage",
        sentence=f"storage-bound: the trainer would take {number(figures.step)} samples/s, the disk gives "
        f"{number(feed)}, and the file does not fit in memory; {_shrink(figures)}, or bring memory for the whole file",
    )


def _loader(figures: Figures) -> Verdict:
    begun = (
        f"loader-bound: the trainer would take {number(figures.step)} samples/s, the loader gives "
        f"{number(figures.loader)} with {figures.num_workers} worker{'s' if figures.num_workers > 1 else ''}"
    )
    share = decode_share(figures)
    if figures.loader_name == "torch":
        advice = "; --data.loader ffcv does the same work faster"
        return Verdict(bottleneck="decode", sentence=begun + advice)
    if share is not None and share < 0.5:
        return Verdict(
            bottleneck="crops",
            sentence=f"{begun} ({1 - share:.0%} of its work is cutting crops); give it more cores, or smaller views",
        )
    told = f" ({share:.0%} of its work is decoding)" if share is not None else ""
    dali = "try --data.loader dali, which decodes on the GPU, or " if _could_dali(figures) else ""
    return Verdict(bottleneck="decode", sentence=f"{begun}{told}; {dali}{_shrink(figures)}")


def _could_dali(figures: Figures) -> bool:
    return figures.on_gpu and figures.loader_name != "dali"


def _shrink(figures: Figures) -> str:
    """The advice to convert to smaller images, with what it would give."""
    if figures.longer_side <= SHORTER_SIDE:
        return "give the loader more cores"
    share = decode_share(figures)
    rate = ""
    if share is not None:
        saved = share * (1 - (SHORTER_SIDE / figures.longer_side) ** 2)
        rate = f" (the loader would give about {number(figures.loader / (1 - saved))})"
    return f"convert again with --max-side {SHORTER_SIDE}{rate}"


def decode_share(figures: Figures) -> float | None:
    """Share of decoding in decoding and cutting; None where they were not measured."""
    if figures.decode is None or figures.crops is None:
        return None
    return (1 / figures.decode) / (1 / figures.decode + 1 / figures.crops)


def _upload(figures: Figures) -> Verdict:
    return Verdict(
        bottleneck="upload",
        sentence=f"upload-bound: crops reach the device at {number(figures.upload)} samples/s, the trainer would take "
        f"{number(figures.step)}; see whether the GPU has all its PCIe lanes, or try --data.loader dali, which cuts on "
        "the GPU",
    )


def _overlap(figures: Figures, slowest: float) -> Verdict:
    workers = max(1, figures.num_workers - 1)
    return Verdict(
        bottleneck="overlap",
        sentence=f"lost between the rooms: each of them does {number(slowest)} samples/s or more, together they do "
        f"{number(figures.end_to_end)}; leave a core to the trainer's own thread with --data.num-workers {workers}",
    )


def _balanced(figures: Figures, feed: float) -> Verdict:
    what = "run beside each other" if figures.on_gpu else "share the cores"
    return Verdict(
        bottleneck="balanced",
        sentence=f"balanced: the loader gives {number(feed)} samples/s, the trainer would take {number(figures.step)}, "
        f"and they {what}; only both together make the run faster",
    )


def _trainer(figures: Figures, feed: float) -> Verdict:
    told = f"the loader gives {number(feed)} samples/s, the trainer takes {number(figures.step)}"
    if figures.view_stage is not None and figures.step / figures.view_stage > LARGE_SHARE:
        share = figures.step / figures.view_stage
        stage = figures.view_stage_name
        advice = (
            "--data.view-stage auto has a faster one"
            if stage == "reference"
            else "blur is its costliest part, and smaller views help most"
        )
        return Verdict(
            bottleneck="view stage",
            sentence=f"view-stage-bound: {told}, {share:.0%} of that in the view stage; {advice}",
        )
    if figures.optimizer is not None and figures.step / figures.optimizer > LARGE_SHARE:
        return Verdict(
            bottleneck="optimizer",
            sentence=f"optimizer-bound: {told}, {figures.step / figures.optimizer:.0%} of that in the optimizer, whose "
            "work is the same for any batch; try a larger batch",
        )
    if not figures.on_gpu:
        share = (1 / figures.step) / (1 / figures.step + 1 / feed)
        advice = (
            f"{share:.0%} of the cores' time goes to the step; only a GPU, or a smaller network, changes that"
        )
    elif figures.compile == "none":
        advice = "try --train.compile reduce-overhead, then a larger batch"
    else:
        advice = "try a larger batch; beyond that it takes another GPU"
    return Verdict(bottleneck="compute", sentence=f"compute-bound: {told}; {advice}")
