"""What the parts of a trained model do, measured on models whose parts do nothing, and on vectors of known rank."""

from datetime import date

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.parts import directions, report, towers
from mtmd_assets import model_store
from mtmd_model.cross import LowRankCross
from mtmd_model.squeeze_excitation import SqueezeExcitation

TRAINED, EVALUATED = date(2026, 1, 3), date(2026, 1, 4)


def test_parts_that_do_nothing_measure_as_nothing(pipeline):
    model = model_store.load(pipeline.site, model_store.trained_on(pipeline.site, TRAINED))
    rows = pq.read_table(pipeline.site.warehouse.path("joined_examples", EVALUATED), partitioning=None)
    before = towers(model, rows)
    assert [side for side, *_ in before] == ["query", "item"]
    assert all(float(x) > 0 for row in before for x in row[1:])
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, SqueezeExcitation):
                module.excite.weight.zero_()
                module.excite.bias.zero_()
            if isinstance(module, LowRankCross):
                for p in module.ups.parameters():
                    p.zero_()
    assert [[from_1, by_row, cross] for _, from_1, by_row, _, cross in towers(model, rows)] == [["0.000"] * 3] * 2
    assert "| ctr |" in report(model, rows)


def test_directions_are_those_in_which_both_sides_vary():
    rng = np.random.default_rng(0)
    query_ND, item_ND = rng.normal(size=(500, 6)), rng.normal(size=(400, 6))
    assert directions(query_ND, item_ND, share=0.999) == 6
    item_ND[:, 3:] = 7.0  # where every item is alike a query only moves all its logits
    assert directions(query_ND, item_ND) == 3
    query_ND[:, 0] *= 100
    assert directions(query_ND, item_ND) == 1
