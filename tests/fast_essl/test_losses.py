"""The losses, against the official numbers and against their definitions, spelled out."""

from __future__ import annotations

import math

import pytest
import torch
from support import assert_close, parity

from fast_essl.losses import barlow_twins, dos_error, info_nce, negative_cosine, nt_xent


def embeddings(count=7, size=5, num=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, size, generator=generator, dtype=dtype) for _ in range(num)]


@pytest.mark.parametrize(
    ("name", "loss_of"),
    [
        ("simclr_loss_cifar10", lambda z1, z2, file: info_nce(z1, z2, float(file["temperature"]))),
        ("simclr_loss_imagenet", lambda z1, z2, file: info_nce(z1, z2, float(file["temperature"]))),
        ("photonics_nt_xent", lambda z1, z2, file: nt_xent(z1, z2, float(file["temperature"]))),
        ("barlow_twins_loss", lambda z1, z2, file: barlow_twins(z1, z2, float(file["lambd"]))),
    ],
)
def test_losses_and_gradients_equal_the_official_release(name, loss_of):
    official = parity(name)
    z1, z2 = (torch.tensor(official[key], requires_grad=True) for key in ("z1", "z2"))
    loss = loss_of(z1, z2, official)
    loss.backward()
    assert_close(loss, official["loss"])
    assert_close(z1.grad, official["grad_z1"])
    assert_close(z2.grad, official["grad_z2"])


def test_simsiam_equals_the_official_release():
    official = parity("simsiam_loss")
    tensors = {key: torch.tensor(official[key], requires_grad=True) for key in ("p1", "p2", "z1", "z2")}
    loss = negative_cosine(**tensors)
    loss.backward()
    assert_close(loss, official["loss"])
    assert_close(tensors["p1"].grad, official["grad_p1"])
    assert_close(tensors["p2"].grad, official["grad_p2"])
    assert tensors["z1"].grad is None and tensors["z2"].grad is None


def test_the_density_of_states_error_equals_the_official_release():
    official = parity("photonics_dos_loss")
    output, target = (torch.tensor(official[key]) for key in ("output", "target"))
    assert_close(dos_error(output, target, start=int(official["start"])), official["loss"])


def test_the_density_of_states_error_is_its_definition():
    predicted, target = embeddings(count=4, size=9)
    total = 0.0
    for n in range(4):
        total += sum(abs(float(predicted[n, f] - target[n, f])) for f in range(3, 9)) / sum(
            abs(float(target[n, f])) for f in range(3, 9)
        )
    assert float(dos_error(predicted, target, start=3)) == pytest.approx(total / 4, rel=1e-12)


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def test_info_nce_is_its_definition():
    z1, z2 = embeddings()
    total = 0.0
    for one, other in ((z1, z2), (z2, z1)):
        for i in range(7):
            total -= cosine(one[i], other[i]) / 0.2
            total += math.log(sum(math.exp(cosine(one[i], other[j]) / 0.2) for j in range(7)))
    assert float(info_nce(z1, z2, 0.2)) == pytest.approx(total / 14, rel=1e-12)


def test_nt_xent_is_its_definition():
    """Equation 1 of Chen et al.: positive k and 2N - 2 negatives for each of the 2N views."""
    z1, z2 = embeddings()
    views = [*z1, *z2]
    total = 0.0
    for i, view in enumerate(views):
        positive = math.exp(cosine(view, views[(i + 7) % 14]) / 0.3)
        total -= math.log(
            positive / sum(math.exp(cosine(view, other) / 0.3) for k, other in enumerate(views) if k != i)
        )
    assert float(nt_xent(z1, z2, 0.3)) == pytest.approx(total / 14, rel=1e-12)


def test_negative_cosine_is_its_definition():
    p1, p2, z1, z2 = embeddings(num=4)
    total = sum(cosine(p1[i], z2[i]) + cosine(p2[i], z1[i]) for i in range(7))
    assert float(negative_cosine(p1, p2, z1, z2)) == pytest.approx(-total / 14, rel=1e-12)


def test_barlow_twins_is_its_definition():
    z1, z2 = embeddings(count=9, size=4)

    def normalised(z, i):
        mean = sum(float(z[n, i]) for n in range(9)) / 9
        variance = sum((float(z[n, i]) - mean) ** 2 for n in range(9)) / 9
        return [(float(z[n, i]) - mean) / math.sqrt(variance + 1e-5) for n in range(9)]

    total = 0.0
    for i in range(4):
        for j in range(4):
            c = sum(a * b for a, b in zip(normalised(z1, i), normalised(z2, j), strict=True)) / 9
            total += (c - 1) ** 2 if i == j else 0.02 * c**2
    assert float(barlow_twins(z1, z2, 0.02)) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda a, b: info_nce(a, b, 0.5),
        lambda a, b: nt_xent(a, b, 0.5),
        lambda a, b: barlow_twins(a, b, 0.1),
    ],
)
def test_gradients_are_those_of_finite_differences(loss_of):
    z1, z2 = embeddings(count=6, size=3)
    assert torch.autograd.gradcheck(loss_of, (z1.requires_grad_(), z2.requires_grad_()))


def test_barlow_twins_keeps_its_precision_near_the_identity():
    """Wide embeddings that agree, which is where training ends: float32 against float64."""
    generator = torch.Generator().manual_seed(3)
    z1 = torch.randn(512, 256, generator=generator, dtype=torch.float64) + 30
    z2 = z1 + 0.01 * torch.randn(512, 256, generator=generator, dtype=torch.float64)
    exact = float(barlow_twins(z1, z2, 0.0051))
    assert float(barlow_twins(z1.float(), z2.float(), 0.0051)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_views_are_the_best_and_swapping_them_changes_nothing(dtype):
    z1, z2 = embeddings(count=40, size=6, dtype=dtype)
    for loss_of in (
        lambda a, b: info_nce(a, b, 0.1),
        lambda a, b: nt_xent(a, b, 0.1),
        lambda a, b: barlow_twins(a, b, 0.0),
    ):
        assert loss_of(z1, z1) < 0.1 * loss_of(z1, z2)
        assert torch.allclose(loss_of(z1, z2), loss_of(z2, z1), rtol=1e-5)
