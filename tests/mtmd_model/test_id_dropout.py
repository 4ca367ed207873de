"""Ids that training takes for unknown ones."""

import math
from dataclasses import replace

import pytest
import torch

from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.id_dropout import IdDropout
from mtmd_model.train import TrainConfig
from mtmd_model.vocabulary import MISSING, UNKNOWN
from tests.mtmd_model.sample import examples, platform

OPEN_ENDED = {"term", "user_id", "brand", "item_id"}
"""What the platform lists no values of."""


@pytest.fixture(scope="module")
def encoder(write) -> Encoder:
    return fit_encoder(platform(), [write(examples(300))])


def columns(encoder, batch):
    """Feature -> its ids."""
    found = {}
    for side, x in (("query", batch.query), ("item", batch.item)):
        names = [f.name for f in encoder.schema.side(side) if f.kind == "categorical"]
        found |= dict(zip(names, x.ids.unbind(1), strict=True))
    return found


def test_open_ended_ids_become_unknown_at_the_rate_and_nothing_else_changes(encoder):
    torch.manual_seed(0)
    batch = encoder.encode(examples(5000))
    out = IdDropout(encoder.schema, 0.3).train()(batch)
    before, after = columns(encoder, batch), columns(encoder, out)
    assert before.keys() > OPEN_ENDED
    for name, ids in before.items():
        changed = after[name] != ids
        if name not in OPEN_ENDED:
            assert not changed.any(), name
            continue
        assert (after[name][changed] == UNKNOWN).all()
        assert not changed[ids == MISSING].any(), "what is missing stays missing"
        known = ids > UNKNOWN
        expected, rows = 0.3, int(known.sum())
        assert abs(changed[known].float().mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / rows), name
    assert after["user_id"].dtype == before["user_id"].dtype
    for side in ("query", "item"):
        a, b = getattr(batch, side), getattr(out, side)
        assert torch.equal(a.domain, b.domain)
        assert torch.equal(a.dense.nan_to_num(), b.dense.nan_to_num())


def test_evaluation_and_a_rate_of_zero_leave_the_batch_alone(encoder):
    batch = encoder.encode(examples(50))
    assert IdDropout(encoder.schema, 0.9).eval()(batch) is batch
    assert IdDropout(encoder.schema, 0.0).train()(batch) is batch


def test_rows_sorted_already_stay_sorted(encoder):
    batch = encoder.encode(examples(50))
    query = batch.query.prepare(len(encoder.schema.surfaces))
    out = IdDropout(encoder.schema, 0.5).train()(replace(batch, query=query))
    assert not torch.equal(out.query.ids, query.ids)
    assert out.query.groups is query.groups


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_other_rates_are_refused(rate):
    with pytest.raises(ValueError, match="id_dropout"):
        TrainConfig(id_dropout=rate)
