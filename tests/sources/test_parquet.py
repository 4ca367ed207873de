from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path

import fsspec
import polars as pl
import pyarrow.parquet as pq
import pytest

from mtmd_assets.faults import BadFile
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import parse_platform
from mtmd_assets.sources.parquet import ParquetLogs

DAY = date(2026, 1, 31)

PLATFORM = """
name: own
start: 2026-01-01
source: {{kind: parquet, impressions: "{folder}/impressions"{more}}}
{ranker}
surfaces: [feed]
products: [standard]
tasks: [{{name: click}}]
features:
  - {{name: country, side: query, kind: categorical, min_count: 1, key: true}}
  - {{name: price, side: item, kind: dense}}
  - {{name: item_rate, side: item, kind: dense, history: {{by: [item_id], of: click, per: impressions, days: 1}}}}
"""


def platform(folder: object, more: str = "") -> Platform:
    ranker = "" if "heavyweight_scores" in more else "ranker: {}"
    return parse_platform(PLATFORM.format(folder=folder, more=more, ranker=ranker), "own.yaml")


def rows(*ids: str, **columns: object) -> pl.DataFrame:
    n = len(ids)
    same = {
        "request_id": "r",
        "user_id": "u",
        "item_id": "i",
        "ts": datetime(2026, 1, 31, 12),
        "surface": "feed",
        "product": "standard",
        "country": "US",
        "price": 1.5,
        "outcome_click": 1,
        "not_ours": 7,
        **columns,
    }
    return pl.DataFrame({"impression_id": list(ids), **{c: [v] * n for c, v in same.items()}})


def write(path: Path, frame: pl.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    return path


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    yield "memory://mtmd_logs"
    if fs.exists("/mtmd_logs"):
        fs.rm("/mtmd_logs", recursive=True)


@pytest.mark.parametrize("name", [f"ds={DAY}/a.parquet", f"{DAY}.parquet"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_reads_a_day(tmp_path: Path, name: str, scheme: str) -> None:
    path = write(tmp_path / "impressions" / name, rows("a", "b"))
    write(tmp_path / "impressions" / name.replace("31", "30"), rows("other day"))
    day = ParquetLogs(platform(f"{scheme}{tmp_path}")).read(DAY)
    assert day.impressions["impression_id"].to_list() == ["a", "b"]
    assert "not_ours" not in day.impressions.columns
    assert "item_rate" not in day.impressions.columns
    assert day.scores is None
    assert day.impressions_file == str(path)


def test_several_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "impressions" / f"ds={DAY}"
    for name in ("b", "a", "c"):
        write(folder / f"{name}.parquet", rows(name))
    assert ParquetLogs(platform(tmp_path)).read(DAY).impressions["impression_id"].to_list() == ["a", "b", "c"]


def test_markers_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "impressions" / f"ds={DAY}"
    write(folder / "a.parquet", rows("a"))
    for marker in ("_SUCCESS", ".a.parquet.crc"):
        (folder / marker).touch()
    assert ParquetLogs(platform(tmp_path)).read(DAY).impressions["impression_id"].to_list() == ["a"]


@pytest.mark.parametrize("stray", ["b.csv", "hour=01/b.parquet", f"ds={DAY}/b.parquet", "_b.parquet", ".b.parquet"])
def test_rows_beside_the_files_are_not_passed_over(tmp_path: Path, stray: str) -> None:
    folder = tmp_path / "impressions" / f"ds={DAY}"
    write(folder / "a.parquet", rows("a"))
    write(folder / stray, rows("b"))
    with pytest.raises(BadFile, match=r"expected files \*\.parquet alone") as e:
        ParquetLogs(platform(tmp_path)).read(DAY)
    assert e.value.received == stray.split("/")[0]


def test_a_day_in_both_places_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "impressions" / f"ds={DAY}" / "a.parquet", rows("a"))
    write(tmp_path / "impressions" / f"{DAY}.parquet", rows("a"))
    with pytest.raises(BadFile, match=f"the day is in the folder ds={DAY} too"):
        ParquetLogs(platform(tmp_path)).read(DAY)


def test_any_file_system_and_a_late_file(memory: str) -> None:
    source = ParquetLogs(platform(memory))
    with pytest.raises(BadFile, match="no such file"):
        source.read(DAY)
    with fsspec.open(f"{memory}/impressions/{DAY}.parquet", "wb") as f:
        rows("a").write_parquet(f)
    assert len(source.read(DAY).impressions) == 1


def test_names_are_mapped_and_scores_read(tmp_path: Path) -> None:
    theirs = rows("a").rename({"impression_id": "imp", "item_id": "ad_id"})
    write(tmp_path / "impressions" / f"{DAY}.parquet", theirs)
    scores = {"imp": ["a"], "scored_at": [datetime(2026, 1, 31)], "ranker_version": ["v"], "p": [0.5], "extra": [0]}
    write(tmp_path / "scores" / f"{DAY}.parquet", pl.DataFrame(scores))
    columns = "{impression_id: imp, item_id: ad_id, score_click: p}"
    more = f', heavyweight_scores: "{tmp_path}/scores", columns: {columns}'
    day = ParquetLogs(platform(tmp_path, more)).read(DAY)
    assert day.impressions.row(0, named=True)["item_id"] == "i"
    assert day.scores is not None
    assert day.scores.columns == ["impression_id", "scored_at", "ranker_version", "score_click"]


def test_a_look_finds_what_a_day_lacks(tmp_path: Path) -> None:
    scores = pl.DataFrame({"impression_id": ["a"], "scored_at": [datetime(2026, 1, 31)], "ranker_version": ["v"]})
    source = ParquetLogs(platform(tmp_path, f', heavyweight_scores: "{tmp_path}/scores"'))
    with pytest.raises(BadFile, match=r"impressions.*no such file"):
        source.look(DAY)
    write(tmp_path / "impressions" / f"{DAY}.parquet", rows("a"))
    with pytest.raises(BadFile, match=r"scores.*no such file"):
        source.look(DAY)
    path = write(tmp_path / "scores" / f"{DAY}.parquet", scores)
    with pytest.raises(BadFile, match="column score_click: no such column"):
        source.look(DAY)
    write(path, scores.with_columns(score_click=0.5))
    source.look(DAY)


def test_a_doubled_column_is_named(tmp_path: Path) -> None:
    table = rows("a").to_arrow()
    path = tmp_path / "impressions" / f"{DAY}.parquet"
    path.parent.mkdir()
    pq.write_table(table.append_column("price", table["price"]), path)
    with pytest.raises(BadFile, match=r"column price: more than one such column \(received 2\)"):
        ParquetLogs(platform(tmp_path)).read(DAY)


@pytest.mark.parametrize("scheme", ["zip://logs::", "nothing://"])
def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "no.zip").write_text("no zip")
    folder = f"{scheme}{tmp_path}/no.zip"
    with pytest.raises(BadFile, match="the folder cannot be opened"):
        ParquetLogs(platform(folder)).look(DAY)


def test_a_look_at_two_tables_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path / "impressions" / f"{DAY}.parquet", rows("a").drop("price"))
    source = ParquetLogs(platform(tmp_path, f', heavyweight_scores: "{tmp_path}/impressions"'))
    with pytest.raises(BadFile, match="column price: no such column"):
        source.look(DAY)


