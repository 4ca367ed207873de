"""The platform file: what is refused, and what is derived from it."""

import json
import re
from datetime import date

import pytest
import yaml
from pydantic import ValidationError

from mtmd_assets.faults import PlatformError
from mtmd_assets.home import Home
from mtmd_assets.platform import Platform
from mtmd_assets.platform_file import in_words, load_platform, parse_platform, shipped_platform
from mtmd_assets.tables import tables

MINIMAL = """
name: toy
start: 2026-01-01
source: {kind: adworld}
surfaces: [feed, search]
products: [standard, shopping]
tasks:
  - {name: ctr, weight: 2, width: 128}
  - {name: gctr, given: ctr}
  - {name: octr, given: ctr, products: [standard]}
features:
  - {name: age, side: query, kind: dense}
  - {name: words, side: query, kind: dense, surfaces: [search]}
  - {name: country, side: query, kind: categorical, vocabulary: [de, us], key: true}
  - {name: price, side: item, kind: dense, products: [shopping]}
  - {name: advertiser, side: item, kind: categorical, buckets: 100, key: true}
"""


def broken(**changes):
    """The minimal file with keys replaced (or, when the value is a function, edited)."""
    content = yaml.safe_load(MINIMAL)
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    return yaml.safe_dump(content)


def more(key, *specs):
    """The minimal file with further features or tasks."""
    return {key: lambda old: [*old, *specs]}


def feature(**keys):
    """The minimal file with a sixth feature, a dense one of the query unless said otherwise."""
    return more("features", {"name": "x", "side": "query", "kind": "dense", **keys})


def categories(*values, **keys):
    return feature(kind="categorical", vocabulary=list(values), **keys)


def history(by, side="item", **keys):
    return feature(side=side, history={"by": by, "of": "ctr", "days": 3, **keys})


def parquet(scores=False, **source):
    """The minimal file with logs of one's own."""
    kept = {"heavyweight_scores": "there"} if scores else {}
    return {
        "source": {"kind": "parquet", "impressions": "here", **kept, **source},
        **({} if scores else {"ranker": {"train_days": 3}}),
    }


def cross(*pairs):
    return {**parquet(), "ranker": {"cross": [list(p) for p in pairs]}}


NAN, INF = float("nan"), float("inf")

