"""What small slices weigh in the loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtmd_model.slice_balance import slice_factors

weight = st.just(0.0) | st.floats(1e-6, 1e6)
weights = st.lists(weight, min_size=6, max_size=6).filter(any)


@given(weights, st.floats(0, 1))
def test_the_sum_of_all_weights_stays(weights: list[float], balance: float) -> None:
    weight_SP = torch.tensor(weights, dtype=torch.float64).view(2, 3)
    total = (slice_factors(weight_SP, balance) * weight_SP).sum()
    assert math.isclose(total, weight_SP.sum(), rel_tol=1e-9)


def test_balance_goes_from_rows_to_slices_alike() -> None:
    weight_SP = torch.tensor([[900.0, 90.0, 10.0]], dtype=torch.float64)
    torch.testing.assert_close(slice_factors(weight_SP, 0.0), torch.ones_like(weight_SP))
    one = slice_factors(weight_SP, 1.0) * weight_SP
    torch.testing.assert_close(one, torch.full_like(one, 1000 / 3))
    half = slice_factors(weight_SP, 0.5) * weight_SP
    torch.testing.assert_close(half / half[0, 0], (weight_SP / 900).sqrt())


def test_a_slice_without_rows_has_factor_one() -> None:
    weight_SP = torch.tensor([[3.0, 0.0, 1.0]], dtype=torch.float64)
    factor_SP = slice_factors(weight_SP, 0.5)
    assert factor_SP[0, 1] == 1
    assert factor_SP[0, 0] < 1 < factor_SP[0, 2]


@pytest.mark.parametrize("balance", [-0.1, 1.5, math.nan])
def test_other_balances_are_refused(balance: float) -> None:
    from mtmd_model.train import TrainConfig

    with pytest.raises(ValueError, match="slice_balance must be in"):
        TrainConfig(slice_balance=balance)
