"""Publishing days: atomic, order-free, and readable from another process at any time."""

import errno
import os
import subprocess
import sys
import threading
from datetime import date, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pytest

from mtmd_assets.warehouse import Warehouse

TABLES = {"a": {"x": "BIGINT", "name": "VARCHAR"}, "b": {"x": "BIGINT"}}
DAY = date(2026, 1, 1)


@pytest.fixture
def warehouse(tmp_path):
    return Warehouse(tmp_path / "toy", TABLES, "CREATE OR REPLACE MACRO twice(x) AS 2 * x;")


def publish(warehouse, day, x, run_id="run"):
    with warehouse.stage(run_id) as stage, warehouse.connect() as con:
        stage.write(con, "a", day, f"SELECT {x} AS x, 'n' AS name")
        stage.write(con, "b", day, f"SELECT {x} AS x")
        stage.publish()


def outside(warehouse, query):
    """What another program sees."""
    with duckdb.connect(str(warehouse.database), read_only=True) as con:
        return con.execute(query).fetchall()


def test_views_answer_before_the_first_day(warehouse):
    warehouse.create()
    assert outside(warehouse, "SELECT count(*) FROM a") == [(0,)]
    assert outside(warehouse, "SELECT twice(21)") == [(42,)]


def test_a_day_replaces_itself_whole(warehouse):
    publish(warehouse, DAY, 1)
    publish(warehouse, DAY + timedelta(1), 2)
    publish(warehouse, DAY, 3)
    assert outside(warehouse, "SELECT x, ds FROM a ORDER BY ds") == [(3, DAY), (2, DAY + timedelta(1))]
    assert warehouse.days("a") == [DAY, DAY + timedelta(1)]
    assert warehouse.missing("a", DAY, DAY + timedelta(2)) == [DAY + timedelta(2)]


def test_a_frame_is_written_like_a_query(tmp_path):
    warehouse = Warehouse(tmp_path / "toy", {"v": {"id": "BIGINT", "task": "VARCHAR", "vector": "FLOAT[]"}})
    vectors = pl.Series("vector", [[1.5, -2.0], [], [0.25]], dtype=pl.List(pl.Float32))
    frame = pl.DataFrame({"task": ["ctr", None, "cvr"], "other": [1, 2, 3], "id": [3, 1, 2]}).with_columns(vectors)
    with warehouse.stage() as stage, stage.connect() as con:
        con.register("frame", frame)
        day = "SELECT * EXCLUDE ds FROM v WHERE ds = '2026-01-01'"
        stage.write(con, "v", DAY, "FROM frame")
        queried = con.execute(day).fetchall()
        first = stage.write_frame(con, "v", DAY, frame).read_bytes()
        assert con.execute(day).fetchall() == queried == [(3, "ctr", [1.5, -2.0]), (1, None, []), (2, "cvr", [0.25])]
        assert stage.write_frame(con, "v", DAY, frame).read_bytes() == first
        stage.publish()
    assert warehouse.columns("v", DAY) == list(warehouse.tables["v"].items())


def test_a_frame_of_other_types_publishes_nothing(tmp_path):
    warehouse = Warehouse(tmp_path / "toy", TABLES)
    with warehouse.stage() as stage, stage.connect() as con:
        with pytest.raises(TypeError, match=r"a of 2026-01-01: .*\('x', 'INTEGER', 'BIGINT'\)"):
            stage.write_frame(con, "a", DAY, pl.DataFrame({"x": pl.Series([1], dtype=pl.Int32), "name": ["n"]}))
        stage.publish()
    assert warehouse.days("a") == []


def fail_halfway(warehouse):
    with warehouse.stage("run") as stage, warehouse.connect() as con:
        stage.write(con, "a", DAY, "SELECT 2 AS x, 'n' AS name")
        raise RuntimeError("halfway")


def test_nothing_is_seen_or_left_of_a_failed_stage(warehouse):
    publish(warehouse, DAY, 1)
    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway(warehouse)
    assert outside(warehouse, "SELECT x FROM a") == [(1,)]
    assert list(warehouse.staging.iterdir()) == []