def test_absent_day_names_file_and_day(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no such file") as e:
        ParquetLogs(platform(tmp_path)).read(DAY)
    assert f"{tmp_path}/impressions/{DAY}.parquet" in e.value.file
    assert e.value.day == DAY


@pytest.mark.parametrize("keep", [0, 3, 200, -20])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "impressions" / f"{DAY}.parquet", rows("a", "b"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFile, match="not readable as Parquet") as e:
        ParquetLogs(platform(tmp_path)).read(DAY)
    assert e.value.file == str(path)


def test_damaged_data_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "impressions" / f"{DAY}.parquet", rows(*(str(n) for n in range(5000))))
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    with pytest.raises(BadFile, match="not readable as Parquet"):
        ParquetLogs(platform(tmp_path)).read(DAY)


def test_lacking_column_is_named_as_the_file_would_have_it(tmp_path: Path) -> None:
    write(tmp_path / "impressions" / f"{DAY}.parquet", rows("a").drop("price"))
    with pytest.raises(BadFile, match="no such column") as e:
        ParquetLogs(platform(tmp_path)).read(DAY)
    assert e.value.column == "price"
    with pytest.raises(BadFile, match="for our item_id") as e:
        ParquetLogs(platform(tmp_path, ", columns: {item_id: ad_id}")).read(DAY)
    assert e.value.column == "ad_id"


def test_files_of_other_types_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "impressions" / f"ds={DAY}"
    write(folder / "a.parquet", rows("a"))
    second = write(folder / "b.parquet", rows("b", price="dear"))
    with pytest.raises(BadFile, match="another type than in") as e:
        ParquetLogs(platform(tmp_path)).read(DAY)
    assert (e.value.file, e.value.column) == (str(second), "price")


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(BadFile, match="cannot be opened"):
        ParquetLogs(platform("nosuchscheme://bucket")).read(DAY)
