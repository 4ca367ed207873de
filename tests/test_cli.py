"""The command line and the Makefile, without training."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import date, datetime

import duckdb
import polars as pl
import pytest
import yaml

from mtmd_assets import cli, scoreboard, shell
from mtmd_assets.faults import UsageError
from mtmd_assets.home import CHECKOUT, Home
from mtmd_assets.in_process import RunFailed
from mtmd_assets.platform_file import SHIPPED
from tests.sources.kuairand_folder import log_row, write_folder
from tests.worlds import small_adworld


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MTMD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", "")  # restored afterwards
    return Home()


@pytest.fixture
def small(home, tmp_path):
    """A home with an adworld that is quick to build; its first window ends on January 3."""
    home.register(str(small_adworld(tmp_path, rows_per_day=2_000)))
    return home


# -- backfills -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [("2025-12-01", "2025-12-02"), ("2999-01-01", "2999-01-01")])
def test_a_backfill_of_days_that_do_not_exist_is_refused(home, capsys, first, last):
    assert cli.main(["backfill", first, last]) == 2
    assert f"no days {first} to {last}; its days are 2026-01-01 to " in capsys.readouterr().err
    assert not (home.root / "adworld" / "lake" / "impressions").exists()


def test_a_backfill_of_reversed_days_says_so(home, capsys):
    assert cli.main(["backfill", "2026-01-03", "2026-01-01"]) == 2
    assert capsys.readouterr().err == "the first day, 2026-01-03, is after the last, 2026-01-01\n"


def test_a_day_that_is_none_is_refused_in_words(home, capsys):
    with pytest.raises(SystemExit):
        cli.main(["backfill", "2026-1-9", "2026-01-09"])
    assert "argument first: expected a day as YYYY-MM-DD (received '2026-1-9')" in capsys.readouterr().err


def test_a_backfill_prints_each_day(small, capfd):
    assert cli.main(["backfill", "2026-01-01", "2026-01-02"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[:3] == [
        "adworld_data of 2026-01-01 to 2026-01-02",
        "    2026-01-01: done",
        "    2026-01-02: done",
    ]


def test_models_of_days_before_the_first_window_are_said_not_to_be_trained(small, capsys):
    assert cli.main(["backfill", "2026-01-01", "2026-01-02", "--job", "models"]) == 0
    said = capsys.readouterr().out
    assert "2026-01-01 to 2026-01-02: nothing is trained, the first window ends on 2026-01-03" in said
    assert "done" not in said


def test_a_backfill_of_models_goes_on_after_a_day_that_fails(small, capfd):
    assert cli.main(["backfill", "2026-01-02", "2026-01-04", "--job", "models"]) == 1
    said = capfd.readouterr().err
    assert "joined_examples has no 2026-01-01, 2026-01-02, 2026-01-03: run adworld_data" in said
    assert said.endswith("2 of 2 days failed: 2026-01-03, 2026-01-04\n")
    assert "mtmd_assets." not in said
    assert "dagster._core" not in said


def test_the_days_between_failing_ones_are_run(small, monkeypatch, capsys):
    days = []

    @contextmanager
    def jobs(home, site):
        def run(job, day):
            days.append(day)
            if day.day != 4:
                raise RunFailed("no")

        yield run

    monkeypatch.setattr(cli, "jobs_in_process", jobs)
    assert cli.main(["backfill", "2026-01-03", "2026-01-05", "--job", "models"]) == 1
    assert days == [date(2026, 1, d) for d in (3, 4, 5)]
    said = capsys.readouterr()
    assert "2026-01-04: done" in said.out
    assert "2 of 3 days failed: 2026-01-03, 2026-01-05" in said.err


def test_the_default_job_is_said(capsys):
    with pytest.raises(SystemExit):
        cli.main(["backfill", "--help"])
    assert "data (the default)" in capsys.readouterr().out


def test_a_home_that_is_a_file_is_named(home, capsys):
    home.root.write_text("")
    assert cli.main(["backfill", "2026-01-01", "2026-01-01"]) == 2
    said = capsys.readouterr().err
    assert str(home.root) in said
    assert "MTMD_HOME" in said


# -- registering ---------------------------------------------------------------------------------------------------


def test_an_unregistered_platform_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        Home(tmp_path).site("nowhere")


def test_registering_again_is_said(home, tmp_path, capsys):
    file = str(small_adworld(tmp_path, name="mine"))
    assert cli.main(["register", file]) == 0
    assert capsys.readouterr().out.startswith("registered mine in ")
    assert cli.main(["register", file]) == 0
    assert capsys.readouterr().out.startswith("replaced mine in ")


def test_registering_a_log_that_is_nowhere_given_is_refused(home, capsys):
    assert cli.main(["register", "kuairand"]) == 2
    assert "DATA=folder" in capsys.readouterr().err
    assert home.names() == set()


def test_a_shipped_name_is_refused_to_another_source(home, tmp_path, capsys):
    file = small_adworld(tmp_path, source={"kind": "parquet", "impressions": "here", "heavyweight_scores": "there"})
    assert cli.main(["register", str(file)]) == 2
    assert f"{file}: name: that is a shipped platform" in capsys.readouterr().err
    assert home.names() == set()


# -- the demo of real logs -----------------------------------------------------------------------------------------


def test_a_demo_without_its_folder_asks_for_it(home, capsys):
    assert cli.main(["demo", "--platform", "kuairand"]) == 2
    assert "DATA=folder" in capsys.readouterr().err
    assert not home.root.exists()


def test_a_demo_of_a_wrong_folder_says_so_once(home, tmp_path, capsys):
    assert cli.main(["demo", "--platform", "kuairand", "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("no such file") == 1
    assert str(tmp_path) in said
    assert not home.root.exists()


def test_a_demo_keeps_the_registered_file(home, capsys):
    site = home.register("kuairand", "nowhere")
    assert cli.main(["demo", "--platform", "kuairand"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert home.site("kuairand").platform == site.platform


def test_a_registered_file_that_is_not_the_shipped_one_is_named(home, tmp_path, capsys):
    cli._site(home, "adworld", None)
    home.register("adworld")
    cli._site(home, "adworld", None)
    assert capsys.readouterr().out == ""
    home.register(str(small_adworld(tmp_path)))
    cli._site(home, "adworld", None)
    assert "platform.yaml, which is not the shipped one" in capsys.readouterr().out


def test_the_demo_of_a_right_folder_is_registered_with_it(home, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "KuaiRand-Pure", [log_row(1, 1, "20220425", at=datetime(2022, 4, 25, 12))])

    @contextmanager
    def jobs(home, site):
        yield lambda *days, **more: None

    monkeypatch.setattr(cli, "jobs_in_process", jobs)
    assert cli.main(["demo", "--platform", "kuairand", "--data", str(folder)]) == 1  # no scoreboard yet
    assert yaml.safe_load((home.root / "kuairand" / "platform.yaml").read_text())["source"]["data"] == str(folder)


def test_a_shipped_file_that_takes_the_place_of_another_one_is_said(home, tmp_path, capsys):
    folder = write_folder(tmp_path / "KuaiRand-Pure", [log_row(1, 1, "20220425", at=datetime(2022, 4, 25, 12))])
    for _ in range(2):
        cli._site(home, "kuairand", str(folder))
        assert capsys.readouterr().out == ""
    file = home.root / "kuairand" / "platform.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, "schedule_hour": 23}))
    cli._site(home, "kuairand", str(folder))
    kept = home.replaced("kuairand")
    said = capsys.readouterr().out
    assert "the shipped platform file takes the place of the registered one" in said
    assert str(kept) in said
    assert yaml.safe_load(kept.read_text())["schedule_hour"] == 23
    assert home.names() == {"kuairand"}
    file.write_text(yaml.safe_dump({**content, "schedule_hour": "noon"}))
    cli._site(home, "kuairand", str(folder))
    assert "takes the place of" in capsys.readouterr().out, "of one that is refused, too"


def test_a_registered_platform_may_be_given_other_data(home, tmp_path):
    rows = [log_row(1, 1, "20220425", at=datetime(2022, 4, 25, 12))]
    old, new = (write_folder(tmp_path / name, rows) for name in ("old", "new"))
    text = (SHIPPED / "kuairand.yaml").read_text().replace("name: kuairand", "name: videos")
    (tmp_path / "videos.yaml").write_text(text)
    home.register(str(tmp_path / "videos.yaml"), str(old))
    assert cli._site(home, "videos", str(new)).platform.source.data == str(new)
    with pytest.raises(UsageError, match=r"neither a file nor a platform that is shipped or registered.*videos"):
        home.register("audios", str(new))
    with pytest.raises(UsageError, match="neither a file nor"):
        home.register(str(home.root / "videos"))


# -- the prompt ----------------------------------------------------------------------------------------------------


def test_the_prompt_joins_in_the_written_order_and_spills_little(home, capfd):
    query = "SELECT current_setting('disabled_optimizers') || current_setting('max_temp_directory_size') AS set"
    assert cli.main(["sql", query]) == 0
    assert "join_order9.3 GiB" in capfd.readouterr().out


def test_what_killed_shells_have_spilled_is_removed(home):
    old = home.root / "adworld" / "mtmd.duckdb.tmp" / "duckdb_temp_storage-0.tmp"
    new = home.root / "adworld" / "tmp" / "duckdb_temp_storage-1.tmp"
    older = new.with_name("duckdb_temp_storage-0.tmp")
    for file, age in ((old, 7200), (older, 7200), (new, 0)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    assert cli.main(["sql", "SELECT 1"]) == 0
    assert not old.parent.exists()
    assert not older.exists()
    assert new.exists()


def scores(day, model, rows, logmae):
    return (date(2026, 1, day), model, None, "search", "standard", "ctr", rows, logmae)


@pytest.mark.parametrize(
    ("metrics", "constant", "gain"),
    [
        ([(1, "mtmd", 10, 0.3), (2, "mtmd", 30, 0.1), (1, "constant", 10, 0.6), (2, "constant", 30, 0.2)], 0.3, 0.5),
        ([(1, "mtmd", 10, 0.3), (2, "mtmd", 30, 0.1), (2, "constant", 30, 0.2)], None, None),
        ([(1, "mtmd", 10, 0.3), (1, "constant", 10, 0.0)], 0.0, None),
        ([(1, "mtmd", 10, 0.3), (1, "constant", 10, 1e-16)], 1e-16, None),
        ([(1, "mtmd", 10, 0.3)], None, None),
    ],
    ids=["whole", "a slice that is new on the second day", "scores all the same", "but for rounding", "a new slice"],
)
def test_the_model_stands_beside_constants_of_the_same_rows_only(home, metrics, constant, gain):
    columns = ("ds", "model", "bucket", "surface", "product", "task", "rows", "logmae")
    table = pl.DataFrame([scores(*m) for m in metrics], schema=columns, orient="row")
    with duckdb.connect() as con:
        con.register("daily_slice_metrics", table)
        [cell] = scoreboard.cells(con, home.site("adworld"), [date(2026, 1, 1), date(2026, 1, 2)])
        assert "| mtmd |" in scoreboard.scoreboard(con, home.site("adworld"), [date(2026, 1, 1)])
    assert (cell.constant, cell.gain) == (pytest.approx(constant), pytest.approx(gain))
    assert cell.rows == sum(rows for _, model, rows, _ in metrics if model == "mtmd")


def test_where_to_look_names_the_platform():
    assert 'make sql Q="' in scoreboard._where_to_look("adworld")
    assert 'make sql PLATFORM=mine Q="' in scoreboard._where_to_look("mine")


def test_folders_that_a_file_names_are_sought_where_it_lies(home, tmp_path, monkeypatch, capsys):
    content = yaml.safe_load(small_adworld(tmp_path).read_text())
    far = "s3://logs/scores"
    content.update(name="ours", source={"kind": "parquet", "impressions": "logs/seen", "heavyweight_scores": far})
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["register", "ours.yaml"]) == 0
    monkeypatch.chdir("/")
    source = Home().site("ours").platform.source
    assert (source.impressions, source.heavyweight_scores) == (str(tmp_path / "logs" / "seen"), far)
    wanted = f"{tmp_path}/logs/seen/ds=2026-01-01/*.parquet"
    assert capsys.readouterr().err.startswith(f"its first day cannot be read as it is: {wanted}")


def test_a_prompt_on_nothing_says_so(home, monkeypatch, capsys):
    monkeypatch.setattr(shell, "_duckdb", lambda: "true")
    assert cli.main(["sql", "FROM impressions"]) == 0
    assert capsys.readouterr().err == "no day of adworld is built yet: every table is empty\n"


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["written at the end", "written at once"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(home, unbuffered):
    command = [sys.executable, "-m", "mtmd_assets.cli", "register", "adworld"]
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, env=env, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (cli.UNREAD, "")


# -- Ctrl-C and ports ----------------------------------------------------------------------------------------------

CHILD = """#!/bin/sh
trap 'sleep 1; echo ended; exit 1' INT
touch {ready}
while true; do sleep 0.1; done
"""


MAIN = """
import pathlib, sys
from mtmd_assets import cli, shell, web
web.SCRIPTS = pathlib.Path({folder!r})
shell._duckdb = lambda: {folder!r} + "/dg"
sys.exit(cli.main(sys.argv[1:]))
"""
"""`mtmd`, with the program `dg` of a folder in the place of Dagster's and of DuckDB's shell."""


def program(folder, text):
    """The code of `MAIN`, with a shell script as the program."""
    child = folder / "dg"
    child.write_text(text)
    child.chmod(0o755)
    return MAIN.format(folder=str(folder))


@pytest.mark.parametrize(("command", "status"), [("ui", 0), ("sql", 1)])
def test_an_interrupt_waits_for_the_child(home, tmp_path, command, status):
    """A Ctrl-C reaches both: Dagster takes a while to stop, DuckDB's shell ends its query and decides for itself."""
    ready = tmp_path / "ready"
    code = program(tmp_path, CHILD.format(ready=ready))
    port = ["--port", str(free_port())] if command == "ui" else []
    process = subprocess.Popen(
        [sys.executable, "-c", code, command, *port],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell without job control starts what runs in the background with interrupts ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    said = "no day of adworld is built yet: every table is empty\n" if command == "sql" else ""
    assert (process.returncode, out, err) == (status, "ended\n", said)


def test_whoever_ends_the_ui_ends_dagster(home, tmp_path):
    ready = tmp_path / "ready"
    code = program(tmp_path, CHILD.format(ready=ready).replace("INT", "TERM"))
    command = [sys.executable, "-c", code, "ui", "--port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "ended\n")


def test_a_ui_started_in_the_background_passes_interrupts_on(home, tmp_path):
    """Dagster stops its own processes by interrupts, which a shell has what runs in the background ignore."""
    code = program(tmp_path, "#!/bin/sh\nkill -INT $$\nexit 0\n")
    command = [sys.executable, "-c", code, "ui", "--port", str(free_port())]
    process = subprocess.run(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), check=False)
    assert process.returncode != 0, "the child was ended by its interrupt"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_that_is_taken_is_named(home, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["ui", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"port {port} " in said
    assert "--port" in said


# -- make ----------------------------------------------------------------------------------------------------------


def make(tmp_path, *arguments, **environment):
    """What make runs, with a program in place of `mtmd` that prints what it was called with."""
    mtmd = tmp_path / "mtmd"
    mtmd.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    mtmd.chmod(0o755)
    command = ["make", "--silent", "-o", ".venv/ready", f"BIN={tmp_path}", *arguments]
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("MAKE")}, **environment}
    return subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, check=True).stdout


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not there")


