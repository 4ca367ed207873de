"""Failure signatures of the routing layer."""

import math

import pytest

from checks.routing import signatures


def router(gates, entropy, domain="home", task="ctr"):
    """Rows of `routing_metrics` of one router."""
    of_mean = -sum(g * math.log(g) for g in gates if g)
    return [
        {
            "tower": "query",
            "domain": domain,
            "task": task,
            "expert": f"expert {n}",
            "mean_gate": g,
            "entropy": entropy,
            "entropy_of_mean": of_mean,
        }
        for n, g in enumerate(gates)
    ]


def test_a_router_that_uses_all_its_experts_has_no_fault():
    assert signatures(router([0.5, 0.3, 0.2], entropy=0.8)) == []


def test_rows_that_all_weigh_alike_are_uniform():
    [found] = signatures(router([0.34, 0.33, 0.33], entropy=1.097))
    assert (found.tower, found.domain, found.task, found.fault) == ("query", "home", "ctr", "uniform")


def test_experts_that_share_the_rows_between_them_are_not_uniform():
    # every row has its own expert, so that the mean is even
    assert signatures(router([0.34, 0.33, 0.33], entropy=0.1)) == []


def test_one_expert_with_all_the_weight_is_a_collapse():
    [found] = signatures(router([0.998, 0.001, 0.001], entropy=0.01))
    assert found.fault == "collapsed"
    assert found.says == "expert 0 has 99.8% of the weight"


def test_an_unused_expert_is_named():
    [found] = signatures(router([0.6, 0.395, 0.005], entropy=0.6))
    assert (found.fault, found.says) == ("unused", "expert 2 has 0.50% of the weight")


@pytest.mark.parametrize("rows", [[], router([1.0], entropy=0.0)])
def test_nothing_to_route_is_no_fault(rows):
    assert signatures(rows) == []


def test_each_router_is_judged_by_itself():
    rows = (
        router([0.5, 0.3, 0.2], 0.8)
        + router([1 / 3] * 3, math.log(3), task="gctr")
        + router([1.0, 0, 0], 0.0, "search")
    )
    assert [(s.domain, s.task, s.fault) for s in signatures(rows)] == [
        ("home", "gctr", "uniform"),
        ("search", "ctr", "collapsed"),
    ]
