"""Gradient accumulation: the gradients of the whole batch, in the memory of a micro-batch."""

from __future__ import annotations

import copy
import json
import weakref
from dataclasses import replace

import pytest
import torch

from fast_essl import pretrain as pretrain_module
from fast_essl import run_folder
from fast_essl.accumulation import accumulate_gradients, in_passes
from fast_essl.config import ConfigError
from fast_essl.config_io import load_config
from fast_essl.methods import build_method
from fast_essl.pretrain import pretrain
from fast_essl.transformations import build_transformation
from loaders.batch import Views

METHODS = ("simclr", "simsiam", "barlow_twins")
COUNT = 12


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost more than they bring on networks this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def build(tiny_config, name):
    options = ["--method.name", name, "--method.online-classifier", "true"]
    config = load_config(tiny_config, options)
    return build_method(config, num_classes=3).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(COUNT, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    group = build_transformation("four_fold_rotation", size=8)
    return Views(
        views=tuple(images[:2]),
        transformed=group.copies(images[2]),
        transformed_labels=group.labels(COUNT),
        labels=torch.arange(COUNT) % 3,
        indices=torch.arange(COUNT),
    )


def micro_batches(views, num):
    """The batch in consecutive parts; the transformed copies of a part stay in block order."""

    def part(rows):
        return replace(
            views,
            views=tuple(view[rows] for view in views.views),
            transformed=views.transformed.unflatten(0, (4, COUNT))[:, rows].flatten(0, 1),
            transformed_labels=views.transformed_labels.unflatten(0, (4, COUNT))[:, rows].flatten(),
            labels=views.labels[rows],
            indices=views.indices[rows],
        )

    return [part(rows) for rows in torch.arange(COUNT).chunk(num)]


def plainly(function, *arguments):
    return function(*arguments)


def in_fp16(function, *arguments):
    with torch.autocast("cpu", dtype=torch.float16):
        return function(*arguments)


def accumulated(method, views, num, scaler=None, compute=plainly):
    method.zero_grad()
    passes = in_passes([tuple(micro_batches(views, num))], method)
    output = accumulate_gradients(
        method,
        method,
        passes,
        num_micro_batches=num,
        scaler=scaler or torch.amp.GradScaler("cpu", enabled=False),
        compute=compute,
    )
    assert list(passes) == []
    return output


def assert_same(method, other, *, scale=1.0):
    """Up to the rounding of the losses, which are of float32."""
    for (name, one), (_, two) in zip(method.named_parameters(), other.named_parameters(), strict=True):
        assert two.grad.abs().max() > 1e-4, name
        assert (one.grad / scale - two.grad).abs().max() <= 3e-6 * two.grad.abs().max(), name


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_with_frozen_batch_norm_it_is_the_whole_batch(tiny_config, name, num):
    method, views = build(tiny_config, name), batch()
    method(views)  # moves the running statistics off their start
    method.eval()
    whole = copy.deepcopy(method)
    expected = whole(views)
    expected.loss.backward()
    output = accumulated(method, views, num)
    assert_same(method, whole)
    for field in ("loss", "ssl_loss", "equivariance_loss", "equivariance_accuracy", "online_accuracy"):
        assert float(getattr(output, field)) == pytest.approx(getattr(expected, field).item(), rel=1e-6), (
            field
        )


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_batch_norm_sees_micro_batches_and_counts_them_once(tiny_config, name, num):
    method, views = build(tiny_config, name).train(), batch()
    reference = copy.deepcopy(method)
    outputs = accumulated(method, views, num)

    # All graphs at once: the SSL loss of all embeddings, the means of the others.
    embedded, others = [], []
    for part in micro_batches(views, num):
        output = reference(
            part, lambda *embeddings: embedded.append(embeddings) or embeddings[0].new_zeros(())
        )
        others.append(output.loss)
    ssl_loss = reference.ssl.loss(*[torch.cat(rows) for rows in zip(*embedded, strict=True)])
    loss = ssl_loss + sum(others) / num
    loss.backward()
    assert_same(method, reference)
    assert float(outputs.loss) == pytest.approx(loss.item(), rel=1e-6, abs=1e-7)
    assert float(outputs.ssl_loss) == pytest.approx(ssl_loss.item(), rel=1e-6, abs=1e-7)
    buffers = dict(reference.named_buffers())
    for key, value in method.named_buffers():
        assert torch.allclose(value, buffers[key], rtol=1e-12), key
    assert int(method.backbone.bn1.num_batches_tracked) == 3 * num  # two views and the transformed copies


def test_the_loss_scale_is_on_every_gradient(tiny_config):
    method, views = build(tiny_config, "simclr").eval(), batch()
    plain = copy.deepcopy(method)
    accumulated(plain, views, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    output = accumulated(method, views, 2, scaler)
    assert_same(method, plain, scale=2.0**10)
    assert torch.isfinite(output.loss)


def test_a_gradient_that_overflows_leaves_the_loss_finite(tiny_config):
    """As without accumulation: the scaler then skips the step, and nothing is wrong with the loss."""
    method, views = build(tiny_config, "simclr").float().eval(), batch()
    views = replace(
        views, views=tuple(view.float() for view in views.views), transformed=views.transformed.float()
    )
    output = accumulated(method, views, 2, torch.amp.GradScaler("cpu", init_scale=2.0**30), in_fp16)
    assert torch.isfinite(output.loss)
    assert not all(torch.isfinite(parameter.grad).all() for parameter in method.parameters())


def peak_bytes(function, *arguments):
    """The most that autograd keeps at a time for backward passes."""
    live, peak = 0, 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def forget(num_bytes):
        nonlocal live
        live -= num_bytes

    def keep(tensor):
        nonlocal live, peak
        kept, num_bytes = Kept(tensor), tensor.nbytes
        live, peak = live + num_bytes, max(peak, live + num_bytes)
        weakref.finalize(kept, forget, num_bytes)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        function(*arguments)
    return peak


@pytest.mark.parametrize("name", METHODS)
def test_memory_is_that_of_a_micro_batch(tiny_config, name):
    method, views = build(tiny_config, name).train(), batch()

    def step(views):
        method(views).loss.backward()

    one = peak_bytes(step, micro_batches(views, 6)[0])
    six = peak_bytes(accumulated, method, views, 6)
    whole = peak_bytes(step, views)
    assert six < 1.1 * one < 0.6 * whole


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_accumulates_in_mixed_precision(tiny_config, tmp_path, monkeypatch, precision):
    """The CPU refuses reduced precision, where it is slow; here it is told to."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    losses = []
    for name in ("fp32", precision):
        where = torch.device("cpu"), dtype[name]
        monkeypatch.setattr(pretrain_module, "resolve_device", lambda config, where=where: where)
        run_dir = tmp_path / f"{name}{len(losses)}"
        options = ["--train.accumulate", "2", "--train.knn-every", "0", "--train.max-steps", "3"]
        assert pretrain(load_config(tiny_config, options), run_dir, show_progress=False).step == 3
        lines = [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--train.accumulate 3", "train.accumulate = 3: must be a divisor of batch_size = 8"),
        ("--train.accumulate 0", "train.accumulate = 0: must be 1 or more"),
        ("--train.accumulate 8", "train.accumulate = 8: must be a divisor of batch_size = 8 that leaves 2"),
    ],
)
def test_a_batch_that_cannot_be_parted_is_one_line(tiny_config, options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(tiny_config, options.split())


def test_an_epoch_smaller_than_a_batch_of_parts_is_refused(tiny_config, tmp_path):
    config = load_config(tiny_config, ["--train.batch-size", "64", "--train.accumulate", "2"])
    with pytest.raises(ConfigError, match=r"train\.batch_size = 64: an epoch has fewer samples"):
        pretrain(config, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
