"""Schedules, against the official sequences and at their landmarks."""

from __future__ import annotations

import pytest
from support import parity

from fast_essl.schedule import learning_rate_share


def shares(official, **settings):
    steps_per_epoch, num_epochs = int(official["steps_per_epoch"]), int(official["epochs"])
    num_steps = steps_per_epoch * num_epochs
    return [learning_rate_share(step, num_steps=num_steps, **settings) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("name", "final"), [("cifar10", 0.0), ("simclr_imagenet", 0.001), ("barlow_twins_imagenet", 0.001)]
)
def test_schedules_by_step_equal_the_official_release(name, final):
    official = parity("schedules")
    warmup_steps = 10 * int(official["steps_per_epoch"])
    rates = official[name].reshape(
        len(official[name]), -1
    )  # Barlow Twins: one column of weights, one of biases
    for column in rates.T:
        peak = column[warmup_steps]
        for share, rate in zip(shares(official, warmup_steps=warmup_steps, final=final), column, strict=True):
            assert abs(peak * share - rate) <= 1e-12


def test_the_schedule_by_epoch_equals_the_official_release():
    official = parity("schedules")
    scheduled, constant = official["simsiam_imagenet_per_epoch"].T
    steps_per_epoch = int(official["steps_per_epoch"])
    for epoch, share in enumerate(shares(official)[::steps_per_epoch]):
        assert abs(constant[0] * share - scheduled[epoch]) <= 1e-12
    assert (constant == constant[0]).all()


def test_the_landmarks():
    schedule = {"num_steps": 110, "warmup_steps": 10, "final": 0.25}
    assert [learning_rate_share(step, **schedule) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert learning_rate_share(60, **schedule) == pytest.approx(0.625)
    assert learning_rate_share(110, **schedule) == pytest.approx(0.25)
    assert learning_rate_share(0, num_steps=4) == 1.0