@needs_make
def test_make_alone_lists_its_targets(tmp_path):
    said = make(tmp_path)
    assert {line.split()[0] for line in said.splitlines()} >= {"demo", "test", "ui", "sql", "scoreboard", "clean"}
    assert said == make(tmp_path, "help")


@needs_make
@pytest.mark.parametrize("query", ["SELECT $$it's$$, '$(x)', \"$Q\"", "FROM slice_metrics"])
def test_make_leaves_the_query_alone(tmp_path, query):
    wanted = f"<sql><--platform><adworld><{query}>"
    assert make(tmp_path, "sql", f"Q={query}") == wanted
    assert make(tmp_path, "sql", Q=query) == wanted
    assert make(tmp_path, "sql") == "<sql><--platform><adworld>"


@needs_make
@pytest.mark.parametrize("folder", ["a folder", "$HOME/$(x)/'it'"])
def test_make_passes_on_what_results_and_tune_are_told(tmp_path, folder):
    of_both = f"<--platform><mine><--data><{folder}><--models><mtmd,no_cross>"
    told = ["PLATFORM=mine", f"DATA={folder}", "MODELS=mtmd,no_cross"]
    assert make(tmp_path, "results", *told, "SEEDS=2") == f"<results>{of_both}<--seeds><2>"
    assert make(tmp_path, "tune", *told, "TRY=max_epochs=45 dropout=0.1") == (
        f"<tune>{of_both}<--try><max_epochs=45 dropout=0.1>"
    )
    assert make(tmp_path, "demo", *told) == f"<demo><--platform><mine><--data><{folder}>"
    assert make(tmp_path, "results") == "<results><--platform><adworld>"


@needs_make
def test_make_passes_the_port_on(tmp_path):
    assert make(tmp_path, "ui", "PORT=3001") == "<ui><--port><3001>"
    assert make(tmp_path, "ui") == "<ui>"


def test_every_shipped_platform_is_its_own_kind(tmp_path):
    """Their own names are not refused."""
    for file in SHIPPED.glob("*.yaml"):
        assert Home(tmp_path).register(file.stem).platform.name == file.stem
