"""Values to rows, numbers and labels: the same value means the same thing whatever file it comes from."""

import datetime as dt
import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtmd_model.encoder import Encoder, fit_encoder, to_float
from mtmd_model.schema import Schema
from mtmd_model.vocabulary import Vocabulary, stable_hash
from tests.mtmd_model.sample import examples, platform

NAN = float("nan")
# Of "0", "12", "-7", "home", "007", nineteen ones and "": a change makes stored models read wrong rows.
HASHES = [
    16294208416658607535,
    10682531704454680323,
    7790691224305936752,
    10613392714040239015,
    13655456112802015817,
    3244184679137261961,
    13020603013274838756,
]
TWELVE = [
    pa.array([12, None, 5], pa.int8()),
    pa.array([12, None, 5], pa.uint16()),
    pa.array([12, None, 5], pa.int32()),
    pa.array([12, None, 5], pa.int64()),
    pa.array([12, None, 5], pa.uint64()),
    pa.array([12.0, NAN, 5.0], pa.float32()),
    pa.array([12.0, None, 5.0], pa.float64()),
    pa.array([Decimal("12.00"), None, Decimal("5.00")], pa.decimal128(9, 2)),
    pa.array(["12", None, "5"], pa.string()),
    pa.array(["12", None, "5"], pa.large_string()),
    pa.array(["12", None, "5"], pa.string_view()),
    pa.array(["12", None, "5"]).dictionary_encode(),
    pa.array([12, None, 5], pa.int16()).dictionary_encode(),
]


@pytest.mark.parametrize("column", TWELVE, ids=lambda c: str(c.type))
@pytest.mark.parametrize("vocabulary", [Vocabulary(("7", "12")), Vocabulary(buckets=1000)], ids=["values", "buckets"])
def test_one_value_has_one_row_whatever_its_type(column: pa.Array, vocabulary: Vocabulary):
    rows = vocabulary.lookup(pa.chunked_array([column]))
    expected = vocabulary.lookup(pa.array([12, None, 5], pa.int64()))
    assert rows.tolist() == expected.tolist()
    assert rows[1] == 0
    assert rows[0] >= 2
    assert (rows[2] == 1) == (vocabulary.values is not None)


def test_hash_is_stable_for_ever():
    got = stable_hash(pa.array(["0", "12", "-7", "home", "007", "1" * 19, ""])).tolist()
    assert got == HASHES


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_integers_hash_as_their_strings(values: list[int]):
    vocabulary = Vocabulary(buckets=10_000)
    as_numbers = vocabulary.lookup(pa.array(values, pa.int64()))
    assert as_numbers.tolist() == vocabulary.lookup(pa.array([str(v) for v in values])).tolist()
    assert as_numbers.tolist() == [int(vocabulary.lookup(pa.array([v], pa.int64()))[0]) for v in values]


@settings(max_examples=50, deadline=None)
@given(
    st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), unique=True),
        st.lists(st.integers(-30, 30), unique=True),
        st.lists(st.integers(10**18 - 50, 10**18 - 1), unique=True),
    ),
    st.lists(st.one_of(st.none(), st.integers(-40, 40), st.integers(-(2**63), 2**63 - 1))),
)
def test_known_integers_are_found_as_their_strings(known: list[int], others: list[int | None]):
    vocabulary = Vocabulary(tuple(map(str, [*known, "a", "007"])))
    column = pa.array([*known, *others], pa.int64())
    rows = vocabulary.lookup(column)
    assert rows.dtype == np.int32
    assert rows.tolist() == vocabulary.lookup(column.cast(pa.string())).tolist()
    assert rows[: len(known)].tolist() == list(range(2, 2 + len(known)))


def test_known_integers_that_lie_apart_are_found():
    far = 10**18 - 1
    vocabulary = Vocabulary(tuple(map(str, [7, -far, far, 0])))
    column = pa.chunked_array([pa.array([-far, -far + 1, None, 0, 1]), pa.array([6, 7, 8, far - 1, far])])
    assert vocabulary.lookup(column).tolist() == [3, 1, 0, 5, 1, 1, 2, 1, 1, 4]


