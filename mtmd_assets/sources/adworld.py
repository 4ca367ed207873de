"""adworld: a simulated platform of three surfaces and two ad products, and the logs it would write.

`Adworld.read(day)` makes one day from (seed, day) alone: requests with candidates, the true probability of every
outcome, the outcomes, and the log of a heavyweight ranker that sees the truth with a realistic ranker's error.
Equations and parameters are in docs/adworld.md.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from mtmd_assets.faults import PlatformError
from mtmd_assets.sources import LogDay
from mtmd_assets.sources.adworld_world import (
    CATEGORIES,
    COUNTRIES,
    COUNTRY_CLICK,
    COUNTRY_HOURS,
    DEVICE_SHARE,
    DEVICES,
    FORMATS,
    LATENT,
    PRODUCTS,
    SHOPPING,
    SURFACES,
    Ads,
    Array,
    Codes,
    Constants,
    Users,
    ads_of,
    codes_of,
    generator,
    sigmoid,
    text,
    users_of,
)
from mtmd_assets.tables import tables

if TYPE_CHECKING:
    from mtmd_assets.platform import Platform

HOME, SEARCH, RELATED = range(3)
CHUNK = 1 << 17
"""Rows made at once, each chunk from streams of its own: what a day holds does not depend on the threads."""
EPOCH = date(2026, 1, 1).toordinal()
DAY_US = 86_400_000_000

SURFACE_SHARE = np.array([0.60, 0.25, 0.15])
SHOPPING_SHARE = np.array([0.25, 0.42, 0.33], np.float32)
"""Share of shopping candidates on each surface."""
ON_TOPIC = np.array([0.35, 0.75, 0.60], np.float32)
"""How often retrieval picks a candidate from the category of the session, query or pin."""

# -- coefficients of the truth; rows are surfaces, columns products -------------------------------------------------
CTR_BASE = np.array([[-5.1, -5.35], [-4.6, -4.25], [-4.95, -4.6]], np.float32)
GCTR_BASE = np.array([[-0.4, -0.2], [0.1, 0.0], [-0.2, 0.1]], np.float32)
ACT_BASE = np.array([[-1.0, -3.6], [-0.4, -3.3], [-0.8, -3.5]], np.float32)
"""Of octr for standard ads, of cvr for shopping ads."""
HIDE_BASE = np.array([[-5.2, -5.5], [-6.0, -6.2], [-5.6, -5.8]], np.float32)
REPIN_BASE = np.array([[-4.6, -4.2], [-5.2, -4.6], [-4.4, -4.0]], np.float32)
TASTE = {"ctr": np.array([0.75, 0.30, 0.50]), "gctr": np.array([0.40, 0.20, 0.35]), "act": np.array([0.30, 0.25, 0.25])}
"""How much each surface's click, long click and act depend on the user's taste ..."""
TOPIC = {"ctr": np.array([0.0, 0.55, 0.50]), "gctr": np.array([0.0, 0.30, 0.25]), "act": np.array([0.0, 0.30, 0.15])}
"""... and on the topic of the query or pin."""
SAME_CATEGORY = np.array([0.0, 0.45, 0.25], np.float32)
INTENT_CTR = np.array([-0.5, 1.2], np.float32)
INTENT_ACT = np.array([0.5, 1.6], np.float32)
"""Effect of a search's commercial intent on each product."""
PRICE_CTR, PRICE_ACT = 0.35, 0.60
PEAK_CTR = np.array([0.25, 0.10, 0.20], np.float32)
DEVICE_FORMAT = np.array([[0.0, 0.20, 0.10], [0.0, 0.15, 0.05], [0.05, -0.15, 0.10], [0.0, -0.20, -0.10]], np.float32)
DEVICE_GCTR = np.array([0.0, -0.1, 0.35, -0.25], np.float32)
LANDING_ACT = np.array([-0.2, 0.35, -0.3, 0.0], np.float32)

# -- the ranker's error, in logits ------------------------------------------------------------------------------------
RANKER_DAYS = 28
"""Days between two versions of the heavyweight ranker."""
SLICE_BIAS, DAILY_BIAS = 0.05, 0.02
SYSTEMATIC = {"ctr": 0.15, "gctr": 0.15, "act": 0.25}
NOISE = {"ctr": 0.10, "gctr": 0.10, "act": 0.15}

