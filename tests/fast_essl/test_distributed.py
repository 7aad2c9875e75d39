"""Losses over several gloo ranks under DDP: the gradients of one process that holds the whole batch."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fast_essl.distributed import gather_rows, num_ranks, rank, sum_over_ranks
from fast_essl.losses import barlow_twins, info_nce, negative_cosine, nt_xent

BATCH_SIZE = 12
LOSSES = {
    "info_nce": lambda z1, z2, p1, p2: info_nce(z1, z2, 0.2),
    "nt_xent": lambda z1, z2, p1, p2: nt_xent(z1, z2, 0.2),
    "simsiam": lambda z1, z2, p1, p2: negative_cosine(p1, p2, z1, z2),
    "barlow_twins": lambda z1, z2, p1, p2: barlow_twins(z1, z2, 0.0051),
}
if importlib.util.find_spec("triton"):

    def fused(z1, z2, p1, p2):
        from fast_essl.kernels.info_nce import info_nce_fused

        device = "cuda" if torch.cuda.is_available() else "cpu"  # gloo's collectives take both
        return info_nce_fused(z1.float().to(device), z2.float().to(device), 0.2).to(z1)

    LOSSES["info_nce_fused"] = fused  # in fp32, the others in float64


class Network(nn.Module):
    """Projector and predictor without BatchNorm, whose statistics would be each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 6)).double()
        self.predictor = nn.Linear(6, 6).double()

    def forward(self, x1, x2):
        z1, z2 = self.projector(x1), self.projector(x2)
        return z1, z2, self.predictor(z1), self.predictor(z2)


def views():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH_SIZE, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def loss_and_gradients(network, name, x1, x2):
    network.zero_grad()
    loss = LOSSES[name](*network(x1, x2))
    # The unused predictor of a contrastive loss keeps a gradient of zero.
    (loss + 0 * sum(parameter.sum() for parameter in network.parameters())).backward()
    return loss.detach(), {
        key.removeprefix("module."): value.grad.clone() for key, value in network.named_parameters()
    }


def on_a_rank(number: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=count)
    try:
        assert (rank(), num_ranks()) == (number, count)
        network = DistributedDataParallel(Network())
        parts = [x.chunk(count)[number] for x in views()]
        answers = {}
        for name in LOSSES:
            loss, gradients = loss_and_gradients(network, name, *parts)
            dist.all_reduce(loss)
            answers[name] = (loss / count, gradients)
        # The collectives by themselves: gathered in order; what flows back is the sum over ranks.
        rows = torch.full((2, 3), float(number), requires_grad=True)
        gathered = gather_rows(rows)
        gathered.backward(torch.arange(2.0 * count)[:, None].expand(-1, 3) * (number + 1))
        total = sum_over_ranks(torch.full((1,), float(number + 1)))
        answers["collectives"] = (gathered.detach(), rows.grad, total)
        torch.save(answers, folder / f"rank{number}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_together_are_one_process(count, tmp_path):
    context = torch.multiprocessing.spawn(on_a_rank, (count, tmp_path), nprocs=count, join=False)
    deadline = time.monotonic() + 120
    while not context.join(timeout=1):  # raises what a rank raised
        assert time.monotonic() < deadline, "the ranks hang"
    answers = [torch.load(tmp_path / f"rank{number}.pt") for number in range(count)]
    network = Network()
    for name in LOSSES:
        loss, gradients = loss_and_gradients(network, name, *views())
        assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4
        for answer in answers:
            relative, absolute = (1e-4, 1e-6) if name == "info_nce_fused" else (1e-9, 1e-13)
            assert torch.allclose(answer[name][0], loss, rtol=relative)
            for key, gradient in gradients.items():
                assert torch.allclose(answer[name][1][key], gradient, rtol=relative, atol=absolute), (
                    name,
                    key,
                )
    factor = sum(range(1, count + 1))
    for number, answer in enumerate(answers):
        gathered, gradient, total = answer["collectives"]
        assert gathered[:, 0].tolist() == [n for n in range(count) for _ in range(2)]
        assert gradient[:, 2].tolist() == [2 * number * factor, (2 * number + 1) * factor]
        assert total.item() == factor


def test_without_a_group_there_is_one_rank():
    x = torch.randn(3, 2, requires_grad=True)
    assert (rank(), num_ranks()) == (0, 1)
    assert gather_rows(x) is x and sum_over_ranks(x) is x
