"""From the values of a categorical column to rows of an embedding table.

A value is known by its canonical string: 12, 12.0 and "12" are one value, whatever type a file stores it in.
Row 0 is a missing value, row 1 one that the vocabulary does not know.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

MISSING, UNKNOWN, FIRST = 0, 1, 2

# Integers of up to 18 digits fit int64, and are hashed as numbers: a column of ids needs no strings.
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"
_LARGEST = 10**18 - 1

NEARBY = 1 << 20
"""Span of known integers up to which a table has a place for each."""


@dataclass(frozen=True)
class Vocabulary:
    """Either the values that have a row of their own, or a number of hash buckets.

    Raises:
        ValueError: both or neither, repeated values, or no bucket.
    """

    values: tuple[str, ...] | None = None
    buckets: int | None = None

    def __post_init__(self) -> None:
        if (self.values is None) == (self.buckets is None):
            raise ValueError(f"give either values or buckets, got {self.values!r} and {self.buckets!r}")
        if self.values is not None and len(set(self.values)) < len(self.values):
            raise ValueError(f"values must not repeat, got {sorted(self.values)}")
        if self.buckets is not None and self.buckets < 1:
            raise ValueError(f"buckets must be 1 or more, got {self.buckets}")

    @property
    def rows(self) -> int:
        """Rows of the embedding table, counting missing and unknown."""
        return FIRST + (len(self.values) if self.values is not None else self.buckets or 0)

    @cached_property
    def _row(self) -> dict[str, int]:
        """Built once: Arrow's `index_in` hashes all values again at every call."""
        return {value: row for row, value in enumerate(self.values or (), FIRST)}

    @cached_property
    def _integers(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The values that are integers of up to 18 digits, sorted, and the row of each."""
        strings = pa.array(self.values or (), pa.large_string())
        whole = pc.match_substring_regex(strings, _INTEGER).to_numpy(zero_copy_only=False)
        numbers = strings.filter(pa.array(whole)).cast(pa.int64()).to_numpy()
        order = np.argsort(numbers)
        return numbers[order], (np.flatnonzero(whole)[order] + FIRST).astype(np.int32)

    @cached_property
    def _every(self) -> NDArray[np.int32] | None:
        """The row of every integer from one before the least known to one after the largest; None if they lie apart."""
        known, row = self._integers
        span = int(known[-1]) - int(known[0]) + 1
        if span > max(NEARBY, 16 * len(known)):
            return None
        rows = np.full(span + 2, UNKNOWN, np.int32)
        rows[known - known[0] + 1] = row
        return rows

    def lookup(self, column: pa.ChunkedArray | pa.Array) -> NDArray[np.int32]:
        """The row of each value, (N,).

        Raises:
            ValueError: a type that holds no categories, such as a list.
        """
        if pa.types.is_integer(column.type):
            fast = _small_integers(column)
            if fast is not None:
                rows = self._rows_of_integers(fast)
                return np.where(_valid(column), rows, np.int32(MISSING)) if column.null_count else rows
        uniques, index = distinct(column)
        # one more entry, for the index -1 of a missing value
        rows = np.append(self._rows_of(canonical(uniques)), np.int32(MISSING))
        return rows[index]

    def _rows_of_integers(self, numbers: NDArray[np.int64]) -> NDArray[np.int32]:
        """The row of each integer of up to 18 digits."""
        if self.buckets is not None:
            return (_mix(numbers) % np.uint64(self.buckets)).astype(np.int32) + np.int32(FIRST)
        known, row = self._integers
        if not len(known):
            return np.full(len(numbers), UNKNOWN, np.int32)
        if self._every is not None:
            return self._every[(numbers - (known[0] - 1)).clip(0, len(self._every) - 1)]
        place = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        return np.where(known[place] == numbers, row[place], np.int32(UNKNOWN))

    def _rows_of(self, strings: pa.Array) -> NDArray[np.int32]:
        """The row of each distinct canonical string; null is missing."""
        if self.values is not None:
            found = (self._row.get(value, UNKNOWN) for value in strings.to_pylist())
            rows = np.fromiter(found, np.int32, len(strings))
        else:
            rows = (stable_hash(strings) % np.uint64(self.buckets or 1)).astype(np.int32) + FIRST
        return np.where(_valid(strings), rows, MISSING).astype(np.int32)


def distinct(column: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """The distinct values of a column, and the index of each row's value among them, -1 where it is null."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        return _distinct_codes(column)
    if _is_text(column.type):
        column = column.cast(pa.large_string())
    if pa.types.is_null(column.type):
        column = column.cast(pa.large_string())
    try:
        encoded = column.dictionary_encode()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ValueError(f"a column of type {column.type} holds no categories") from error
    index = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return encoded.dictionary, index.astype(np.int64)


def _distinct_codes(column: pa.DictionaryArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """`distinct` of a column that is stored as codes: of the dictionary's values, those that occur."""
    # one more place, for the code -1 of a missing value; a dictionary may hold null, or a value twice
    values, place = distinct(column.dictionary)
    code = pc.fill_null(column.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    index = np.append(place, -1)[code]
    occurs = np.zeros(len(values) + 1, np.bool_)
    occurs[index] = True
    renumbered = np.append(np.cumsum(occurs[:-1]) - 1, -1)
    return values.filter(pa.array(occurs[:-1])), renumbered[index]


def canonical(values: pa.Array) -> pa.Array:
    """The string by which each value is known, large_string; NaN becomes null.

    Raises:
        ValueError: a type that holds no categories.
    """
    kind = values.type
    if pa.types.is_floating(kind):
        x = pc.fill_null(values.cast(pa.float64()), float("nan")).to_numpy(zero_copy_only=False)
        whole = np.isfinite(x) & (x == np.floor(x)) & (np.abs(x) <= 2**53)
        integers = pa.array(np.where(whole, x, 0).astype(np.int64)).cast(pa.large_string())
        strings = pc.if_else(pa.array(whole), integers, pa.array(x).cast(pa.large_string()))
        return pc.if_else(pa.array(np.isnan(x)), pa.scalar(None, pa.large_string()), strings)
    if pa.types.is_decimal(kind):
        strings = values.cast(pa.large_string())
        return pc.replace_substring_regex(strings, r"^(-?[0-9]+)(\.0*|(\.[0-9]*[1-9])0*)$", r"\1\3")
    if _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind):
        return values.cast(pa.large_string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return values.cast(pa.large_string())
    raise ValueError(f"a column of type {kind} holds no categories")


def stable_hash(strings: pa.Array) -> NDArray[np.uint64]:
    """64 bits of each canonical string, the same in every process and version; 0 where null."""
    out = np.zeros(len(strings), np.uint64)
    strings = strings.cast(pa.large_string())
    integer = pc.fill_null(pc.match_substring_regex(strings, _INTEGER), False).to_numpy(zero_copy_only=False)
    if integer.any():
        numbers = strings.filter(pa.array(integer)).cast(pa.int64()).to_numpy(zero_copy_only=False)
        out[integer] = _mix(numbers)
    text = ~integer & _valid(strings)
    if text.any():
        texts = strings.filter(pa.array(text)).to_pylist()
        digests = (blake2b(s.encode(), digest_size=8).digest() for s in texts)
        out[text] = np.frombuffer(b"".join(digests), "<u8")
    return out


def _mix(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every bit of the number moves every bit of the hash."""
    z = numbers.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _small_integers(column: pa.ChunkedArray | pa.Array) -> NDArray[np.int64] | None:
    """The column as int64, zero where null; None if a value has more than 18 digits."""
    limits = pc.min_max(column)
    low, high = limits["min"].as_py(), limits["max"].as_py()
    if low is not None and (low < -_LARGEST or high > _LARGEST):
        return None
    filled = pc.fill_null(column, 0) if column.null_count else column
    return np.asarray(filled.cast(pa.int64()).to_numpy(), np.int64)


def _valid(column: pa.ChunkedArray | pa.Array) -> NDArray[np.bool_]:
    valid = pc.is_valid(column)
    return valid.to_numpy() if isinstance(valid, pa.ChunkedArray) else valid.to_numpy(zero_copy_only=False)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