# -- defects of the logs, as shares of the impressions -----------------------------------------------------------------
UNSCORED, LATE, INVALID, TWICE, ORPHANS = 0.02, 0.015, 0.003, 0.01, 0.001
REPEATED, UNKNOWN_SURFACE = 0.0005, 0.0002
INVALID_VALUES = np.array([np.nan, 0.0, 1.0, 1.2, np.inf, -0.1])


@dataclass(frozen=True)
class _Day:
    """What the chunks of a day share."""

    seed: int
    ordinal: int
    rows: int
    constants: Constants
    users: Users
    ads: Ads


@dataclass(frozen=True)
class _Requests:
    """The requests of one chunk. Arrays are (requests,) or (LATENT, requests)."""

    user: Codes
    surface: Codes
    device: Codes
    second: npt.NDArray[np.float64]
    hour: Codes
    category: Codes
    """Of the query or pin; in the home feed, the interest that retrieval follows."""
    topic: Array
    intent: Array
    length: Array
    depth: Array
    freshness: Array
    pin_popularity: Array
    pin_age: Array
    size: Codes


@dataclass(frozen=True)
class _Rows:
    """The impressions of one chunk: which request, which ad."""

    request: npt.NDArray[np.int32]
    ad: npt.NDArray[np.int32]
    cell: npt.NDArray[np.int32]
    """surface * 2 + product"""
    surface: npt.NDArray[np.int32]
    product: npt.NDArray[np.int32]


@dataclass(frozen=True)
class _Logits:
    """Logits of every row: of a click, and given a click of a long click and of the product's own act.

    The act is an outbound click for a standard ad and a conversion for a shopping ad.
    """

    ctr: Array
    gctr: Array
    act: Array

    def unconditional(self) -> tuple[Array, Array, Array]:
        """P(task | impression): a child is its parent times the conditional, so it never exceeds it."""
        ctr = sigmoid(self.ctr)
        return ctr, ctr * sigmoid(self.gctr), ctr * sigmoid(self.act)


class Adworld:
    """The simulator as a source of logs."""

    def __init__(self, platform: "Platform"):
        """`platform` names the size and the seed, and the columns that are wanted."""
        assert platform.source.kind == "adworld"
        self.source = platform.source
        self.constants = Constants(self.source.seed)
        self.columns = tables(platform)

    def read(self, day: date) -> LogDay:
        """The logs of `day`: always the same for one platform file, whichever days were read before."""
        world = self._world(day)
        starts = range(0, world.rows, CHUNK)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            chunks = list(pool.map(lambda start: _chunk(world, start), starts))
        return LogDay(
            impressions=self._wanted([i for i, _ in chunks], "impressions"),
            scores=self._wanted([s for _, s in chunks], "heavyweight_scores"),
            impressions_file=f"adworld (seed {self.source.seed})",
            scores_file=f"adworld's ranker (seed {self.source.seed})",
        )

    def _world(self, day: date) -> _Day:
        s, ordinal = self.source, day.toordinal()
        users = users_of(self.constants, s.users, ordinal)
        ads = ads_of(self.constants, s.ads, s.users, ordinal)
        return _Day(s.seed, ordinal, s.rows_per_day, self.constants, users, ads)

    def _wanted(self, parts: list[pl.DataFrame], table: str) -> pl.DataFrame:
        unknown = [c for c in self.columns[table] if c not in parts[0].columns]
        if unknown:
            raise PlatformError(f"source: adworld simulates no {', '.join(unknown)} for {table}")
        return pl.concat([p.select(list(self.columns[table])) for p in parts], rechunk=False)