def test_buckets_are_used_evenly():
    rows = Vocabulary(buckets=100).lookup(pa.array(range(100_000)))
    assert rows.min() == 2
    assert rows.max() == 101
    assert np.bincount(rows)[2:].min() > 800


def test_other_types():
    rows = Vocabulary(("true", "2026-01-02", "1.5"))
    assert rows.lookup(pa.array([True, False, None])).tolist() == [2, 1, 0]
    assert rows.lookup(pa.array([dt.date(2026, 1, 2), None])).tolist() == [3, 0]
    assert rows.lookup(pa.array([Decimal("1.50")])).tolist() == rows.lookup(pa.array([1.5])).tolist() == [4]
    assert rows.lookup(pa.nulls(2)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="list"):
        rows.lookup(pa.array([[1], [2]]))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.5, None, NAN, float("inf"), float("-inf")]), [1.5, NAN, NAN, NAN, NAN]),
        (pa.array([1, None], pa.uint64()), [1, NAN]),
        (pa.array([2**63 - 1], pa.int64()), [2.0**63]),
        (pa.array([True, False, None]), [1, 0, NAN]),
        (pa.array([Decimal("1.25")]), [1.25]),
        (pa.array([dt.date(1970, 1, 3), None]), [2, NAN]),
        (pa.array([dt.datetime(1970, 1, 1, 0, 1)], pa.timestamp("ms")), [60]),
        (pa.array([3, None, 3]).dictionary_encode(), [3, NAN, 3]),
        (pa.nulls(1), [NAN]),
        (pa.array([1.5], pa.float16()), [1.5]),
    ],
    ids=lambda c: str(c.type) if isinstance(c, pa.Array) else "",
)
def test_numbers(column: pa.Array, expected: list[float]):
    np.testing.assert_array_equal(to_float(pa.chunked_array([column]), "x"), np.array(expected, np.float32))


def test_log1p_keeps_the_sign():
    got = to_float(pa.chunked_array([[-3.0, 0.0, 3.0]]), "x", log1p=True)
    np.testing.assert_allclose(got, [-np.log(4), 0, np.log(4)], rtol=1e-6)


def test_only_the_log1p_column_is_encoded_by_it(encoder: Encoder):
    table = replaced(replaced(examples(2), "q0", [np.e - 1, -7.0]), "q1", [np.e - 1, -7.0])
    dense = encoder.encode(table).query.dense[:, :2]
    torch.testing.assert_close(dense, torch.tensor([[1.0, np.e - 1], [-np.log(8), -7.0]], dtype=torch.float32))


def test_text_is_no_number():
    with pytest.raises(ValueError, match="'x' must hold numbers, got string"):
        to_float(pa.chunked_array([["a"]]), "x")


@pytest.fixture(scope="module")
def encoder(write: Callable[[pa.Table], Path]) -> Encoder:
    return fit_encoder(platform(), [write(examples(500))])


def test_learned_vocabulary_counts_the_window(write: Callable[[pa.Table], Path]):
    table = examples(400)
    first, second = write(table.slice(0, 150)), write(table.slice(150))
    encoder = fit_encoder(platform(), [first, second])
    counts = table["brand"].drop_null().value_counts().to_pylist()
    expected = sorted(str(c["values"]) for c in counts if c["counts"] >= 3)
    assert encoder.vocabularies["brand"] == Vocabulary(tuple(expected))
    assert fit_encoder(platform(), [second, first]) == encoder


def test_json_roundtrip(encoder: Encoder):
    schema = Schema.from_dict(json.loads(json.dumps(encoder.schema.to_dict())))
    again = Encoder.from_dict(schema, json.loads(json.dumps(encoder.to_dict())))
    assert again == encoder