MISTAKES = [
    ({"colour": "red"}, "colour", "red"),
    # tasks
    (more("tasks", {"name": "cvr", "given": "sale"}), "tasks.3.given", "sale"),
    (more("tasks", {"name": "impressions"}), "tasks.3.name", "impressions"),
    (more("tasks", {"name": "user_id"}), "tasks.3.name", "user_id"),
    (more("tasks", {"name": "left"}), "tasks.3.name", "left"),
    (more("tasks", {"name": "high_score_play"}), "tasks.3.name", "high_score_play"),
    (more("tasks", {"name": "gctr_of_ctr"}), "tasks.3.name", "gctr_of_ctr"),
    (more("tasks", {"name": "ctr"}), "tasks.3.name", "ctr"),
    (more("tasks", {"name": "cvr", "products": ["standard", "standard"]}), "tasks.3.products.1", "standard"),
    (more("tasks", {"name": "cvr", "products": []}), "tasks.3.products", "[]"),
    ({"tasks": lambda t: [t[1], t[0]]}, "tasks.0.given", "ctr"),
    ({"tasks": lambda t: [{**t[0], "given": "ctr"}]}, "tasks.0.given", "ctr"),
    ({"tasks": lambda t: [{**t[0], "given": "gctr"}, t[1]]}, "tasks.0.given", "gctr"),
    ({"tasks": lambda t: [{**t[0], "products": ["shopping"]}, t[2]]}, "tasks.1.given", "standard"),
    ({"tasks": lambda t: [{**t[0], "weight": 0}]}, "tasks.0.weight", "0"),
    ({"tasks": lambda t: [{**t[0], "weight": INF}]}, "tasks.0.weight", "inf"),
    ({"tasks": lambda t: [{**t[0], "weight": True}]}, "tasks.0.weight", "True"),
    ({"tasks": lambda t: [{**t[0], "weight": "2"}]}, "tasks.0.weight", "2"),
    ({"tasks": lambda t: [{**t[0], "width": True}]}, "tasks.0.width", "True"),
    # who has a feature
    (feature(surfaces=["maps"]), "features.5.surfaces", "maps"),
    (feature(surfaces=["feed", "feed"]), "features.5.surfaces.1", "feed"),
    (feature(side="item", products=["video"]), "features.5.products", "video"),
    (feature(side="item", surfaces=["feed"]), "features.5.surfaces", "feed"),
    (feature(products=["shopping"]), "features.5.products", "shopping"),
    ({"features": lambda f: f[:3]}, "features", "item tower"),
    ({"features": lambda f: f[1:2] + f[3:]}, "features", "feed"),
    ({"features": lambda f: f[:4]}, "features", "standard"),
    # names
    (feature(name="age"), "features.5.name", "age"),
    (feature(name="ctr"), "features.5.name", "ctr"),
    (feature(name="ctr_of_impressions"), "features.5.name", "ctr_of_impressions"),
    (feature(name="Robert'); DROP"), "features.5.name", "DROP"),
    (feature(name="user_id"), "features.5.name", "user_id"),
    (feature(name="outcome_ctr"), "features.5.name", "outcome_ctr"),
    (feature(name="past_user_id"), "features.5.name", "past_user_id"),
    *((feature(name=n), "features.5.name", n) for n in ("select", "left", "is", "positional", "false")),
    *((feature(name=n), "features.5.name", n) for n in ("line", "file_row_number", "rows", "missing", "r", "s")),
    ({"name": "dagster"}, "name", "dagster"),
    ({"name": "My Ads"}, "name", "My Ads"),
    ({"extras": {"age": "double"}}, "extras.age", "age"),
    ({"extras": {"line": "double"}}, "extras.line", "line"),
    ({"extras": {"outcome_ctr": "integer"}}, "extras.outcome_ctr", "outcome_ctr"),
    ({"extras": {"bid": "money"}}, "extras.bid", "money"),
    # encodings
    (feature(kind="categorical"), "features.5", "exactly one of"),
    (feature(kind="categorical", buckets=3, min_count=2), "features.5", "buckets"),
    (feature(kind="categorical", buckets=True), "features.5.buckets", "True"),
    (feature(kind="categorical", buckets=3, log1p=True), "features.5.log1p", "True"),
    (feature(log1p=1), "features.5.log1p", "1"),
    (feature(buckets=3), "features.5.buckets", "3"),
    (feature(vocabulary=["a"]), "features.5.vocabulary", "a"),
    (feature(type="text"), "features.5.type", "text"),
    (feature(width=8), "features.5.width", "8"),
    (feature(key=True), "features.5.key", "True"),
    (feature(bins=1), "features.5.bins", "1"),
    (feature(bins=4, type="integer"), "features.5.type", "integer"),
    (feature(bins=4, min_count=2), "features.5.min_count", "2"),
    (feature(kind="categorical", buckets=3, bins=4), "features.5.bins", "4"),
    (feature(max_missing=NAN), "features.5.max_missing", "nan"),
    (categories(), "features.5.vocabulary", "[]"),
    (categories("a", "b", "a"), "features.5.vocabulary.2", "a"),
    (categories("a", ""), "features.5.vocabulary.1", "''"),
    (categories("a", 1824), "features.5.vocabulary.1", "1824"),
    (categories(1, 2, "1", type="integer"), "features.5.vocabulary.2", "1"),
    (categories(1, "one", type="integer"), "features.5.vocabulary.1", "one"),
    (categories(1, "01", type="integer"), "features.5.vocabulary.1", "01"),
    (categories(1, True, type="integer"), "features.5.vocabulary.1", "True"),
    # history
    (history(["item"]), "features.5.history.by.0", "item"),
    (history(["item_id", "user_id"]), "features.5.history.by.1", "user_id"),
    (history(["surface"]), "features.5.history.by.0", "surface"),
    (history(["country"]), "features.5.history.by.0", "country"),
    (history(["user_id", "item_id"], side="query"), "features.5.history.by.1", "item_id"),
    (history(["product"], side="query"), "features.5.history.by.0", "product"),
    (history(["advertiser"], side="query"), "features.5.history.by.0", "advertiser"),
    (history(["x"]), "features.5.history.by.0", "x"),
    (history(["item_id", "item_id"]), "features.5.history.by.1", "item_id"),
    (history([]), "features.5.history.by", "[]"),
    (history(["item_id"], of="sale"), "features.5.history.of", "sale"),
    (history(["item_id"], per="sale"), "features.5.history.per", "sale"),
    (history(["item_id"], prior=3), "features.5.history.prior", "3"),
    (history(["item_id"], per="impressions", prior=INF), "features.5.history.prior", "inf"),
    (history(["item_id"], days=401), "features.5.history.days", "401"),
    # domains
    ({"surfaces": ["feed", "feed"]}, "surfaces.1", "feed"),
    ({"surfaces": ["feed", "se arch"]}, "surfaces.1", "se arch"),
    ({"out_of_scope": {"surfaces": ["feed"]}}, "out_of_scope.surfaces", "feed"),
    ({"out_of_scope": {"products": ["a", "a"]}}, "out_of_scope.products.1", "a"),
    (
        {"surfaces": ["feed", "search", "pins"], "tasks": [{"name": "ctr", "surfaces": ["feed", "pins"]}]},
        "surfaces",
        "search",
    ),
    ({"tasks": [{"name": "ctr", "products": ["shopping"]}]}, "products", "standard"),
    # days
    ({"time_zone": "Mars/Olympus"}, "time_zone", "Mars/Olympus"),
    ({"start": "yesterday"}, "start", "yesterday"),
    ({"start": 20260101}, "start", "20260101"),
    ({"start": date(1, 1, 1)}, "start", "0001-01-01"),
    ({"start": date(1969, 12, 31)}, "start", "1969-12-31"),
    ({"start": "2026-02-30"}, "start", "2026-02-30"),
    ({"end": date(2201, 1, 1)}, "end", "2201-01-01"),
    ({"end": "2025-01-01"}, "end", "2025-01-01"),
    ({"end": "2026-01-07"}, "end", "2026-01-08"),
    ({**parquet(), "end": "2026-01-10"}, "end", "2026-01-11"),
    # sources and the ranker
    ({"source": {"kind": "kafka"}}, "source", "kafka"),
    ({"source": {"kind": "adworld", "seed": -1}}, "source.seed", "-1"),
    ({"source": {"kind": "adworld", "seed": 2**31}}, "source.seed", str(2**31)),
    ({"source": {"kind": "adworld", "rows_per_day": 1e3}}, "source.rows_per_day", "1000.0"),
    ({"source": {"kind": "kuairand", "data": "x"}}, "ranker", "None"),
    ({"ranker": {"train_days": 3}}, "ranker", "train_days"),
    ({**parquet(scores=True), "ranker": {}}, "ranker", "{}"),
    (cross(["user_id", "colour"]), "ranker.cross.0.1", "colour"),
    (cross(["outcome_ctr", "item_id"]), "ranker.cross.0.0", "outcome_ctr"),
    (cross(["user_id", "user_id"]), "ranker.cross.0", "user_id"),
    (cross(["user_id", "price"], ["price", "user_id"]), "ranker.cross.1", "price"),
    ({**parquet(), "ranker": {"seed": -1}}, "ranker.seed", "-1"),
    ({**parquet(), "ranker": {"learning_rate": NAN}}, "ranker.learning_rate", "nan"),
    (parquet(columns={"item": "ad"}), "source.columns.item", "ad"),
    (parquet(columns={"score_ctr": "p"}), "source.columns.score_ctr", "p"),
    (parquet(columns={"user_id": "id", "item_id": "id"}), "source.columns", "id"),
    (parquet(columns={"item_id": "user_id"}), "source.columns.item_id", "user_id"),
    (parquet(columns={"price": "age"}), "source.columns.price", "age"),
    # experiments
    ({"experiments": {"tuning_days": ["2026-01-03", "2026-01-03"]}}, "experiments.tuning_days.1", "2026-01-03"),
    ({"experiments": {"tuning_days": ["2026-01-01"]}}, "experiments.tuning_days.0", "2026-01-01"),
    ({**parquet(), "experiments": {"tuning_days": ["2026-01-04"]}}, "experiments.tuning_days.0", "2026-01-04"),
    ({"experiments": {"last_day": "2026-01-07"}}, "experiments.last_day", "2026-01-07"),
    ({"end": "2026-02-01", "experiments": {"last_day": "2026-02-02"}}, "experiments.last_day", "2026-02-02"),
    ({"experiments": {"days": 2, "ablation_days": 3}}, "experiments.ablation_days", "3"),
    ({"experiments": {"contenders": {"pooled_towers": {"experts": 4}}}}, "experiments.contenders", "4"),
    ({"experiments": {"contenders": {"slice_towers": {"deviation": 0.1}}}}, "experiments.contenders", "0.1"),
    ({"experiments": {"contenders": {"lists": {}}}}, "experiments.contenders.lists", "{}"),
    ({"time_zone": "America/New_York"}, "time_zone", "America/New_York"),
    # switches and numbers
    ({"training": {"main_effects": "off"}}, "training.main_effects", "off"),
    ({"experiments": {"mtmd": {"main_effects": 1}}}, "experiments.mtmd.main_effects", "1"),
    ({"experiments": {"mtmd": {"dropout": 1}}}, "experiments.mtmd.dropout", "1"),
    ({"join": {"sample_rate": 1.5}}, "join.sample_rate", "1.5"),
    ({"join": {"lateness_hours": INF}}, "join.lateness_hours", "inf"),
    ({"join": {"lateness_hours": 9000}}, "join.lateness_hours", "9000"),
    ({"drift": {"tolerance": INF}}, "drift.tolerance", "inf"),
    ({"training": {"window_days": 401}}, "training.window_days", "401"),
    ({"training": {"window_days": True}}, "training.window_days", "True"),
    ({"training": {"learning_rate": INF}}, "training.learning_rate", "inf"),
    ({"training": {"seed": 2**31}}, "training.seed", str(2**31)),
    ({"schedule_hour": False}, "schedule_hour", "False"),
]


