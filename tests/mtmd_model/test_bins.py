"""Numbers to bins: equal shares of the window, no empty bin, a large window sampled evenly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtmd_model import encoder as encoders
from mtmd_model.bins import Bins
from mtmd_model.encoder import Encoder, fit_encoder
from mtmd_model.id_dropout import IdDropout
from mtmd_model.schema import Feature, Schema
from mtmd_model.vocabulary import FIRST, MISSING
from tests.mtmd_model.sample import SURFACES, examples, platform

NAN = float("nan")
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=False)


def binned(bins: int = 8, min_count: int | None = None) -> Schema:
    """The sample's platform; its first query feature is read in bins too."""
    feature = Feature("q0 in bins", "query", "categorical", SURFACES, width=3, min_count=min_count, bins=bins, of="q0")
    return replace(platform(), features=(*platform().features, feature))


def edges(encoder: Encoder) -> NDArray[np.float64]:
    fitted = encoder.vocabularies["q0 in bins"]
    assert isinstance(fitted, Bins)
    return np.array(fitted.edges)


def column(encoder: Encoder, name: str) -> int:
    """Its place among the ids of its side."""
    [feature] = [f for f in encoder.schema.features if f.name == name]
    return [f.name for f in encoder.schema.side(feature.side) if f.kind == "categorical"].index(name)


@given(st.lists(FLOATS, max_size=60), st.integers(2, 12), st.lists(FLOATS, max_size=20))
def test_bins_are_in_order_and_none_is_empty(window: list[float], bins: int, others: list[float]):
    numbers = np.array(window, np.float32)
    fitted = Bins.fit(numbers, bins)
    assert len(fitted.edges) < bins
    rows = fitted.lookup(numbers)
    observed = ~np.isnan(numbers)
    assert (rows[~observed] == MISSING).all()
    if observed.any():
        assert set(rows[observed]) == set(range(FIRST, fitted.rows)), "each bin has a row that trains it"
    order = np.sort(np.array([x for x in window + others if x == x], np.float32))
    found = fitted.lookup(order)
    assert (np.diff(found) >= 0).all()
    assert all(FIRST <= row < fitted.rows for row in found)


def test_bins_have_equal_shares():
    numbers = np.random.default_rng(0).lognormal(3, 2, 10_000).astype(np.float32)
    rows = Bins.fit(numbers, 10).lookup(numbers)
    assert np.bincount(rows - FIRST).tolist() == pytest.approx([1000] * 10, abs=1)


def test_what_half_of_the_rows_have_is_one_bin():
    numbers = np.array([0.0] * 50 + list(range(1, 51)), np.float32)
    fitted = Bins.fit(numbers, 10)
    rows = fitted.lookup(numbers)
    assert len(set(rows[:50])) == 1
    assert rows[50] != rows[0], "the bin of zeros has nothing else"
    assert fitted.lookup(np.array([-7, 1e9, NAN], np.float32)).tolist() == [FIRST, fitted.rows - 1, MISSING]


@pytest.mark.parametrize("numbers", [[], [NAN, NAN]])
def test_without_numbers_there_is_one_bin(numbers: list[float]):
    fitted = Bins.fit(np.array(numbers, np.float32), 10)
    assert fitted == Bins(())
    assert fitted.lookup(np.array([3, NAN], np.float32)).tolist() == [FIRST, MISSING]


def test_the_window_decides_the_bins_and_a_manifest_keeps_them(write: Callable[[pa.Table], Path]):
    table = examples(600)
    first, second = write(table.slice(0, 150)), write(table.slice(150))
    encoder = fit_encoder(binned(), [first, second])
    assert fit_encoder(binned(), [second, first]) == encoder
    schema = Schema.from_dict(json.loads(json.dumps(encoder.schema.to_dict())))
    assert Encoder.from_dict(schema, json.loads(json.dumps(encoder.to_dict()))) == encoder

    batch = encoder.encode(table)
    numbers = table["q0"].to_numpy(zero_copy_only=False)
    rows = batch.query.ids[:, column(encoder, "q0 in bins")].numpy()
    shares = np.bincount(rows[~np.isnan(numbers)] - FIRST, minlength=8)
    assert shares.tolist() == pytest.approx([shares.mean()] * 8, abs=1.5)
    assert (rows == MISSING).tolist() == np.isnan(numbers).tolist()
    # the number itself is read as before
    plain = fit_encoder(platform(), [first, second]).encode(table)
    assert torch.equal(batch.query.dense.nan_to_num(), plain.query.dense.nan_to_num())


def test_a_large_window_is_sampled_over_all_of_its_files(write: Callable[[pa.Table], Path], monkeypatch):
    files = [write(examples(401, seed)) for seed in range(3)]
    whole = edges(fit_encoder(binned(4), files))
    monkeypatch.setattr(encoders, "SAMPLED_ROWS", 350)
    monkeypatch.setattr(encoders, "READ_ROWS", 63)
    feature = binned().features[-1]
    taken = encoders._sample([feature], files)[feature.name]
    numbers = np.concatenate([t["q0"].to_numpy() for t in encoders.read_tables(files, ["q0"])]).astype(np.float32)
    assert np.array_equal(taken, numbers[::4], equal_nan=True)
    assert np.abs(edges(fit_encoder(binned(4), files)) - whole).max() < 0.5 * np.nanstd(numbers)


def test_a_training_file_without_the_column_is_refused(write: Callable[[pa.Table], Path]):
    with pytest.raises(ValueError, match="'q0'"):
        fit_encoder(binned(), [write(examples(50).drop_columns(["q0"]))])
    with pytest.raises(ValueError, match="needs one of"):
        fit_encoder(binned(min_count=2), [write(examples(50))])


def test_bins_are_never_forgotten(write: Callable[[pa.Table], Path]):
    """Id dropout is for ids that tomorrow brings anew; a number's bin is known for ever."""
    encoder = fit_encoder(binned(), [write(examples(300))])
    batch = encoder.encode(examples(300))
    dropped = IdDropout(encoder.schema, 0.9).train()(batch)
    place = column(encoder, "q0 in bins")
    assert torch.equal(dropped.query.ids[:, place], batch.query.ids[:, place])
    assert not torch.equal(dropped.query.ids, batch.query.ids)
