"""From Arrow tables to tensors: vocabularies, numbers, labels.

Shapes: N rows, F dense features, C categorical features, T tasks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mtmd_model.batch import Batch, TowerInput
from mtmd_model.bins import Bins
from mtmd_model.schema import Feature, Schema, Side
from mtmd_model.slices import existing_slices
from mtmd_model.vocabulary import Vocabulary, canonical, distinct

DOMAIN_COLUMN: Mapping[Side, str] = {"query": "surface", "item": "product"}
WEIGHT = "weight"
SAMPLED_ROWS = 1_000_000
"""Of a window, for the edges of bins: of them a bin of a thousandth has a thousand."""
READ_ROWS = 1 << 15
"""Rows read and encoded at a time: their columns fit a processor's cache, in which they become rows."""


def score_column(task: str) -> str:
    """The column of P(task | impression) by the heavyweight ranker."""
    return f"score_{task}"


@dataclass(frozen=True)
class Encoder:
    """How one model version reads a table; fitted on its training window and stored in its manifest."""

    schema: Schema
    vocabularies: Mapping[str, Vocabulary | Bins]
    """By categorical feature."""

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each categorical feature's embedding table."""
        return {name: v.rows for name, v in self.vocabularies.items()}

    def columns(self, labels: bool = True) -> list[str]:
        """The columns to read from a file."""
        scores = [score_column(t.name) for t in self.schema.tasks]
        names = [*DOMAIN_COLUMN.values(), *(f.column for f in self.schema.features)]
        return list(dict.fromkeys(names + ([*scores, WEIGHT] if labels else [])))

    def empty(self, rows: int) -> Batch:
        """As many rows, to be filled by `encode`."""
        query, item = (self._empty_side(rows, side) for side in DOMAIN_COLUMN)
        return Batch(query, item, torch.empty(rows, len(self.schema.tasks)), torch.empty(rows))

    def _empty_side(self, rows: int, side: Side) -> TowerInput:
        kinds = [f.kind for f in self.schema.side(side)]
        dense = torch.empty(rows, kinds.count("dense"))
        ids = torch.empty(rows, kinds.count("categorical"), dtype=torch.int32)
        return TowerInput(dense, ids, torch.empty(rows, dtype=torch.int64))

    def encode(self, table: pa.Table, labels: bool = True, out: Batch | None = None) -> Batch:
        """Both towers' inputs, labels and weights of a table's rows.

        A label is NaN where it is null, or where the task does not exist in the row's slice. Without a column
        `weight` every row weighs one.

        Args:
            labels: if not, no `score_` column is read, and every label is NaN.
            out: as many rows, to be filled and returned; new ones if None.

        Raises:
            ValueError: a missing column, an unknown surface or product, a label outside [0, 1], a negative or
                null weight, or a column of a type that cannot be read as what the platform says it is.
        """
        # numpy throughout: a feed encodes in a thread of its own, where torch would start another team of threads
        out = self.empty(table.num_rows) if out is None else out
        query, item = self.encode_side(table, "query", out.query), self.encode_side(table, "item", out.item)
        label_NT, weight_N = out.labels.numpy(), out.weight.numpy()
        label_NT.fill(np.nan)
        weight_N.fill(1)
        if labels:
            for t, task in enumerate(self.schema.tasks):
                label_NT[:, t] = _score(table, score_column(task.name))
            exists_NT = self._exists_SPT[query.domain.numpy(), item.domain.numpy()]
            np.copyto(label_NT, np.nan, where=~exists_NT)
            if WEIGHT in table.column_names:
                weight = to_float(table[WEIGHT], WEIGHT)
                if np.isnan(weight).any() or (weight < 0).any():
                    raise ValueError(f"{WEIGHT!r} must not be negative, null or infinite")
                weight_N[:] = weight
        return out

    def encode_side(self, table: pa.Table, side: Side, out: TowerInput | None = None) -> TowerInput:
        """One tower's input of a table's rows; the other side's columns need not be there.

        Args:
            out: as in `encode`.

        Raises:
            ValueError: as `encode`.
        """
        features = self.schema.side(side)
        wanted = [DOMAIN_COLUMN[side], *dict.fromkeys(f.column for f in features)]
        given = table.column_names
        missing = [name for name in wanted if name not in given]
        if missing:
            raise ValueError(f"the table lacks the columns {missing}; it has {given}")
        out = self._empty_side(table.num_rows, side) if out is None else out
        dense_NF, ids_NC = out.dense.numpy(), out.ids.numpy()
        for n, f in enumerate(f for f in features if f.kind == "dense"):
            dense_NF[:, n] = to_float(table[f.column], f.column, f.log1p)
        for n, f in enumerate(f for f in features if f.kind == "categorical"):
            ids_NC[:, n] = self._ids(table, f)
        out.domain.numpy()[:] = self._domains(table, side)
        return out

    def _ids(self, table: pa.Table, feature: Feature) -> NDArray[np.int32]:
        known, column = self.vocabularies[feature.name], table[feature.column]
        if isinstance(known, Bins):
            return known.lookup(to_float(column, feature.column, feature.log1p))
        try:
            return known.lookup(column)
        except ValueError as error:
            raise ValueError(f"column {feature.column!r}: {error}") from None

    def _domains(self, table: pa.Table, side: Side) -> NDArray[np.int64]:
        """(N,) index of each row's surface or product."""
        name, known = DOMAIN_COLUMN[side], self.schema.domains(side)
        uniques, index = distinct(table[name])
        strings = canonical(uniques).to_pylist()
        unknown = [s for s in strings if s not in known]
        if unknown or (index < 0).any():
            raise ValueError(f"{name} must be one of {list(known)}, got {unknown or [None]}")
        place = np.array([known.index(s) for s in strings], np.int64)
        return place[index] if len(place) else np.zeros(0, np.int64)

    @cached_property
    def _exists_SPT(self) -> NDArray[np.bool_]:
        return np.ascontiguousarray(existing_slices(self.schema).permute(1, 2, 0).numpy())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form without the schema; `from_dict` reads it back."""
        return {name: asdict(v) for name, v in self.vocabularies.items()}

    @classmethod
    def from_dict(cls, schema: Schema, d: Mapping[str, Any]) -> "Encoder":
        """Inverse of `to_dict`, also after a trip through JSON."""
        return cls(schema, {name: _vocabulary_or_bins(v) for name, v in d.items()})


def _vocabulary_or_bins(d: Mapping[str, Any]) -> Vocabulary | Bins:
    if "edges" in d:
        return Bins(tuple(d["edges"]))
    return Vocabulary(None if d["values"] is None else tuple(d["values"]), d["buckets"])


def fit_encoder(schema: Schema, files: Sequence[str | Path]) -> Encoder:
    """Learn from the training window's files the vocabularies of the features with a `min_count`, and the edges of `bins`.

    Raises:
        ValueError: a categorical feature without exactly one of vocabulary, buckets, min_count and bins, or a
            feature that a file does not have.
    """
    categorical = [f for f in schema.features if f.kind == "categorical"]
    for f in categorical:
        given = [k for k in ("vocabulary", "buckets", "min_count", "bins") if getattr(f, k) is not None]
        if len(given) != 1:
            raise ValueError(f"feature {f.name!r} needs one of vocabulary, buckets, min_count and bins, got {given}")
    counts = _count([f.column for f in categorical if f.min_count is not None], files)
    numbers = _sample([f for f in categorical if f.bins is not None], files)
    vocabularies: dict[str, Vocabulary | Bins] = {}
    for f in categorical:
        if f.min_count is not None:
            found = counts[f.column]
            frequent = found.filter(pc.greater_equal(found["n"], f.min_count))["value"].to_pylist()
            vocabularies[f.name] = Vocabulary(tuple(sorted(frequent)))
        elif f.bins is not None:
            vocabularies[f.name] = Bins.fit(numbers[f.name], f.bins)
        else:
            vocabularies[f.name] = Vocabulary(f.vocabulary, f.buckets)
    return Encoder(schema, vocabularies)


def read_tables(files: Iterable[str | Path], columns: Sequence[str]) -> Iterator[pa.Table]:
    """The files' rows in order, at most `READ_ROWS` at a time; columns that a file lacks are left out."""
    for path in files:
        yield from _read(path, None, columns)