@pytest.mark.parametrize(("changes", "key", "received"), MISTAKES)
def test_mistakes_are_refused_with_file_key_and_value(changes, key, received):
    with pytest.raises(PlatformError) as error:
        parse_platform(broken(**changes), "toy.yaml")
    message = str(error.value)
    assert message.startswith((f"toy.yaml: {key}: ", f"toy.yaml: {key}."))
    assert received in message
    assert "(received " in message


@pytest.mark.parametrize("key", ["features.999.bins", "tasks.ctr.weight", "features.0.x"])
def test_a_key_with_dots_is_a_key(key):
    with pytest.raises(PlatformError, match=rf"^toy\.yaml: {re.escape(key)}: no such key \(received 4\)$"):
        parse_platform(broken(**{key: 4}), "toy.yaml")


@pytest.mark.parametrize(
    ("changes", "key", "received"),
    [
        ({"bins": 1}, "features.5.bins", "1"),
        ({"surfaces": ["nowhere"]}, "features.5.surfaces", "'nowhere'"),
    ],
    ids=["of its own", "beside the others"],
)
def test_a_mistake_names_its_feature(changes, key, received):
    with pytest.raises(PlatformError) as error:
        parse_platform(broken(**feature(**changes)), "toy.yaml")
    assert str(error.value).startswith(f"toy.yaml: {key}: ")
    assert str(error.value).endswith(f"(received {received}; feature x)")