def test_a_wrong_column_or_value_publishes_nothing(warehouse):
    with pytest.raises(duckdb.Error), warehouse.stage() as stage, warehouse.connect() as con:
        stage.write(con, "a", DAY, "SELECT 'seven' AS x, 'n' AS name")
    with pytest.raises(duckdb.Error), warehouse.stage() as stage, warehouse.connect() as con:
        stage.write(con, "a", DAY, "SELECT 1 AS x")
    assert not warehouse.published("a", DAY)


ENDED = """
import errno, os, sys
from datetime import date
from pathlib import Path
from mtmd_assets import warehouse as w
tables = {"a": {"x": "BIGINT", "name": "VARCHAR"}, "b": {"x": "BIGINT"}}
house = w.Warehouse(Path(sys.argv[1]), tables)
where = sys.argv[2]
with house.stage("ended") as stage, house.connect() as con:
    stage.write(con, "a", date(2026, 1, 1), "SELECT 2 AS x, 'n' AS name")
    if where == "writing":
        os._exit(9)
    stage.write(con, "b", date(2026, 1, 1), "SELECT 2 AS x")
    renames = 0
    real, real_mkdir = os.replace, Path.mkdir
    def replace(source, target):
        global renames
        renames += str(target).endswith("data.parquet")
        if renames == 2 and where == "renaming":
            os._exit(9)
        if renames == 2 and where == "interrupted":
            renames += 1  # once only
            raise KeyboardInterrupt
        if renames == 2 and where == "broken":
            renames -= 1  # for as long as the process lives
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)
    def mkdir(self, *rest, **options):
        if where == "full" and self.name.startswith("ds=") and self.parent.name == "b":
            raise OSError(errno.ENOSPC, "No space left on device")
        real_mkdir(self, *rest, **options)
    w.os.replace, Path.mkdir = replace, mkdir
    stage.publish()
"""


def end(warehouse, where):
    """Publish day 2 over day 1 in a process that ends on the way; returns its id."""
    publish(warehouse, DAY, 1)
    run = subprocess.Popen([sys.executable, "-c", ENDED, str(warehouse.folder), where], stderr=subprocess.DEVNULL)
    assert run.wait() != 0
    return run.pid


@pytest.mark.parametrize(
    ("where", "seen"), [("writing", 1), ("full", 1), ("renaming", 2), ("interrupted", 2), ("broken", 2)]
)
def test_a_run_that_ends_on_the_way_leaves_the_old_day_or_the_new_one(warehouse, where, seen):
    end(warehouse, where)
    warehouse.create()  # as every run does first
    assert outside(warehouse, "SELECT a.x, b.x FROM a JOIN b USING (ds)") == [(seen, seen)]
    assert list(warehouse.staging.iterdir()) == []