def group_sizes(path: str | Path) -> list[int]:
    """Rows of each row group of a file."""
    footer = pq.read_metadata(path)
    return [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]


def read_group(path: str | Path, number: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of one row group, as `read_tables`."""
    return _read(path, [number], columns)


def _read(path: str | Path, groups: Sequence[int] | None, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Opened one by one: a dataset would read the hive folder's `ds` into the table."""
    footer = pq.read_metadata(path)
    stored = {footer.schema.column(n).path for n in range(footer.num_columns)}
    # text as the codes that the file has anyway: no value is copied row by row
    coded = [name for name in columns if name in stored]
    with pq.ParquetFile(path, metadata=footer, read_dictionary=coded) as file:
        for batch in file.iter_batches(READ_ROWS, groups, list(columns)):
            yield pa.Table.from_batches([batch])


def to_float(column: pa.ChunkedArray, name: str, log1p: bool = False) -> NDArray[np.float32]:
    """(N,) float32; null, NaN and infinity become NaN. Days since 1970 for a date, seconds for a time.

    Raises:
        ValueError: a type that is not a number.
    """
    if pa.types.is_float32(column.type) and not log1p:
        out = column.to_numpy()
    else:
        x = _numbers(column, name)
        if log1p:
            x = np.copysign(np.log1p(np.abs(x)), x)
        with np.errstate(over="ignore"):
            out = x.astype(np.float32)
    infinite = np.isinf(out)
    return np.where(infinite, np.float32("nan"), out) if infinite.any() else out


def _numbers(column: pa.ChunkedArray, name: str) -> NDArray[np.float64]:
    """(N,) float64, NaN where null."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    column = column.cast(kind)
    if pa.types.is_date(kind):
        column = column.cast(pa.date32()).cast(pa.int32())
    elif pa.types.is_timestamp(kind):
        column = pc.divide(column.cast(pa.timestamp("us", kind.tz)).cast(pa.int64()).cast(pa.float64()), 1e6)
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ValueError(f"column {name!r} must hold numbers, got {kind}")
    if pa.types.is_uint64(kind) or pa.types.is_int64(kind):
        column = pc.cast(column, pa.float64(), safe=False)
    return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)


def _score(table: pa.Table, name: str) -> NDArray[np.float32]:
    if name not in table.column_names:
        raise ValueError(f"the table lacks the column {name!r}; it has {table.column_names}")
    score = _numbers(table[name], name)  # before infinity becomes missing
    if ((score < 0) | (score > 1)).any():
        raise ValueError(f"{name!r} must lie in [0, 1], got {np.nanmin(score)} to {np.nanmax(score)}")
    return score.astype(np.float32)


def _count(names: Sequence[str], files: Sequence[str | Path]) -> dict[str, pa.Table]:
    """How often each canonical value of each column occurs: `value`, `n`."""
    empty = pa.table({"value": pa.array([], pa.large_string()), "n": pa.array([], pa.int64())})
    merged = dict.fromkeys(names, empty)
    pending: dict[str, list[pa.Table]] = {name: [] for name in names}
    for table in _training_tables(names, files):
        for name in names:
            uniques, index = distinct(table[name])
            seen = np.bincount(index[index >= 0], minlength=len(uniques))
            pending[name].append(pa.table({"value": canonical(uniques), "n": pa.array(seen, pa.int64())}))
            # merged whenever it has doubled: neither every time nor all at the end
            if sum(len(part) for part in pending[name]) > len(merged[name]):
                merged[name], pending[name] = _sum_counts([merged[name], *pending[name]]), []
    return {name: _sum_counts([merged[name], *pending[name]]) for name in names}


def _sample(features: Sequence[Feature], files: Sequence[str | Path]) -> dict[str, NDArray[np.float32]]:
    """Each feature's numbers, of every row or of rows at equal distances, at most `SAMPLED_ROWS`."""
    rows = sum(sum(group_sizes(path)) for path in files) if features else 0
    step, start = -(-rows // SAMPLED_ROWS) or 1, 0
    parts: dict[str, list[NDArray[np.float32]]] = {f.name: [] for f in features}
    for table in _training_tables([f.column for f in features], files):
        for f in features:
            parts[f.name].append(to_float(table[f.column], f.column, f.log1p)[-start % step :: step])
        start += len(table)
    return {name: np.concatenate([*found, np.empty(0, np.float32)]) for name, found in parts.items()}


def _training_tables(names: Sequence[str], files: Sequence[str | Path]) -> Iterator[pa.Table]:
    """As `read_tables`, all of which have to have the columns; none if there are no names."""
    for table in read_tables(files, names) if names else ():
        missing = [name for name in names if name not in table.column_names]
        if missing:
            raise ValueError(f"a training file lacks the columns {missing}; it has {table.column_names}")
        yield table


def _sum_counts(parts: Sequence[pa.Table]) -> pa.Table:
    """One row a value, null left out."""
    whole = pa.concat_tables(parts)
    summed = whole.filter(pc.is_valid(whole["value"])).group_by("value").aggregate([("n", "sum")])
    return pa.table({"value": summed["value"], "n": summed["n_sum"]})