def _chunk(world: _Day, start: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Impressions and scores of up to CHUNK rows from row `start` of the day."""
    n = min(CHUNK, world.rows - start)
    rng = generator(world.seed, world.ordinal, "chunk", start)
    requests = _draw_requests(rng, world, start, n)
    rows = _draw_candidates(rng, world, requests)
    truth, match, peak = _true_logits(world, requests, rows)
    impressions = _impressions(rng, world, requests, rows, truth, match, peak, start)
    seen = _seen_by_ranker(rng, world, requests, rows, truth)
    scores = _score_log(rng, world, impressions, rows, seen)
    return _damaged(rng, impressions), scores


# -- who asks for what ---------------------------------------------------------------------------------------------


def _draw_requests(rng: np.random.Generator, world: _Day, start: int, n: int) -> _Requests:
    size = 2 + rng.binomial(10, 0.3, n // 2 + 1)
    size = size[: 1 + np.searchsorted(np.cumsum(size), n)]
    size[-1] -= size.sum() - n  # the last request of a chunk is cut to what is left
    m, users = len(size), world.users

    user = np.searchsorted(users.reach, rng.random(m) * users.reach[-1], side="right").clip(max=len(users.reach) - 1)
    surface = codes_of(rng.random(m), SURFACE_SHARE)
    device = np.where(rng.random(m) < 0.8, users.device[user], codes_of(rng.random(m), DEVICE_SHARE))

    # Requests are in order of time; a chunk covers its share of the day's traffic, which follows the clock.
    minute = np.arange(1441)
    traffic = np.cumsum(1 + 0.45 * np.sin(2 * np.pi * (minute / 1440 - 0.55)))
    clock = (traffic - traffic[0]) / (traffic[-1] - traffic[0])
    quantile = (start + n * np.sort(rng.random(m))) / world.rows
    second = np.interp(quantile, clock, minute * 60.0)
    hour = (np.floor(second / 3600).astype(np.int64) + COUNTRY_HOURS[users.country[user]]) % 24

    u = rng.random(m, dtype=np.float32)
    category = (users.interests[user] <= u[:, None]).sum(1).clip(max=len(CATEGORIES) - 1)
    topic = 0.85 * world.constants.centre[:, category] + 0.35 * rng.standard_normal((LATENT, m), dtype=np.float32)
    commercial = world.constants.commerciality[category] + 0.4 * users.commercial[user]
    return _Requests(
        user=user,
        surface=surface,
        device=device,
        second=second,
        hour=hour,
        category=category,
        topic=topic,
        intent=sigmoid(commercial + rng.standard_normal(m, dtype=np.float32)),
        length=1 + rng.poisson(2.2, m).astype(np.float32),
        depth=rng.geometric(1 / 15, m).astype(np.float32),
        freshness=rng.beta(2, 2, m).astype(np.float32),
        pin_popularity=rng.standard_normal(m, dtype=np.float32),
        pin_age=rng.exponential(300, m).astype(np.float32),
        size=size,
    )


def _draw_candidates(rng: np.random.Generator, world: _Day, q: _Requests) -> _Rows:
    request = np.repeat(np.arange(len(q.size), dtype=np.int32), q.size)
    n, ads = len(request), world.ads
    surface = q.surface.astype(np.int32)[request]
    product = (rng.random(n, dtype=np.float32) < SHOPPING_SHARE[surface]).astype(np.int32)
    on_topic = rng.random(n, dtype=np.float32) < ON_TOPIC[surface]
    category = np.where(on_topic, q.category.astype(np.int32)[request], len(CATEGORIES))
    # Quantiles a golden step apart: a request rarely holds the same ad twice, and each ad keeps its share.
    position = np.arange(n) - np.repeat(np.cumsum(q.size) - q.size, q.size)
    quantile = (rng.random(len(q.size))[request] + 0.6180339887498949 * position) % 1
    low, high = world.ads.cells[product, category].T
    ad = np.searchsorted(ads.reach, low + quantile * (high - low), side="right") - 1
    ad = ad.clip(0, len(ads.reach) - 2).astype(np.int32)
    product = ads.product.astype(np.int32)[ad]
    return _Rows(request, ad, surface * 2 + product, surface, product)


# -- the truth -------------------------------------------------------------------------------------------------------


def _true_logits(world: _Day, q: _Requests, rows: _Rows) -> tuple[_Logits, Array, Array]:
    """Logits of click, long click and act; and the two kinds of match, which hides and repins share."""
    c, users, ads = world.constants, world.users, world.ads
    r, a, s, p = rows.request, rows.ad, rows.surface, rows.product
    taste = users.taste[:, q.user]

    # match: a dot product of what the request wants, in the task's and surface's weighing, with the ad's content.
    # peak: the strongest single interest that user and ad share, which no dot product of the two can express.
    wants = {
        task: (TASTE[task][q.surface] * c.taste_weight[task][q.surface].T).astype(np.float32) * taste
        + (TOPIC[task][q.surface] / np.sqrt(LATENT)).astype(np.float32) * q.topic
        for task in ("ctr", "gctr", "act")
    }
    match = {task: np.zeros(len(r), np.float32) for task in wants}
    peak = np.full(len(r), -np.inf, np.float32)
    for k in range(LATENT):
        content = ads.content[k][a]
        for task, want in wants.items():
            match[task] += want[k][r] * content
        np.maximum(peak, taste[k][r] * content, out=peak)
    peak = np.minimum(peak, 4) - 1.2

    search, related, home = q.surface == SEARCH, q.surface == RELATED, q.surface == HOME
    intent = np.where(search, q.intent - 0.45, 0).astype(np.float32)
    evening = np.cos(2 * np.pi * (np.arange(24) - 20) / 24).astype(np.float32)
    same = (SAME_CATEGORY[s] * (ads.category[a] == q.category[r])).astype(np.float32)
    same *= np.where(search, 0.6 + 0.2 * np.minimum(q.length, 5), 1).astype(np.float32)[r]
    # A price far from what the user usually spends puts off, in either direction.
    mismatch = np.abs(ads.price[a] - users.wallet[q.user][r]) * (p == SHOPPING)

    query_ctr = 0.45 * users.propensity[q.user] + COUNTRY_CLICK[users.country[q.user]] + 0.12 * evening[q.hour]
    query_ctr += home * (0.5 * (q.freshness - 0.5) - 0.25 * (np.log1p(q.depth) - 2.3)) - related * 0.12 * q.pin_popularity
    ctr = CTR_BASE.ravel()[rows.cell] + query_ctr.astype(np.float32)[r] + ads.appeal[a] + match["ctr"] + same
    ctr += DEVICE_FORMAT.ravel()[(q.device * 3)[r] + ads.format[a]] + INTENT_CTR[p] * intent[r]
    ctr += PEAK_CTR[s] * peak - PRICE_CTR * mismatch

    query_gctr = 0.5 * users.patience[q.user] + DEVICE_GCTR[q.device]
    item_gctr = 0.6 * ads.stickiness + 0.2 * ads.quality + 0.25 * ads.speed + 0.25 * (ads.format == 1)
    gctr = GCTR_BASE.ravel()[rows.cell] + query_gctr[r] + item_gctr.astype(np.float32)[a] + match["gctr"] + 0.1 * peak

    item_act = 0.5 * ads.usefulness + np.where(
        ads.product == SHOPPING,
        1.0 * ads.discount + 0.25 * ads.rating + 0.15 * ads.stock,
        LANDING_ACT[ads.landing] + 0.25 * ads.rank,
    )
    act = ACT_BASE.ravel()[rows.cell] + (0.45 * users.commercial)[q.user][r] + item_act.astype(np.float32)[a]
    act += match["act"] + INTENT_ACT[p] * intent[r] - PRICE_ACT * mismatch
    return _Logits(ctr, gctr, act), match["ctr"], peak


def _impressions(
    rng: np.random.Generator, world: _Day, q: _Requests, rows: _Rows, truth: _Logits, match: Array, peak: Array, start: int
) -> pl.DataFrame:
    """The rows as they happened: keys, logged features, true probabilities and outcomes."""
    users, ads, r, a = world.users, world.ads, rows.request, rows.ad
    n = len(r)
    ctr, gctr, act = truth.unconditional()
    query_hide = 0.7 * users.annoyance[q.user] + 0.15 * (q.surface == HOME) * (np.log1p(q.depth) - 2.3)
    hide = sigmoid(HIDE_BASE.ravel()[rows.cell] + query_hide.astype(np.float32)[r] - 0.3 * ads.quality[a] - 0.6 * match)
    repin = sigmoid(REPIN_BASE.ravel()[rows.cell] + 0.3 * ads.quality[a] + 0.6 * match + 0.3 * peak)

    def happens(probability: Array) -> npt.NDArray[np.bool_]:
        return rng.random(n, dtype=np.float32) < probability

    click = happens(ctr)
    long_click = click & happens(sigmoid(truth.gctr))
    acts = click & happens(sigmoid(truth.act))

    first = (world.ordinal << 32) + start
    request_frame = _request_frame(rng, world, q, first)
    shopping = pl.Series(rows.product == SHOPPING)
    outcomes = pl.DataFrame(
        {
            "outcome_ctr": click.astype(np.int8),
            "outcome_gctr": long_click.astype(np.int8),
            "act": acts.astype(np.int8),
            "outcome_hide": happens(hide).astype(np.int64),
            "outcome_repin": happens(repin).astype(np.int64),
            "true_ctr": ctr.astype(np.float64),
            "true_gctr": gctr.astype(np.float64),
            "true_act": act.astype(np.float64),
            "true_hide": hide.astype(np.float64),
            "true_repin": repin.astype(np.float64),
            "shopping": shopping,
            "impression_id": first + np.arange(n),
        }
    )
    return pl.concat([_take(request_frame, r), _take(ads.frame, a), outcomes], how="horizontal").with_columns(
        outcome_octr=pl.when(~pl.col("shopping")).then("act"),
        outcome_cvr=pl.when("shopping").then("act"),
        true_octr=pl.when(~pl.col("shopping")).then("true_act"),
        true_cvr=pl.when("shopping").then("true_act"),
    )


def _request_frame(rng: np.random.Generator, world: _Day, q: _Requests, first: int) -> pl.DataFrame:
    """What is logged of every request: features absent on its surface are null, others sometimes missing."""
    m = len(q.user)
    search, related, home = q.surface == SEARCH, q.surface == RELATED, q.surface == HOME

    def on(where: npt.NDArray[np.bool_], values: Array, unknown: float = 0.0) -> Array:
        absent = ~where | (rng.random(m) < unknown) if unknown else ~where
        return np.where(absent, np.nan, values).astype(np.float32)

    midnight = int((datetime.fromordinal(world.ordinal) - datetime(1970, 1, 1)).total_seconds()) * 1_000_000
    of_request = pl.DataFrame(
        {
            "request_id": first + np.arange(m),
            "ts": pl.Series(midnight + (q.second * 1e6).astype(np.int64).clip(0, DAY_US - 1)).cast(pl.Datetime("us")),
            "surface": text(SURFACES, q.surface),
            "device": text(DEVICES, q.device),
            "local_hour": q.hour,
            "session_depth": on(home, q.depth),
            "feed_freshness": on(home, q.freshness, 0.05),
            "query_category": text(CATEGORIES, q.category, ~search | (rng.random(m) < 0.01)),
            "query_length": on(search, q.length),
            "query_commercial_intent": on(search, q.intent, 0.04),
            "pin_category": text(CATEGORIES, q.category, ~related | (rng.random(m) < 0.01)),
            "pin_popularity": on(related, np.floor(np.exp(5 + 1.5 * q.pin_popularity)), 0.03),
            "pin_age_days": on(related, np.floor(q.pin_age)),
        }
    ).fill_nan(None)
    return pl.concat([of_request, _take(world.users.frame, q.user)], how="horizontal")


def _take(frame: pl.DataFrame, rows: npt.NDArray[np.integer]) -> pl.DataFrame:
    return frame[pl.Series(rows.astype(np.uint32))]


# -- the heavyweight ranker ------------------------------------------------------------------------------------------


def ranker_version(ordinal: int) -> int:
    """The number of the ranker that scores on a day: 1 for the first RANKER_DAYS days of 2026."""
    return (ordinal - EPOCH) // RANKER_DAYS + 1


def _seen_by_ranker(rng: np.random.Generator, world: _Day, q: _Requests, rows: _Rows, truth: _Logits) -> _Logits:
    """The truth with the ranker's error: a bias a slice, a smooth error of taste a category of ads, and noise."""
    version = ranker_version(world.ordinal)
    fixed = generator(world.seed, 0, "ranker")
    of_version = generator(world.seed, version, "ranker version")
    of_day = generator(world.seed, world.ordinal, "ranker day")
    direction = fixed.normal(0, 0.6, (len(CATEGORIES), LATENT)).astype(np.float32)
    phase = fixed.uniform(0, 2 * np.pi, (len(CATEGORIES), 1)) + of_version.normal(0, 0.5, (len(CATEGORIES), 1))
    # One wave over taste for every category of ads: similar users get similar errors, on similar ads.
    wave = direction @ world.users.taste[:, q.user] + phase.astype(np.float32)
    at = world.ads.category[rows.ad] * len(q.user) + rows.request
    pattern = {"ctr": np.sin(wave).ravel()[at], "gctr": np.cos(wave).ravel()[at]}
    pattern["act"] = -pattern["gctr"]

    def seen(task: str, logit: Array) -> Array:
        cells = len(SURFACES) * len(PRODUCTS)
        bias = of_version.normal(0, SLICE_BIAS, cells) + of_day.normal(0, DAILY_BIAS, cells)
        error = bias.astype(np.float32)[rows.cell] + np.float32(SYSTEMATIC[task] * np.sqrt(2)) * pattern[task]
        return logit + error + np.float32(NOISE[task]) * rng.standard_normal(len(logit), dtype=np.float32)

    return _Logits(seen("ctr", truth.ctr), seen("gctr", truth.gctr), seen("act", truth.act))


def _score_log(
    rng: np.random.Generator, world: _Day, impressions: pl.DataFrame, rows: _Rows, seen: _Logits
) -> pl.DataFrame:
    """The ranker's log with its defects: scores missing, late, invalid, made twice, or of no known impression."""
    n = len(rows.ad)
    ctr, gctr, act = (p.astype(np.float64) for p in seen.unconditional())
    delay = np.exp(3 + 0.7 * rng.standard_normal(n, dtype=np.float32)).clip(5, 900).astype(np.float64)

    # A permutation gives every defect exactly its share of the rows, so that an honest day is never refused.
    lot = rng.permutation(n) / n
    edges = np.cumsum([0, UNSCORED, LATE, INVALID, TWICE, ORPHANS])
    unscored, late, invalid, twice, orphans = (np.flatnonzero((lot >= lo) & (lot < hi)) for lo, hi in zip(edges, edges[1:], strict=False))
    delay[late] += 24 * 3600 + rng.exponential(6 * 3600, len(late))
    column = (ctr, gctr)
    for i, value, which in zip(invalid, rng.choice(INVALID_VALUES, len(invalid)), rng.integers(0, 2, len(invalid)), strict=True):
        column[which][i] = value

    log = pl.DataFrame(
        {
            "impression_id": impressions["impression_id"],
            "scored_at": impressions["ts"] + pl.Series((delay * 1e6).astype(np.int64)).cast(pl.Duration("us")),
            "score_ctr": ctr,
            "score_gctr": gctr,
            "act": act,
            "shopping": impressions["shopping"],
        }
    )
    earlier = _take(log, twice).with_columns(
        scored_at=impressions["ts"].gather(twice) + pl.duration(seconds=1),
        **{c: pl.col(c) * 0.97 for c in ("score_ctr", "score_gctr", "act")},
    )
    orphaned = _take(log, orphans).with_columns(impression_id=pl.col("impression_id") + (1 << 31))
    scored = np.ones(n, np.bool_)
    scored[unscored] = False
    return pl.concat([log.filter(pl.Series(scored)), earlier, orphaned]).with_columns(
        ranker_version=pl.lit(f"hw-{ranker_version(world.ordinal)}"),
        score_octr=pl.when(~pl.col("shopping")).then("act"),
        score_cvr=pl.when("shopping").then("act"),
    )


def _damaged(rng: np.random.Generator, impressions: pl.DataFrame) -> pl.DataFrame:
    """The impression log with its defects: a few rows written twice, a few with a surface nobody knows."""
    n = len(impressions)
    repeated = rng.choice(n, round(REPEATED * n), replace=False)
    unknown = np.zeros(n, np.bool_)
    unknown[rng.choice(n, round(UNKNOWN_SURFACE * n), replace=False)] = True
    surface = pl.when(pl.Series(unknown)).then(pl.lit("notifications")).otherwise("surface")
    impressions = impressions.with_columns(surface=surface)
    return pl.concat([impressions, _take(impressions, repeated)])