def test_labels_are_missing_where_the_task_does_not_exist(encoder: Encoder):
    table = examples(100)
    octr = pa.array(np.full(100, 0.5))  # also given for shopping, where it does not exist
    batch = encoder.encode(table.set_column(table.column_names.index("score_octr"), "score_octr", octr))
    shopping = torch.from_numpy(np.array(table["product"].to_pylist()) == "shopping")
    assert torch.equal(batch.labels[:, 2].isnan(), shopping)
    assert torch.equal(batch.labels[:, 3].isnan(), ~shopping)
    assert not batch.labels[:, :2].isnan().any()
    assert encoder.encode(table, labels=False).labels.isnan().all()


def test_each_side_needs_only_its_own_columns(encoder: Encoder):
    table = examples(50)
    whole = encoder.encode(table)
    query = encoder.encode_side(table.drop_columns(["product", "score_ctr", "price"]), "query")
    item = encoder.encode_side(table.drop_columns(["surface", "device"]), "item")
    torch.testing.assert_close(query.dense, whole.query.dense, equal_nan=True)
    assert torch.equal(query.ids, whole.query.ids)
    assert torch.equal(item.ids, whole.item.ids)


def test_domains_may_be_stored_in_any_way(encoder: Encoder):
    table = examples(50)
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        column = pa.array(table["surface"].to_pylist()).cast(kind)
        again = encoder.encode(table.set_column(0, "surface", column))
        assert torch.equal(again.query.domain, encoder.encode(table).query.domain)


def replaced(table: pa.Table, name: str, values: list) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("surface", ["mars", "home"], "surface must be one of .* got .'mars'."),
        ("surface", [None, "home"], "got .None."),
        ("score_ctr", [0.5, 1.5], "'score_ctr' must lie in"),
        ("score_ctr", [0.5, float("inf")], "'score_ctr' must lie in"),
        ("score_ctr", [float("-inf"), None], "'score_ctr' must lie in"),
        ("score_ctr", [0.5, 1e300], "'score_ctr' must lie in"),
        ("weight", [1.0, -1.0], "'weight' must not be negative"),
        ("weight", [1.0, None], "null"),
        ("device", [[1], [2]], "'device'.*list"),
    ],
)
def test_wrong_values_are_refused(encoder: Encoder, name: str, values: list, message: str):
    with pytest.raises(ValueError, match=message):
        encoder.encode(replaced(examples(2), name, values))


@pytest.mark.parametrize("name", ["surface", "q0", "category", "score_cvr"])
def test_a_missing_column_is_named(encoder: Encoder, name: str):
    with pytest.raises(ValueError, match=f"lacks the columns? .*'{name}'"):
        encoder.encode(examples(5).drop_columns([name]))


def test_counts_add_up_over_many_files_and_types(write: Callable[[pa.Table], Path]):
    schema, files, expected = platform(), [], []
    for day in range(6):
        rng = np.random.default_rng(day)
        ids = rng.integers(0, 60, 80)
        column = pa.array(ids) if day % 2 else pa.array([str(v) for v in ids])
        files.append(write(examples(80, day).drop_columns(["item_id"]).append_column("item_id", column)))
        expected += ids.tolist()
    once = {str(v) for v in expected if expected.count(v) >= 2}
    assert fit_encoder(schema, files).vocabularies["item_id"] == Vocabulary(tuple(sorted(once)))


def test_a_schema_of_unknown_slices_or_domains_is_refused():
    schema = platform()
    wrong_task = replace(schema.tasks[0], slices=(("home", "standard"), ("mars", "standard")))
    with pytest.raises(ValueError, match=r"task 'ctr' has the unknown slices .*mars"):
        replace(schema, tasks=(wrong_task, *schema.tasks[1:]))
    with pytest.raises(ValueError, match="feature 'q0' must have domains among"):
        replace(schema, features=(replace(schema.features[0], domains=("standard",)),))
