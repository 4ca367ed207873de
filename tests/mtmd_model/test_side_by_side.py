"""Both towers at once, with two threads."""

import pytest
import torch

from mtmd_model.config import MTMDConfig
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.loss import kl_loss
from mtmd_model.mtmd import MTMD
from mtmd_model.side_by_side import both, side_by_side
from tests.mtmd_model.sample import examples, platform

TINY = MTMDConfig(deep=(12, 8), shallow=(6, 4), router=(6,), width_divisor=8)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder(write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


@pytest.fixture
def calls(monkeypatch):
    """How often the towers ran at once."""
    found = []

    def counted(first, second):
        found.append(torch.is_autocast_enabled("cpu"))
        return side_by_side(first, second)

    monkeypatch.setattr("mtmd_model.mtmd.side_by_side", counted)
    return found


def trained(encoder, config=TINY, bf16=False):
    """A model after one pass, its logits and the gradients."""
    torch.manual_seed(0)
    model = MTMD(encoder.schema, encoder.rows, config)
    batch = encoder.encode(examples(300))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch)
    kl_loss(logits.float(), batch.labels, batch.weight, torch.ones(4)).backward()
    return model, logits


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_gradients_and_statistics_are_those_of_one_after_the_other(encoder, calls, bf16):
    model, logits = trained(encoder, bf16=bf16)
    assert calls == [bf16]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone, expected = trained(encoder, bf16=bf16)
    assert len(calls) == 1, "one thread runs one after the other"
    assert torch.equal(logits, expected)
    for (name, p), q in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q[1].grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_gradients_add_up_over_two_batches(encoder, calls):
    model, _ = trained(encoder)
    model.eval()  # statistics as they are
    batch = encoder.encode(examples(300))
    found = []
    for times in (1, 2):
        model.zero_grad()
        for _ in range(times):
            kl_loss(model(batch), batch.labels, batch.weight, torch.ones(4)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 4
    once, twice = found
    assert once.keys() == twice.keys()
    for name, gradient in twice.items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-4, atol=1e-7, msg=name)


def test_dropout_and_evaluation_run_one_after_the_other(encoder, calls):
    trained(encoder, MTMDConfig(**{**vars(TINY), "dropout": 0.2}))
    model = MTMD(encoder.schema, encoder.rows, TINY).eval()
    with torch.inference_mode():
        model(encoder.encode(examples(10)))
    assert calls == []


@pytest.mark.parametrize("who", ["first", "second"])
def test_an_error_of_either_is_raised_and_the_threads_are_given_back(who):
    def fails():
        raise ValueError(who)

    def works():
        return 1

    with pytest.raises(ValueError, match=who):
        both(fails if who == "first" else works, works if who == "first" else fails)
    assert torch.get_num_threads() == 2
    assert both(works, works) == (1, 1)


def test_each_has_half_of_the_threads():
    torch.set_num_threads(4)
    assert both(torch.get_num_threads, torch.get_num_threads) == (2, 2)
    assert torch.get_num_threads() == 4
