"""Several ranks train as one process does: on the CPU, by gloo, each a process of its own.

Starting a rank takes seconds, so all that two and three ranks do is done by the same processes, before any test.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import time

import pytest
import torch
from torch import nn

import fast_essl.evaluate_run as evaluate_run_module
import fast_essl.source as source_module
from fast_essl import run_folder
from fast_essl.batch_norm import synchronise_batch_norm
from fast_essl.checkpoint import load_file
from fast_essl.cli import main
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.distributed import gather_ragged, mean_over_ranks, num_ranks, rank
from fast_essl.errors import NonFiniteLossError
from fast_essl.evaluate import knn_accuracy, knn_scores
from fast_essl.evaluate_run import resolve_device
from fast_essl.methods import build_method
from fast_essl.pretrain import pretrain
from fast_essl.ranks import EndedByAnotherRankError, num_cores, process_group
from fast_essl.source import image_source
from loaders import machine
from loaders.errors import DataError

COUNTS = (2, 3)
CPU = torch.device("cpu")
# 34 images: two steps of 12 an epoch.
COMMON = (
    "--train.batch-size 12 --train.knn-every 0 --method.online-classifier true --optimizer.warmup-epochs 0 "
)
# A rate at which what ranks round otherwise does not grow, on any processor, within the few steps that are compared.
COMMON += "--optimizer.base-learning-rate 0.1"
RUNS = {
    f"{name}-{weight}": f"--method.name {name} --method.equivariance-weight {weight} --train.max-steps 2"
    for name in ("simclr", "simsiam", "barlow_twins")
    for weight in ("0", "0.4")
}
RUNS["accumulated"] = "--train.accumulate 2 --train.max-steps 3"
RUNS["evaluated"] = "--train.knn-every 1 --train.epochs 2"
PARTED = "--train.knn-every 2 --train.epochs 4 --optimizer.base-learning-rate 0.02"
"""A run of 8 steps, two on two ranks, two on three, the others on one; at a rate at which rounding does not grow."""
FAILURES = {
    "sample": "--train.max-steps 4",
    "loss": "--train.max-steps 4",
    "disk": "",
    "batch": "--train.batch-size 20 --train.accumulate 4",
    "seed": "",
}
"""What goes wrong: the first two on the last rank in its second step."""


def configured(path, options):
    return load_config(path, [*COMMON.split(), *options.split()])


def norms_and_input():
    generator = torch.Generator().manual_seed(3)
    norms = nn.Sequential(nn.BatchNorm2d(5), nn.Sequential(nn.BatchNorm2d(5, affine=False)))
    nn.init.normal_(norms[0].weight, generator=generator)
    nn.init.normal_(norms[0].bias, generator=generator)
    return norms.double(), torch.randn(12, 5, 3, 4, generator=generator, dtype=torch.float64) * 3 + 7


def normed(norms, x):
    """Output, gradients and buffers for a loss in which no two samples count alike."""
    inputs = x.clone().requires_grad_()
    y = norms(inputs)
    (y * torch.sin(3 * x)).pow(3).sum().backward()
    gradients = [parameter.grad for parameter in norms.parameters()]
    buffers = [buffer.double() for buffer in norms.buffers()]
    return {"y": y.detach(), "x": inputs.grad, "sums": gradients, "equal": [*buffers, norms.eval()(x[:1])]}


def clusters():
    """Bank and queries that kNN tells apart at times."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(5, (97,), generator=generator)
    rows = torch.randn(5, 16, generator=generator)[labels] + torch.randn(97, 16, generator=generator)
    return rows[:70], labels[:70], rows[70:], labels[70:]


def in_second_step(patch, action):
    """Let `action` change the views of the second step."""
    resolve, num_calls = source_module.resolve_view_stage, 0

    def resolve_with_action(*given):
        make_views = resolve(*given)

        def make_views_with_action(*given, **more):
            nonlocal num_calls
            num_calls += 1
            views = make_views(*given, **more)
            return action(views) if num_calls == 2 else views

        return make_views_with_action

    patch.setattr(source_module, "resolve_view_stage", resolve_with_action)


