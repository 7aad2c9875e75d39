"""No verdict from figures that cannot all be true, that vary, or that a busy machine gave."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fast_essl.bench.run as run_module
from fast_essl.bench import doubts as doubts_module
from fast_essl.bench.doubts import MachineUse, Watch, busy, contradictions, varying
from fast_essl.bench.measuring import Row
from fast_essl.bench.run import Bench, Effort, Measured
from fast_essl.config_io import load_config

# samples/s of a network on two cores, as they belong together.
PLAUSIBLE = {
    "decode": 990.0,
    "crops": 1770.0,
    "loader": 526.0,
    "view stage": 1140.0,
    "forward + backward": 1.4,
    "optimizer": 70.0,
    "step": 1.37,
    "end to end": 1.36,
}
QUIET = MachineUse(
    seconds=60,
    num_cores=2,
    cores_left=1.9,
    cores_used_by_others=0.1,
    steal_share=0.01,
    load_average_before=0.5,
    load_average_after=2.0,
)


def row(name: str, rate: float, spread: float = 0.02) -> Row:
    """A row whose rounds go from `spread` below its rate to as much above."""
    times = {
        "median": 1000 / rate,
        "min": 1000 / rate / (1 + spread),
        "max": 1000 / rate / (1 - spread),
        "n": 5,
    }
    return Row(name=name, batch_size=1, batch_ms=times)


def rows(spread: float = 0.02, **rates: float) -> dict[str, Row]:
    changed = {name.replace("_", " "): rate for name, rate in rates.items()}
    return {name: row(name, rate, spread) for name, rate in {**PLAUSIBLE, **changed}.items()}


def contradict(
    on_gpu: bool = False, same_decoder: bool = True, spread: float = 0.02, **rates: float
) -> list[str]:
    return contradictions(rows(spread, **rates), on_gpu=on_gpu, same_decoder=same_decoder)


def test_figures_that_belong_together() -> None:
    assert contradict() == []
    assert varying(rows()) == []
    assert busy(QUIET) == []


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (
            {"step": 0.99, "forward_+_backward": 1.0, "end_to_end": 6.74},
            "end to end does 6.61 samples/s or more, and step, which is a part of it, 1.01 or less",
        ),
        ({"loader": 1.1}, "and loader, which is a part of it, 1.12 or less"),
        (
            {"view_stage": 1.1},
            "step does 1.34 samples/s or more, and view stage, which is a part of it, 1.12 or less",
        ),
        ({"forward_+_backward": 1.0}, "and forward + backward, which is a part of it, 1.02 or less"),
        ({"optimizer": 0.5}, "and optimizer, which is a part of it, 0.51 or less"),
        (
            {"upload": 0.5},
            "end to end does 1.33 samples/s or more, and upload, which is a part of it, 0.51 or less",
        ),
        (
            {"decode": 300.0},
            "loader does 515 samples/s or more, and decode, which is a part of it, 306 or less",
        ),
        ({"crops": 300.0}, "and crops, which is a part of it, 306 or less"),
        (
            {"end_to_end": 0.5},
            "end to end does 0.51 samples/s or less, and loader and step, one after the other, would do 1.34 or more",
        ),
    ],
)
def test_each_contradiction_names_both_figures(rates: dict[str, float], said: str) -> None:
    (found,) = contradict(**rates)
    assert said in found


def test_ranges_that_nearly_meet_do_not_contradict() -> None:
    assert contradict(end_to_end=1.55) == []
    assert len(contradict(end_to_end=1.7)) == 1
    assert contradict(end_to_end=1.7, spread=0.1) == []


def test_another_decoder_may_be_faster_than_the_decoding_that_was_measured() -> None:
    assert contradict(decode=300.0, same_decoder=False) == []


def test_time_lost_on_a_gpu_has_a_verdict_of_its_own() -> None:
    assert contradict(on_gpu=True, end_to_end=0.5) == []


def test_rounds_that_differ_too_much() -> None:
    assert varying(rows(spread=0.3)) == []
    found = varying({**rows(), "step": row("step", 1.0, 0.4), "decode": row("decode", 990, 0.9)})
    assert found == ["the rounds of step go from 0.60 to 1.40 samples/s"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"cores_left": 0.6, "cores_used_by_others": 1.4},
            "other processes kept 1.40 cores busy, which left 0.60 of the 2 that this one would use",
        ),
        ({"steal_share": 0.2}, "the hypervisor gave 20% of the cores' time to other machines"),
    ],
)
def test_a_busy_machine(changes: dict[str, float], said: str) -> None:
    assert busy(dataclasses.replace(QUIET, **changes)) == [said]


def test_work_on_cores_that_are_not_needed_does_no_harm() -> None:
    """A container with a quota of 2 cores on a machine of 64, half of which others use."""
    assert busy(dataclasses.replace(QUIET, cores_left=32, cores_used_by_others=32)) == []


def test_where_the_kernel_does_not_tell_nothing_is_held_against_it(tmp_path: Path) -> None:
    use = Watch(tmp_path / "none").use()
    assert (use.cores_left, use.cores_used_by_others, use.steal_share) == (None, None, None)
    assert busy(use) == []


def test_what_others_and_the_hypervisor_took_is_read_from_proc_stat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ten seconds of three cores, of which this process may use the first two and used four seconds."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    per_s = os.sysconf("SC_CLK_TCK")
    clock, own = iter([100.0, 110.0]), iter([7.0, 11.0])
    monkeypatch.setattr(doubts_module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(doubts_module, "cpu_s", lambda: next(own))
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu 9 9 9 9 9 9 9 9 0 0\ncpu0 10 0 0 5 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0\n"
    )
    watch = Watch(stat)
    # 6 s of user, 2 of nice, 3 of system time, 1 s stolen; idle, waiting and interrupts do not count.
    first = [10 + 6 * per_s, 2 * per_s, 0, 99, 99, 99, 99, per_s, 0, 0]
    second = [0, 0, 3 * per_s, 99, 99, 99, 99, 0, 0, 0]
    stat.write_text(
        f"cpu0 {' '.join(map(str, first))}\ncpu1 {' '.join(map(str, second))}\ncpu2 {' '.join(['9999'] * 10)}\nintr 1\n"
    )
    use = watch.use()
    assert use.cores_used_by_others == pytest.approx(0.7)
    assert use.cores_left == pytest.approx(1.3)
    assert use.steal_share == pytest.approx(0.05)


def concluded(measured: dict[str, Row], use: MachineUse, tiny_config: Path) -> tuple[Any, list[str]]:
    """What `fast-essl bench` says and returns after measuring these rows."""
    facts = {"num_samples": 100, "num_bytes": 1, "longer_side": 500.0, "jpeg_share": 1.0}
    bench = Bench(
        config=load_config(tiny_config, ["--data.loader", "ffcv"]),
        device=torch.device("cpu"),
        dtype=torch.float32,
        images=None,
        made=True,
        effort=Effort(most_batch_size=2, num_steps=1, num_whole_steps=1),
        loader_batch_size=2,
    )
    said: list[str] = []
    results = Measured(rows=list(measured.values()), page_cache="", data=facts, kernels=None, method=None)
    verdict, _ = run_module._conclude(bench, results, use, said.append)
    return verdict, said


def test_the_reported_figures_get_no_verdict(tiny_config: Path) -> None:
    """A step of 0.99 and an end to end of 6.74 samples/s were once called compute-bound."""
    measured = rows(**{"step": 0.99, "forward_+_backward": 1.0, "end_to_end": 6.74})
    verdict, said = concluded(measured, QUIET, tiny_config)
    assert verdict.bottleneck == "unclear"
    assert verdict.short == "no verdict"
    assert verdict.sentence.startswith("no verdict: end to end does 6.61 samples/s or more, and step, ")
    assert "measure again" in verdict.sentence
    assert said[-1] == verdict.sentence  # and no prediction follows
    json.dumps(dataclasses.asdict(verdict))


def test_the_same_figures_get_a_verdict_on_a_quiet_machine_only(tiny_config: Path) -> None:
    verdict, said = concluded(rows(), QUIET, tiny_config)
    assert verdict.bottleneck == "compute"
    assert said[-1].startswith("an epoch of these 100 samples takes")
    stolen = dataclasses.replace(QUIET, steal_share=0.5)
    verdict, _ = concluded(rows(), stolen, tiny_config)
    assert verdict.sentence.startswith("no verdict: the hypervisor gave 50%")