def test_an_interrupted_publish_is_finished_at_once(warehouse):
    end(warehouse, "interrupted")
    assert outside(warehouse, "SELECT a.x, b.x FROM a JOIN b USING (ds)") == [(2, 2)]
    assert list(warehouse.staging.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc tells when a process started")
def test_a_process_with_the_id_of_a_killed_one_is_another(warehouse):
    """A restarted container has the host's name and the process ids of the one before."""
    killed = end(warehouse, "renaming")
    [draft] = warehouse.staging.iterdir()
    draft.rename(draft.with_name(draft.name.replace(f"~{killed}", f"~{os.getpid()}")))
    warehouse.create()
    assert outside(warehouse, "SELECT a.x, b.x FROM a JOIN b USING (ds)") == [(2, 2)]
    assert list(warehouse.staging.iterdir()) == []


def test_other_files_are_published_with_the_tables(warehouse):
    target = warehouse.folder / "models" / "v1"
    for n, published in ((1, False), (2, True), (3, False), (4, True)):
        with warehouse.stage() as stage:
            (stage.draft / "new").mkdir()
            (stage.draft / "new" / "weights").write_text(str(n))
            stage.add(stage.draft / "new", target)
            if published:
                stage.publish()
        assert target.exists() == (n > 1)
        assert n == 1 or (target / "weights").read_text() == str(n - (not published))
    assert list(warehouse.staging.iterdir()) == []


def test_every_connection_spills_in_the_home(warehouse, monkeypatch):
    """And not in `.tmp` of the current directory."""
    spills, real = [], duckdb.connect

    def connect(*arguments, **options):
        con = real(*arguments, **options)
        spills.extend(con.execute("SELECT current_setting('temp_directory')").fetchall())
        return con

    monkeypatch.setattr(duckdb, "connect", connect)
    publish(warehouse, DAY, 1)
    warehouse.columns("a", DAY)
    assert len(spills) > 3
    assert set(spills) == {(str(warehouse.folder / "tmp"),)}


def test_readers_and_writers_never_meet(warehouse):
    """Four writers replace days while two readers poll the views: no error, no torn day."""
    publish(warehouse, DAY, 0)
    errors, stop = [], threading.Event()

    def write(n):
        try:
            for k in range(6):
                publish(warehouse, DAY + timedelta(k % 3), n * 100 + k, f"run{n}")
        except Exception as e:
            errors.append(e)

    def read():
        try:
            while not stop.is_set():
                rows = outside(warehouse, "SELECT ds, count(*), count(DISTINCT x) FROM a GROUP BY ds")
                assert all(n == 1 for _, n, _ in rows), rows
        except Exception as e:
            errors.append(e)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for t in readers + writers:
        t.start()
    for t in writers:
        t.join()
    stop.set()
    for t in readers:
        t.join()
    assert errors == []
    assert len(warehouse.days("a")) == 3


def test_a_new_column_is_null_in_days_built_before_it(warehouse):
    publish(warehouse, DAY, 1)
    wider = Warehouse(warehouse.folder, {"a": {"y": "DOUBLE", **TABLES["a"]}, "b": TABLES["b"]})
    wider.create()
    assert outside(wider, "SELECT x, y FROM a") == [(1, None)]
    later = DAY + timedelta(1)
    with wider.stage() as stage, wider.connect() as con:
        stage.write(con, "a", later, "SELECT 2 AS x, 'n' AS name, 0.5 AS y")
        stage.publish()
    assert outside(wider, "SELECT x, y FROM a ORDER BY ds") == [(1, None), (2, 0.5)]
    assert "union_by_name" in (wider.folder / "views.sql").read_text()
    # once every day has the new columns, reading is as fast as before
    with wider.stage() as stage, wider.connect() as con:
        stage.write(con, "a", DAY, "SELECT 1 AS x, 'n' AS name, 0.25 AS y")
        stage.publish()
    wider.create()
    assert outside(wider, "SELECT x, y FROM a ORDER BY ds") == [(1, 0.25), (2, 0.5)]
    assert "union_by_name" not in (wider.folder / "views.sql").read_text()


def test_a_home_may_have_an_apostrophe(tmp_path):
    warehouse = Warehouse(tmp_path / "ann's home", TABLES)
    publish(warehouse, DAY, 1)
    assert outside(warehouse, "SELECT x FROM a") == [(1,)]


def test_a_home_that_cannot_be_written_is_named(tmp_path):
    """A file stands where the folder should be (root, as in CI, may write into any folder)."""
    (tmp_path / "home").write_text("")
    with pytest.raises(PermissionError, match="MTMD_HOME") as error:
        Warehouse(tmp_path / "home" / "toy", TABLES).create()
    assert str(tmp_path / "home" / "toy") in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="MTMD_HOME"):
        Warehouse(tmp_path / "toy", TABLES).create()


def test_a_full_disk_publishes_nothing(warehouse, monkeypatch):
    """The rename or the write fails with ENOSPC: the old day stays, the leftovers go."""
    publish(warehouse, DAY, 1)
    real = os.replace

    def full(source, target):
        if str(target).endswith("publish.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr("mtmd_assets.warehouse.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        publish(warehouse, DAY, 2)
    assert outside(warehouse, "SELECT x FROM a") == [(1,)]
    assert list(warehouse.staging.iterdir()) == []