@pytest.mark.parametrize(
    ("changes", "key", "said", "received"),
    [
        ({"colour": "red"}, "", "no such key", "red"),
        ({"source": {"kind": "csv"}}, "kind", "expected one of 'adworld', 'kuairand', 'parquet'", "csv"),
        ({"source": {"seed": 1}}, "kind", "needed", None),
        ({"tasks": [{}]}, "", "needed", None),
        ({"tasks": []}, "", "expected at least 1 of them", []),
        ({"extras": {"bid": "money"}}, "", "expected 'double', 'integer' or 'text'", "money"),
        ({"start": date(1969, 12, 31)}, "", "expected at least 1970-01-01", date(1969, 12, 31)),
        ({"training": {"seed": True}}, "", "expected a whole number", True),
        ({"features": 3}, "", "expected a list", 3),
        ({"time_zone": "Mars/Olympus"}, "", "no such time zone", "Mars/Olympus"),
    ],
)
def test_an_error_of_pydantic_is_put_in_words(changes, key, said, received):
    with pytest.raises(ValidationError) as error:
        Platform.model_validate(yaml.safe_load(broken(**changes)))
    fault = in_words(error.value.errors()[0])
    assert (fault.key, str(fault), fault.received) == (key, said, received)


def test_every_mistake_is_put_in_plain_words():
    said = []
    for changes, *_ in MISTAKES:
        with pytest.raises(PlatformError) as error:
            parse_platform(broken(**changes), "toy.yaml")
        said += re.findall(r"^toy\.yaml: [^:]+: (.*) \(received ", str(error.value), re.MULTILINE)
    assert len(said) >= len(MISTAKES)
    assert not [words for words in said if re.search("Input|Field|valid|tag", words)]