class SecondDamaged:
    """A loader whose second batch does not decode."""

    def __init__(self, loader):
        self.loader = loader
        self.manifest, self.num_classes, self.close = loader.manifest, loader.num_classes, loader.close

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch, start_step=0):
        yield next(self.loader.epoch(epoch, start_step))
        raise DataError("sample 7 does not decode")


def failure(kind, path, folder, patch):
    """Pretrain into a failure; returns what this rank raised."""
    options, run_dir, is_last = FAILURES[kind], folder / kind, rank() == num_ranks() - 1
    if kind == "sample" and is_last:
        open_split = source_module.open_split
        patch.setattr(
            source_module, "open_split", lambda *args, **more: SecondDamaged(open_split(*args, **more))
        )
    elif kind == "loss" and is_last:
        in_second_step(patch, lambda views: views.views[0].fill_(torch.nan) is not None and views)
    elif kind == "disk":
        run_dir = path / "run"  # below a file
    elif kind == "seed" and is_last:
        options = "--train.seed 5"
    try:
        pretrain(configured(path, options), run_dir, show_progress=False)
    except (ConfigError, DataError, OSError, EndedByAnotherRankError, NonFiniteLossError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def on_a_rank(number, count, folder, path, port):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answers = {}
    with process_group():
        norms, x = norms_and_input()
        synchronise_batch_norm(norms, CPU)
        answers["norms"] = normed(norms, x.chunk(count)[number])

        bank, bank_labels, queries, labels = (
            x.tensor_split([3, 40][: count - 1])[number] for x in clusters()
        )
        answers["gathered"] = gather_ragged(bank)
        answers["mean"] = mean_over_ranks(torch.tensor(float(number)))
        answers["knn"] = [knn_accuracy(bank, bank_labels, queries, labels, k=k) for k in (1, 10)]
        answers["scores"] = knn_scores(
            bank, bank_labels, gather_ragged(queries), k=10, num_classes=5, temperature=0.1
        )

        with image_source(configured(path, "--train.accumulate 2"), CPU, torch.float32) as source:
            answers["indices"] = [crops.indices for crops in source.loader.epoch(1)]
        for name, options in RUNS.items():
            pretrain(configured(path, options), folder / f"{name}-{count}", show_progress=False)

        for more in (" --train.max-steps 3", ""):
            pretrain(
                configured(path, RUNS["evaluated"] + more), folder / f"resumed-{count}", show_progress=False
            )
        # Three ranks go on where two were stopped, by a signal to one rank alone.
        with pytest.MonkeyPatch.context() as patch:
            if number == count - 1:
                in_second_step(patch, lambda views: os.kill(os.getpid(), signal.SIGTERM) or views)
            summary = pretrain(configured(path, PARTED), folder / "parted", show_progress=False)
        answers["stopped"] = (summary.status, summary.step, summary.signal_number)
        for kind in FAILURES:
            with pytest.MonkeyPatch.context() as patch:
                answers[kind] = failure(kind, path, folder / str(count), patch)
        answers["cores"] = num_cores()
        torch.save(answers, folder / f"rank{number}of{count}.pt")


def all_ranks(_number, folder, path):
    """Start the ranks from one process that has imported all and has no threads: five would import for 3 s each."""
    import torch._dynamo  # by torch's optimizers, when the first is made

    for count in COUNTS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (count, folder, path, port)
        torch.multiprocessing.start_processes(on_a_rank, arguments, nprocs=count, start_method="fork")


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """Where two and then three ranks, and one process, have left what they did."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(all_ranks, (folder, tiny_config), nprocs=1, join=False)
    deadline = time.monotonic() + 900
    while not context.join(timeout=1):  # raises what a rank raised
        assert time.monotonic() < deadline, "the ranks hang"
    for name, options in {**RUNS, "whole": PARTED}.items():
        pretrain(configured(tiny_config, options), folder / f"{name}-1", show_progress=False)
    return folder


def answers(folder, count):
    return [torch.load(folder / f"rank{number}of{count}.pt") for number in range(count)]


def lines(run_dir, kind="step"):
    every = [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]
    return [line for line in every if line["type"] == kind]


def weights(run_dir):
    return load_file(run_dir / run_folder.CHECKPOINT)["method"]


@pytest.mark.parametrize("count", COUNTS)
def test_batch_norm_is_that_of_all_samples(folder, count):
    norms, x = norms_and_input()
    expected, ranks = normed(norms, x), [answer["norms"] for answer in answers(folder, count)]
    for key in ("y", "x"):
        assert torch.allclose(torch.cat([rank[key] for rank in ranks]), expected[key], rtol=1e-9, atol=1e-9)
    for number, gradient in enumerate(expected["sums"]):
        assert torch.allclose(sum(rank["sums"][number] for rank in ranks), gradient, rtol=1e-9)
    for rank_ in ranks:
        for one, other in zip(rank_["equal"][:-1], expected["equal"][:-1], strict=True):
            assert torch.allclose(one, other, rtol=1e-12)
    assert torch.allclose(ranks[0]["equal"][-1], expected["equal"][-1], rtol=1e-9)


@pytest.mark.parametrize("count", COUNTS)
def test_each_sample_is_seen_once_and_batches_do_not_depend_on_the_ranks(folder, tiny_config, count):
    with image_source(configured(tiny_config, "--train.accumulate 2"), CPU, torch.float32) as source:
        expected = [crops.indices for crops in source.loader.epoch(1)]
    assert len(expected) == 5 and len(torch.cat(expected).unique()) == 30
    for number, indices in enumerate(expected):
        parts = [answer["indices"][number] for answer in answers(folder, count)]
        assert {len(part) for part in parts} == {6 // count}
        assert torch.equal(torch.cat(parts), indices)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("count", COUNTS)
def test_the_curves_are_those_of_one_process(folder, tiny_config, name, count):
    expected, measured = lines(folder / f"{name}-1"), lines(folder / f"{name}-{count}")
    assert [line["step"] for line in measured] == [line["step"] for line in expected] != []
    for one, other in zip(measured, expected, strict=True):
        for key in ("loss", "ssl_loss", "equivariance_loss", "equivariance_accuracy", "online_accuracy"):
            if other[key] is None:
                assert one[key] is None
            else:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-4), (key, one["step"])
    one, other = (weights(folder / f"{name}-{number}") for number in (count, 1))
    initial = build_method(configured(tiny_config, RUNS[name]), num_classes=2).state_dict()
    assert list(one) == list(other) == list(initial)
    moved = sum((other[key] - initial[key]).double().square().sum() for key in initial)
    apart = sum((other[key] - one[key]).double().square().sum() for key in initial)
    assert apart < 0.02**2 * moved


def test_two_ranks_resume_bit_for_bit(folder):
    one, other = (weights(folder / name) for name in ("evaluated-2", "resumed-2"))
    assert [key for key in other if not torch.equal(one[key], other[key])] == []
    assert [line["loss"] for line in lines(folder / "resumed-2")] == [
        line["loss"] for line in lines(folder / "evaluated-2")
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_evaluations_are_those_of_one_process(folder, count):
    expected = [(line["step"], line["knn_top1"]) for line in lines(folder / "evaluated-1", "eval")]
    assert len(expected) == 2
    assert [
        (line["step"], line["knn_top1"]) for line in lines(folder / f"evaluated-{count}", "eval")
    ] == expected


@pytest.mark.parametrize("count", COUNTS)
def test_knn_over_the_ranks_is_that_of_the_whole_bank(folder, count):
    bank, bank_labels, queries, labels = clusters()
    expected = [knn_accuracy(bank, bank_labels, queries, labels, k=k) for k in (1, 10)]
    assert 0.3 < expected[0] < 1 and expected[0] != expected[1]
    scores = knn_scores(bank, bank_labels, queries, k=10, num_classes=5, temperature=0.1)
    for answer in answers(folder, count):
        assert torch.equal(answer["gathered"], bank)
        assert answer["mean"] == (count - 1) / 2
        assert answer["knn"] == expected
        assert torch.allclose(answer["scores"], scores, rtol=1e-4)


def test_a_run_goes_on_with_another_number_of_ranks(folder, tiny_config):
    assert [answer["stopped"] for answer in answers(folder, 2)] == [("stopped", 2, signal.SIGTERM)] * 2
    assert [answer["stopped"] for answer in answers(folder, 3)] == [("stopped", 4, signal.SIGTERM)] * 3
    assert load_file(folder / "parted" / run_folder.CHECKPOINT)["step"] == 4
    assert pretrain(configured(tiny_config, PARTED), folder / "parted", show_progress=False).step == 8
    for kind, key in (("step", "loss"), ("eval", "knn_top1")):
        parted, whole = lines(folder / "parted", kind), lines(folder / "whole-1", kind)
        assert [line["step"] for line in parted] == [line["step"] for line in whole] != []
        assert [line[key] for line in parted] == pytest.approx([line[key] for line in whole], rel=5e-3)


@pytest.mark.parametrize(
    ("kind", "failing", "error", "message"),
    [
        ("sample", -1, "DataError", "sample 7 does not decode"),
        ("disk", 0, "NotADirectoryError", ""),
        (
            "batch",
            0,
            "ConfigError",
            "train.batch_size = 20: must be a multiple of {parts}, the {count} ranks times",
        ),
        ("seed", 0, "ConfigError", "do not see one run"),
    ],
)
@pytest.mark.parametrize("count", COUNTS)
def test_what_fails_on_one_rank_ends_all_and_one_says_why(folder, count, kind, failing, error, message):
    raised = [answer[kind] for answer in answers(folder, count)]
    name, text = raised.pop(failing)
    assert name == error and message.format(count=count, parts=4 * count) in text
    assert {name for name, _ in raised} == {"EndedByAnotherRankError"}
    reason = message.format(count=count, parts=4 * count)
    assert all(f"rank {failing % count} cannot go on: " in text and reason in text for _, text in raised)
    assert not (folder / str(count) / kind / run_folder.CHECKPOINT).exists()


@pytest.mark.parametrize("count", COUNTS)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(folder, count):
    raised = {answer["loss"] for answer in answers(folder, count)}
    assert raised == {("NonFiniteLossError", next(iter(raised))[1])}
    assert "not finite at step 2" in next(iter(raised))[1]


def test_ranks_share_the_cores(folder):
    cores = machine.num_cores()
    assert [answers(folder, count)[0]["cores"] for count in COUNTS] == [max(1, cores // n) for n in COUNTS]


def test_without_synchronisation_batch_norm_needs_two_samples_a_rank(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fast_essl.pretrain.num_ranks", lambda: 4)
    options = "--train.batch-size 4 --train.sync-batch-norm false"
    with pytest.raises(ConfigError, match=r"leaves each of 4 ranks one sample .* set train\.sync_batch_norm"):
        pretrain(configured(tiny_config, options), tmp_path / "run", show_progress=False)


def test_more_ranks_than_gpus_are_refused(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(evaluate_run_module, "ranks_on_this_machine", lambda: 4)
    with pytest.raises(ConfigError, match=r"4 ranks on this machine, but only 2 of its GPUs"):
        resolve_device(configured(tiny_config, ""))
    assert resolve_device(configured(tiny_config, "--train.device cpu")) == (CPU, torch.float32)


def test_an_environment_without_torchrun_is_one_line(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert main(["pretrain", str(tiny_config), "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "RANK is not set: start ranks with torchrun" in error
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "evaluate runs in one process; start it without torchrun" in capsys.readouterr().err


def test_one_rank_needs_no_group(tiny_config):
    with process_group():
        assert (rank(), num_ranks()) == (0, 1)
        module = copy.deepcopy(norms_and_input()[0])
        assert isinstance(module[0], nn.BatchNorm2d)
