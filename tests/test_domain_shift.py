"""The share of a feature's variance that lies between domains, against a computation from the values."""

import numpy as np
import pytest

from mtmd_assets.domain_shift import Shift, domain_shifts


def statistics(values: np.ndarray) -> dict[str, float]:
    return {"mean": values.mean(), "std": values.std(), "count": len(values)}


def test_the_share_is_the_correlation_ratio_of_the_values():
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 1 + mean, rows) for mean, rows in ((0.0, 300), (1.0, 100), (3.0, 50))]
    every = np.concatenate(groups)
    fitted = np.concatenate([np.full(len(g), g.mean()) for g in groups])
    [shift] = domain_shifts({"query": {f"d{n}": {"x": statistics(g)} for n, g in enumerate(groups)}})
    spread = max(g.std() for g in groups) / min(g.std() for g in groups)
    assert shift == Shift("query", "x", pytest.approx(fitted.var() / every.var()), pytest.approx(spread))


def test_the_most_unlike_comes_first_and_what_one_domain_has_alone_is_left_out():
    same, far = {"mean": 1.0, "std": 1.0, "count": 10}, {"mean": 9.0, "std": 1.0, "count": 10}
    unseen = {"mean": 0.0, "std": 1.0, "count": 0}
    domains = {
        "home": {"a": same, "b": same, "alone": same, "unseen": same, "constant": {**same, "std": 0.0}},
        "search": {"a": same, "b": far, "unseen": unseen, "constant": {**same, "std": 0.0}},
    }
    found = domain_shifts({"query": domains, "item": {"only": {"c": same}}})
    assert [(s.feature, s.between) for s in found] == [("b", pytest.approx(16 / 17)), ("a", 0.0), ("constant", 0.0)]
    assert [s.spread for s in found] == [1.0, 1.0, 1.0]


def test_a_feature_that_is_constant_in_one_domain_only_has_an_infinite_spread():
    still, moving = {"mean": 0.0, "std": 0.0, "count": 5}, {"mean": 0.0, "std": 2.0, "count": 5}
    [shift] = domain_shifts({"item": {"a": {"x": still}, "b": {"x": moving}}})
    assert (shift.between, shift.spread) == (0.0, np.inf)