@pytest.mark.parametrize(
    "changes",
    [
        feature(name="hour"),  # a keyword that is a column all the same
        categories(1, "2", -3, type="integer"),
        history(["item_id", "product", "advertiser"], per="impressions", prior=3),
        history(["user_id", "surface", "country"], side="query", of="impressions"),
        {"end": "2026-01-08"},
        {**parquet(), "end": "2026-01-11"},
        {"training": {"learning_rate": "2e-3"}},  # what YAML makes of it, for want of a point
        {"join": {"lateness_hours": 24, "sample_rate": 1}},
        cross(["user_id", "advertiser"], ["surface", "item_id"]),
        parquet(columns={"item_id": "ad", "ts": "at", "ds": "day", "age": "user_id"}),
        parquet(scores=True, columns={"ts": "time", "scored_at": "time", "score_ctr": "p"}),
    ],
)
def test_what_is_right_is_accepted(changes):
    parse_platform(broken(**changes), "toy.yaml")


def test_one_mistake_is_one_line_and_two_are_two():
    def lines(**changes):
        with pytest.raises(PlatformError) as error:
            parse_platform(broken(**changes), "toy.yaml")
        return str(error.value).splitlines()

    assert len(lines(tasks=[{"name": "ctr", "weight": 0}])) == 1
    assert len(lines(tasks=[{"name": "ctr", "weight": 0}], drift={"days": 0})) == 2


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([("a", "a")], "itself"),
        ([("a", "b"), ("b", "a")], "a -> b -> a"),
        ([("a", "b"), ("b", "c"), ("c", "a")], "a -> b -> c -> a"),
        ([("a", "b"), ("b", None)], "before a"),
    ],
)
def test_a_task_given_itself_a_circle_and_a_wrong_order_are_told_apart(tasks, said):
    with pytest.raises(PlatformError, match=rf"toy\.yaml: tasks\.0\.given: .*{said}"):
        parse_platform(broken(tasks=[{"name": n, "given": given} for n, given in tasks]), "toy.yaml")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        (MINIMAL + "tasks:\n  - {name: cvr}\n", "tasks", (7, 17)),
        (MINIMAL.replace("{name: age, side", "{name: age, name: age2, side"), "name", (12, 12)),
        (MINIMAL + '"start": 2026-01-02\n', "start", (3, 17)),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(text, key, lines):
    with pytest.raises(PlatformError) as error:
        parse_platform(text, "toy.yaml")
    message = str(error.value)
    assert message.startswith(f"toy.yaml: {key}: ")
    assert all(str(line) in message for line in lines)
    assert "(received " in message


def test_anchors_and_merges_are_read():
    merged = MINIMAL.replace("{name: age, side: query, kind: dense}", "&q {name: age, side: query, kind: dense}")
    platform = parse_platform(merged + "  - {<<: *q, name: more}\n", "toy.yaml")
    assert platform.features[-1].name == "more"
    assert platform.features[-1].side == "query"


