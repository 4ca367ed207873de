"""The failure signature of a training run."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from checks.training import JUMP, high_passes


def history(*losses):
    return [{"epoch": n, "train_loss": loss} for n, loss in enumerate(losses)]


def test_a_loss_that_falls_or_wavers_has_not_jumped():
    assert high_passes(history(0.0182, 0.0058, 0.0061, 0.0035, 0.0036)) == []


def test_a_jump_is_named_with_the_best_pass_before_it():
    # KuaiRand, window to 2022-05-01, seed 2, with a warm-up of one pass
    [found] = high_passes(history(0.0182, 0.0843, 0.0040))
    assert (found.epoch, found.lowest, found.loss) == (1, 0.0182, 0.0843)
    assert found.says == "epoch 1: training loss 0.08430 after 0.01820"


def test_the_passes_after_a_jump_count_until_the_loss_is_back():
    assert [j.epoch for j in high_passes(history(0.02, 0.01, 1.8, 0.016, 0.014, 0.009))] == [2, 3]


@given(st.lists(st.floats(1e-6, 1e3), max_size=10))
def test_without_a_jump_no_pass_is_above_the_one_before_by_more_than_the_multiple(losses):
    if not high_passes(history(*losses)):
        assert all(later <= JUMP * earlier for earlier, later in pairwise(losses))
