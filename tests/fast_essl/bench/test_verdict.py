"""The verdict follows from the measured rates alone: each bottleneck once, and what is advised for it."""

from __future__ import annotations

import dataclasses

import pytest

from fast_essl.bench.verdict import Figures, decode_share, judge

# A GPU that would take 1,210 samples/s, fed by a loader of 640 that decodes two thirds of its time.
STARVED = Figures(
    loader=640,
    step=1210,
    end_to_end=630,
    decode=960,
    crops=1920,
    upload=20_000,
    view_stage=9000,
    optimizer=15_000,
    on_gpu=True,
    num_workers=8,
    longer_side=500,
)


def judged(**changes: object) -> tuple[str, str]:
    verdict = judge(dataclasses.replace(STARVED, **changes))
    return verdict.bottleneck, verdict.sentence


def test_a_loader_that_decodes_most_of_its_time() -> None:
    bottleneck, sentence = judged()
    assert bottleneck == "decode"
    assert "the trainer would take 1,210 samples/s, the loader gives 640 with 8 workers (67% of" in sentence
    assert "try --data.loader dali" in sentence
    # A third of the pixels fewer, (400/500)², saves 36% of two thirds of the time: 640 / (1 - 0.24).
    assert "--max-side 400 (the loader would give about 842)" in sentence
    assert "dali" not in judged(loader_name="dali")[1]
    assert judged(loader_name="torch") == (
        "decode",
        "loader-bound: the trainer would take 1,210 samples/s, the loader gives 640 with 8 workers; "
        "--data.loader ffcv does the same work faster",
    )


def test_small_images_are_not_to_be_shrunk() -> None:
    assert "--max-side" not in judged(longer_side=300)[1]
    assert "more cores" in judged(longer_side=300)[1]


def test_a_loader_that_cuts_most_of_its_time() -> None:
    bottleneck, sentence = judged(decode=1920, crops=960)
    assert bottleneck == "crops"
    assert "67% of its work is cutting crops" in sentence


@pytest.mark.parametrize(
    ("changes", "wanted", "word"),
    [
        (
            {"storage_disk": 300.0, "fits_in_memory": False, "end_to_end": 290},
            "storage",
            "the disk gives 300",
        ),
        ({"storage_disk": 300.0, "fits_in_memory": True}, "decode", "the loader gives 640"),
        ({"storage_disk": 900.0, "fits_in_memory": False}, "decode", "the loader gives 640"),
        ({"loader": 5000, "end_to_end": 1200}, "compute", "try --train.compile reduce-overhead"),
        ({"loader": 5000, "end_to_end": 1200, "compile": "default"}, "compute", "another GPU"),
        ({"loader": 5000, "end_to_end": 1200, "view_stage": 2000}, "view stage", "60% of that"),
        (
            {"loader": 5000, "end_to_end": 1200, "view_stage": 2000, "view_stage_name": "reference"},
            "view stage",
            "--data.view-stage auto",
        ),
        ({"loader": 5000, "end_to_end": 1200, "optimizer": 2000}, "optimizer", "a larger batch"),
        ({"loader": 5000, "end_to_end": 900, "upload": 950}, "upload", "reach the device at 950"),
        ({"loader": 5000, "end_to_end": 700}, "overlap", "--data.num-workers 7"),
        ({"loader": 1200, "end_to_end": 1150}, "balanced", "run beside each other"),
        (
            {"on_gpu": False, "loader": 640, "step": 1.2, "end_to_end": 1.2},
            "compute",
            "100% of the cores' time",
        ),
        ({"on_gpu": False, "loader": 300, "step": 900, "end_to_end": 225}, "decode", "the loader gives 300"),
        ({"on_gpu": False, "loader": 300, "step": 310, "end_to_end": 150}, "balanced", "share the cores"),
    ],
)
def test_each_bottleneck(changes: dict[str, object], wanted: str, word: str) -> None:
    bottleneck, sentence = judged(**changes)
    assert bottleneck == wanted
    assert word in sentence
    assert "\n" not in sentence


def test_the_share_of_decoding_needs_both_rooms() -> None:
    assert decode_share(STARVED) == pytest.approx(2 / 3)
    assert decode_share(dataclasses.replace(STARVED, decode=None)) is None