# -- files that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"name: [", b"- a\n- b\n", b"PAR1\xff\x00\x81", b"", b"name: \x00", b"source: adworld\n", b"start: 2026-13-45\n"],
    ids=["broken", "list", "binary", "empty", "control character", "no mapping", "no date"],
)
@pytest.mark.parametrize("data", [None, "folder"])
def test_registering_what_is_no_platform_file_names_the_file(tmp_path, content, data):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    home = Home(tmp_path / "home")
    with pytest.raises(PlatformError, match=r"mine\.yaml"):
        home.register(str(file), data)
    assert not home.root.exists()


@pytest.mark.parametrize("text", ["- a\n- b\n", "name: [", ""])
def test_what_is_no_mapping_is_refused(text):
    with pytest.raises(PlatformError, match=r"toy\.yaml"):
        parse_platform(text, "toy.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlatformError, match=r"absent\.yaml"):
        load_platform(tmp_path / "absent.yaml")


def test_slices_tasks_and_columns_are_derived():
    platform = parse_platform(MINIMAL, "toy.yaml")
    assert platform.slices == (
        ("feed", "standard"),
        ("feed", "shopping"),
        ("search", "standard"),
        ("search", "shopping"),
    )
    assert platform.task_slices["octr"] == (("feed", "standard"), ("search", "standard"))
    words, price = (next(f for f in platform.features if f.name == n) for n in ("words", "price"))
    assert [platform.has(words, s, p) for s, p in platform.slices] == [False, False, True, True]
    assert [platform.has(price, s, p) for s, p in platform.slices] == [False, True, False, True]
    columns = tables(platform)["joined_examples"]
    assert {
        "age": "FLOAT",
        "country": "VARCHAR",
        "score_octr": "DOUBLE",
        "outcome_gctr": "TINYINT",
    }.items() <= columns.items()
    assert platform.model_schema.domains("item") == ("standard", "shopping")
    assert [f.name for f in platform.model_schema.side("item")] == ["price", "advertiser"]
    assert platform.model_schema.side("query")[1].domains == ("search",)


def test_a_number_with_bins_is_read_twice_from_one_column():
    changes = feature(bins=16, width=3, key=True, log1p=True, surfaces=["search"])
    platform = parse_platform(broken(**changes), "toy.yaml")
    number, binned = platform.model_schema.side("query")[-2:]
    assert (number.kind, number.column, number.log1p, number.key, number.bins) == ("dense", "x", True, False, None)
    assert (binned.kind, binned.column, binned.bins, binned.width, binned.key) == ("categorical", "x", 16, 3, True)
    assert binned.log1p, "a number too large for 32 bits is missing in both or in neither"
    assert number.domains == binned.domains == ("search",)
    assert [c for c in tables(platform)["joined_examples"] if c.startswith("x")] == ["x"]


@pytest.mark.parametrize("changes", [{}, feature(bins=16)], ids=["minimal", "bins"])
def test_the_schema_survives_json(changes):
    schema = parse_platform(broken(**changes), "toy.yaml").model_schema
    assert type(schema).from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_windows():
    platform = parse_platform(broken(training={"window_days": 3}), "toy.yaml")
    assert platform.window(date(2026, 1, 5)) == [date(2026, 1, 3), date(2026, 1, 4), date(2026, 1, 5)]
    assert platform.first_window_end == date(2026, 1, 3)
    assert platform.first_evaluated == date(2026, 1, 4)


def test_days_are_built_from_where_features_read_them():
    platform = parse_platform(broken(**history(["item_id"])), "toy.yaml")
    assert platform.built_from(date(2026, 1, 20)) == date(2026, 1, 17)
    assert platform.built_from(date(2026, 1, 2)) == date(2026, 1, 1)
    without_scores = parse_platform(broken(**parquet()), "toy.yaml")
    assert without_scores.built_from(date(2026, 1, 20)) == date(2026, 1, 1), "the ranker is trained on the first days"


@pytest.mark.parametrize("name", ["adworld", "kuairand"])
def test_shipped_platforms_load(name):
    platform = shipped_platform(name)
    assert platform.name == name
    for side, domains in (("query", platform.surfaces), ("item", platform.products)):
        keys = [f for f in platform.model_schema.side(side) if f.key]
        assert all(any(d in f.domains for f in keys) for d in domains), (
            "every domain's shallow expert needs a key feature"
        )
