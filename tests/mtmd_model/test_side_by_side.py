"""Networks at once, with two threads."""

import threading
from dataclasses import replace

import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtmd_model import mtmd
from mtmd_model.config import MTMDConfig
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.loss import kl_loss
from mtmd_model.mtmd import MTMD
from mtmd_model.side_by_side import Job, _halves, both, side_by_side
from tests.mtmd_model.sample import examples, platform
from tests.mtmd_model.test_ablations import SWITCHES

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

    def counted(sides):
        found.append(torch.is_autocast_enabled("cpu"))
        return embed_at_once(sides)

    embed_at_once = mtmd._embed_at_once
    monkeypatch.setattr(mtmd, "_embed_at_once", counted)
    return found


def trained(encoder, config=TINY, bf16=False, rows=None):
    """A model after one pass, its logits and the gradients."""
    torch.manual_seed(0)
    model = MTMD(encoder.schema, encoder.rows, config)
    batch = encoder.encode(examples(300) if rows is None else rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch)
    kl_loss(logits.float(), batch.labels, batch.weight, torch.ones(4)).backward()
    return model, logits


def assert_the_same_in_one_thread(encoder, calls, **how):
    model, logits = trained(encoder, **how)
    assert calls == [how.get("bf16", False)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone, expected = trained(encoder, **how)
    assert len(calls) == 1, "one thread runs one after the other"
    assert torch.equal(logits, expected)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_logits_gradients_and_statistics_are_those_of_one_thread(encoder, calls, changes):
    assert_the_same_in_one_thread(encoder, calls, config=replace(TINY, **changes))


def test_bf16_is_that_of_one_thread(encoder, calls):
    assert_the_same_in_one_thread(encoder, calls, bf16=True)


def test_a_domain_without_rows_is_left_alone(encoder, calls):
    rows = examples(300)
    rows = rows.filter(pc.not_equal(rows["surface"], "search"))
    assert 0 < len(rows) < 300
    assert_the_same_in_one_thread(encoder, calls, rows=rows)


def test_gradients_add_up_over_two_batches(encoder, calls):
    model, _ = trained(encoder)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    batch = encoder.encode(examples(300))
    for p in model.parameters():
        p.grad = None
    for _ in range(2):
        kl_loss(model(batch), batch.labels, batch.weight, torch.ones(4)).backward()
    assert len(calls) == 3
    for name, p in model.named_parameters():
        if name in once and "norm" not in name:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, 2 * once[name], rtol=1e-3, atol=1e-5, msg=name)


def test_dropout_and_evaluation_run_one_after_the_other(encoder, calls):
    trained(encoder, MTMDConfig(**{**vars(TINY), "dropout": 0.2}))
    model = MTMD(encoder.schema, encoder.rows, TINY).eval()
    with torch.inference_mode():
        model(encoder.encode(examples(10)))
    assert calls == []


def test_gradients_reach_inputs_and_parameters_of_what_is_used_only():
    weights = [torch.full((2,), float(n), requires_grad=True) for n in (1, 2, 3)]
    x, constant = torch.tensor([3.0, 5.0], requires_grad=True), torch.ones(2)
    seen = set()

    def network(weight, *inputs):
        seen.add(threading.current_thread())
        return [sum(inputs) * weight, constant]

    jobs = [Job(lambda *i, w=w: network(w, *i), (2 * x, constant)) for w in weights]
    (used, same), (unused, _), (again, _) = side_by_side(jobs)
    assert len(seen) == 2
    assert torch.equal(used, (2 * x + 1) * 1)
    assert torch.equal(unused, (2 * x + 1) * 2)
    assert torch.equal(same, constant)
    (used + again).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0 * (1 + 3)))
    assert [None if w.grad is None else w.grad.tolist() for w in weights] == [[7, 11], None, [7, 11]]


def test_a_second_pass_backward_counts_no_gradient_twice():
    x = torch.tensor([3.0], requires_grad=True)
    [[first], [second]] = side_by_side([Job(lambda y: [2 * y], (x,)), Job(lambda y: [5 * y], (x,))])
    first.sum().backward(retain_graph=True)
    assert x.grad.item() == 2
    second.sum().backward()
    assert x.grad.item() == 7


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_each_thread_has_about_half_of_the_work(costs):
    halves = _halves(costs)
    assert sorted(n for half in halves for n in half) == list(range(len(costs)))
    first, second = (sum(costs[n] for n in half) for half in halves)
    assert 0 <= first - second <= max(costs) * (1 + 1e-9)


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
