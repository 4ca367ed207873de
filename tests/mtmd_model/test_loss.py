"""Loss, chain of tasks and metrics against exact references (paper section 2.3)."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmd_model import metrics
from mtmd_model.constrained import joint_logit, joint_logits
from mtmd_model.loss import kl_divergence, kl_loss
from mtmd_model.schema import Task

LOGIT = st.floats(-30, 30, width=32)
NAN = float("nan")


def exact_joint(a: float, b: float) -> float:
    with localcontext() as context:
        context.prec = 60
        p = 1 / ((1 + (-Decimal(a)).exp()) * (1 + (-Decimal(b)).exp()))
        return float(p.ln() - (1 - p).ln())


@settings(max_examples=200, deadline=None)
@given(LOGIT, LOGIT)
def test_joint_logit_is_exact_and_never_above_its_parent(a: float, b: float):
    x = torch.tensor([a, b], requires_grad=True)
    joint = joint_logit(x[0], x[1])
    assert joint.item() == pytest.approx(exact_joint(a, b), abs=2e-6, rel=1e-6)
    assert joint <= x[0]
    assert torch.sigmoid(joint) <= torch.sigmoid(x[0])
    joint.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    in_double = joint_logit(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert in_double.item() == pytest.approx(exact_joint(a, b), abs=1e-12)


def test_chain_of_any_depth_and_several_roots():
    tasks = [
        Task(name, given, 1.0, 8, ()) for name, given in (("a", None), ("b", "a"), ("c", "b"), ("d", None), ("e", "d"))
    ]
    z = torch.randn(6, 5, dtype=torch.float64)
    p = torch.sigmoid(z)
    expected = torch.stack([p[:, 0], p[:, 0] * p[:, 1], p[:, 0] * p[:, 1] * p[:, 2], p[:, 3], p[:, 3] * p[:, 4]], 1)
    torch.testing.assert_close(torch.sigmoid(joint_logits(z, tasks)), expected)


@settings(max_examples=100, deadline=None)
@given(LOGIT, st.floats(0, 1))
def test_kl_is_not_negative_and_its_gradient_is_the_difference(z: float, t: float):
    logit = torch.tensor([[z]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[t]], dtype=torch.float64)
    kl = kl_divergence(logit, label)
    kl.sum().backward()
    assert kl.item() >= -1e-12
    assert logit.grad is not None
    assert logit.grad.item() == pytest.approx(1 / (1 + math.exp(-z)) - t, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(-15, 15))
def test_kl_is_zero_at_equality(z: float):
    logit = torch.tensor([[z]], dtype=torch.float64)
    assert kl_divergence(logit, torch.sigmoid(logit)).item() == pytest.approx(0, abs=1e-12)


def test_kl_by_hand():
    # t = 1/2, p = 1/4: ln((1/2)/(1/4)) / 2 + ln((1/2)/(3/4)) / 2
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(torch.tensor([[math.log(1 / 3)]]), torch.tensor([[0.5]])).item() == pytest.approx(expected)


def test_masked_entries_have_no_value_and_no_gradient():
    logits = torch.tensor([[1.0, float("inf")], [NAN, -2.0]], requires_grad=True)
    labels = torch.tensor([[0.5, NAN], [NAN, 0.1]])
    loss = kl_loss(logits, labels, torch.ones(2), torch.ones(2))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad[0, 1] == 0
    assert logits.grad[1, 0] == 0
    assert (logits.grad.diagonal() != 0).all()


def test_loss_weights_rows_and_tasks():
    logits, labels = torch.tensor([[0.3, -1.0], [2.0, 0.0]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    kl = kl_divergence(logits, labels)
    got = kl_loss(logits, labels, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(got, (2 * kl[0, 0] + kl[0, 1] + 6 * kl[1, 0] + 3 * kl[1, 1]) / 4)


def test_metrics_by_hand():
    m = metrics.measure([0.2, 0.5], [0.1, 0.5])
    assert m.rows == 2
    assert m.logmae == pytest.approx(math.log(2) / 2)
    assert m.mae == pytest.approx(0.05)
    assert m.calibration == pytest.approx(0.7 / 0.6)
    kl = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.8)
    assert m.kl == pytest.approx(kl / 2)
    entropy = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9)) + math.log(2)
    assert m.bce == pytest.approx((kl + entropy) / 2)
    assert m.floored == 0


def test_metrics_floor_both_sides_and_say_so():
    # of the first three only what lies above 1e-6 counts: nothing, a factor of 5 in p, one of 20 in t
    m = metrics.measure([3e-9, 5e-6, 1e-7, 1e-6], [4e-7, 0.0, 2e-5, 1e-5])
    assert m.floored == pytest.approx(3 / 4)
    assert m.logmae == pytest.approx((math.log(5) + math.log(20) + math.log(10)) / 4)
    assert np.isinf(metrics.measure([0.0], [0.5]).kl)
    assert metrics.measure([0.0, 1.0], [0.0, 1.0]).kl == 0


def test_metrics_weigh_rows():
    assert metrics.measure([0.2, 0.5], [0.1, 0.5], [3.0, 1.0]).mae == pytest.approx(0.075)


@pytest.mark.parametrize(("p", "t"), [([], []), ([0.1], [0.1, 0.2]), ([1.1], [0.5]), ([NAN], [0.5])])
def test_metrics_refuse(p: list[float], t: list[float]):
    with pytest.raises(ValueError, match="got"):
        metrics.measure(p, t)
