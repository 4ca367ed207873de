"""Per-domain normalisation (paper section 2.1.2)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmd_model.domain_norm import DomainNorm

NAN = float("nan")


def test_statistics_by_hand_over_several_batches():
    norm = DomainNorm([True])
    norm(torch.tensor([[1.0], [3.0]]))
    assert (norm.mean.item(), norm.var.item(), norm.count.item()) == (2.0, 1.0, 2)
    norm(torch.tensor([[5.0], [NAN], [7.0]]))
    # of 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    assert (norm.mean.item(), norm.var.item(), norm.count.item()) == (4.0, 5.0, 4)
    norm.eval()
    got = norm(torch.tensor([[4.0], [9.0]])).flatten()
    torch.testing.assert_close(got, torch.tensor([0.0, 5**0.5]))


def test_first_batch_is_normalised_as_batch_norm_does():
    x = torch.randn(50, 3) * 4 + 7
    expected = torch.nn.BatchNorm1d(3, eps=1e-12)(x)
    torch.testing.assert_close(DomainNorm([True] * 3)(x), expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=6))
def test_running_statistics_are_those_of_all_values_however_they_came(batches: list[list[float]]):
    norm = DomainNorm([True])
    for batch in batches:
        norm(torch.tensor(batch, dtype=torch.float64)[:, None])
    values = np.concatenate(batches)
    assert norm.mean.item() == pytest.approx(values.mean(), abs=1e-9)
    assert norm.var.item() == pytest.approx(values.var(), abs=1e-7)


def test_horizon_turns_the_mean_into_an_exponential_one():
    norm = DomainNorm([True], horizon=2)
    for value in (0.0, 0.0, 8.0):
        norm(torch.full((2, 1), value))
    # the past counts as two values, never more: (2 * 0 + 2 * 8) / 4
    assert norm.mean.item() == 4.0


def test_rows_that_come_one_by_one_are_learned_exactly():
    norm = DomainNorm([True, True])
    for row in ([1.0, NAN], [3.0, 4.0], [NAN, 4.0], [5.0, NAN], [7.0, NAN]):
        norm(torch.tensor([row]))
    norm(torch.empty(0, 2))
    assert norm.count.tolist() == [4, 2]
    torch.testing.assert_close(norm.mean, torch.tensor([4.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(norm.var, torch.tensor([5.0, 0.0], dtype=torch.float64))


def test_what_training_never_showed_counts_as_missing():
    norm = DomainNorm([True, True, True])
    with torch.no_grad():
        norm.missing.copy_(torch.tensor([0.5, 0.25, -1.0]))
    fresh = norm.eval()(torch.tensor([[3.0, 1e6, NAN]]))
    assert fresh.tolist() == [[0.5, 0.25, -1.0]]
    norm.train()
    # the second feature has shown one value, the third none
    norm(torch.tensor([[1.0, NAN, NAN], [3.0, 8.0, NAN]]))
    norm.eval()
    got = norm(torch.tensor([[3.0, 8.0, 2.0], [1.0, 9.0, NAN]]))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0.25, -1.0], [-1.0, 0.25, -1.0]]))


def test_a_first_value_is_not_read_as_zero():
    norm = DomainNorm([True])
    with torch.no_grad():
        norm.missing.fill_(0.75)
    assert norm(torch.tensor([[12.0]])).item() == 0.75


@pytest.mark.parametrize(("constant", "later"), [(7.0, 7.01), (0.0, 1.0), (1.7e9, 1.8e9), (0.1, 0.2)])
def test_a_feature_that_was_constant_says_nothing(constant: float, later: float):
    norm = DomainNorm([True])
    for rows in (3, 1, 5):
        norm(torch.full((rows, 1), constant))
    norm.eval()
    with torch.no_grad():
        norm.missing.fill_(0.75)
    assert norm(torch.tensor([[constant], [later], [NAN]])).flatten().tolist() == [0.75] * 3


@pytest.mark.parametrize(("offset", "spread"), [(1.76e9, 25_000.0), (0.0, 1e-6), (-1e6, 10.0)])
def test_an_offset_or_a_small_unit_keeps_the_spread(offset: float, spread: float):
    """Seconds since 1970 of one day, a rate of one in a million."""
    x = torch.tensor([offset - spread, offset + spread], dtype=torch.float64)[:, None]
    norm = DomainNorm([True])
    norm(x)
    norm.eval()
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([-1.0, 1.0]), rtol=1e-5, atol=0)


def test_clipped_at_the_given_number_of_standard_deviations():
    norm = DomainNorm([True], clip=5.0)
    norm(torch.tensor([[-1.0], [1.0]]))
    norm.eval()
    assert norm(torch.tensor([[100.0], [-100.0], [4.0]])).flatten().tolist() == [5.0, -5.0, 4.0]


def test_missing_and_absent_become_learned_values_after_normalisation():
    norm = DomainNorm([True, False])
    with torch.no_grad():
        norm.missing.copy_(torch.tensor([0.25, -3.0]))
    out = norm(torch.tensor([[1.0, 5.0], [3.0, 6.0], [NAN, NAN]]))
    torch.testing.assert_close(out, torch.tensor([[-1.0, -3.0], [1.0, -3.0], [0.25, -3.0]]))
    out.sum().backward()
    assert norm.missing.grad.tolist() == [1.0, 3.0]


def test_evaluation_leaves_the_statistics_alone():
    norm = DomainNorm([True]).eval()
    norm(torch.randn(9, 1))
    assert norm.count.item() == 0
