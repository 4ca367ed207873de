"""The platform file: what is refused, and what is derived from it."""

from datetime import date

import pytest
import yaml

from mtmd_assets.faults import PlatformError
from mtmd_assets.platform import load_platform, parse_platform, shipped_platform
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


@pytest.mark.parametrize(
    ("changes", "key", "received"),
    [
        ({"colour": "red"}, "colour", "red"),
        ({"tasks": lambda t: [*t, {"name": "cvr", "given": "sale"}]}, "tasks.3.given", "sale"),
        ({"tasks": lambda t: [t[1], t[0]]}, "tasks.0.given", "ctr"),
        ({"tasks": lambda t: [{**t[0], "products": ["shopping"]}, t[2]]}, "tasks.1", "standard"),
        ({"tasks": lambda t: [{**t[0], "weight": 0}]}, "tasks.0.weight", "0"),
        (
            {"features": lambda f: [*f, {"name": "x", "side": "query", "kind": "dense", "surfaces": ["maps"]}]},
            "features.5.surfaces",
            "maps",
        ),
        (
            {"features": lambda f: [*f, {"name": "x", "side": "item", "kind": "dense", "products": ["video"]}]},
            "features.5.products",
            "video",
        ),
        (
            {"features": lambda f: [*f, {"name": "x", "side": "item", "kind": "dense", "surfaces": ["feed"]}]},
            "features.5",
            "surfaces",
        ),
        ({"features": lambda f: [*f, f[0]]}, "features", "age"),
        (
            {"features": lambda f: [*f, {"name": "Robert'); DROP", "side": "query", "kind": "dense"}]},
            "features.5.name",
            "DROP",
        ),
        (
            {"features": lambda f: [*f, {"name": "select", "side": "query", "kind": "dense"}]},
            "features.5.name",
            "select",
        ),
        ({"features": lambda f: [*f, {"name": "user_id", "side": "query", "kind": "dense"}]}, "features.5", "user_id"),
        (
            {"features": lambda f: [*f, {"name": "x", "side": "query", "kind": "categorical"}]},
            "features.5",
            "exactly one of",
        ),
        (
            {"features": lambda f: [*f, {"name": "x", "side": "query", "kind": "dense", "buckets": 3}]},
            "features.5",
            "buckets",
        ),
        ({"features": lambda f: f[:3]}, "features", "item tower"),
        ({"surfaces": ["feed", "feed"]}, "surfaces", "feed"),
        ({"surfaces": ["feed", "se arch"]}, "surfaces", "se arch"),
        ({"time_zone": "Mars/Olympus"}, "time_zone", "Mars/Olympus"),
        ({"start": "yesterday"}, "start", "yesterday"),
        ({"end": "2025-01-01"}, "end", "2025-01-01"),
        ({"source": {"kind": "kafka"}}, "source", "kafka"),
        ({"source": {"kind": "kuairand", "data": "x"}}, "ranker", "ranker"),
        ({"extras": {"age": "double"}}, "platform", "age"),
        ({"join": {"sample_rate": 1.5}}, "join.sample_rate", "1.5"),
        (
            {
                "features": lambda f: [
                    *f,
                    {"name": "h", "side": "item", "kind": "dense", "history": {"by": ["item"], "of": "ctr", "days": 3}},
                ]
            },
            "features.5.history.by",
            "item",
        ),
    ],
)
def test_mistakes_are_refused_with_file_key_and_value(changes, key, received):
    with pytest.raises(PlatformError) as error:
        parse_platform(broken(**changes), "toy.yaml")
    message = str(error.value)
    assert message.startswith("toy.yaml: ")
    assert key in message
    assert received in message


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


def test_the_schema_survives_json():
    import json

    schema = parse_platform(MINIMAL, "toy.yaml").model_schema
    assert type(schema).from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


def test_windows():
    platform = parse_platform(broken(training={"window_days": 3}), "toy.yaml")
    assert platform.window(date(2026, 1, 5)) == [date(2026, 1, 3), date(2026, 1, 4), date(2026, 1, 5)]
    assert platform.first_window_end == date(2026, 1, 3)


@pytest.mark.parametrize("name", ["adworld", "kuairand"])
def test_shipped_platforms_load(name):
    platform = shipped_platform(name)
    assert platform.name == name
    for side, domains in (("query", platform.surfaces), ("item", platform.products)):
        keys = [f for f in platform.model_schema.side(side) if f.key]
        assert all(any(d in f.domains for f in keys) for d in domains), (
            "every domain's shallow expert needs a key feature"
        )
