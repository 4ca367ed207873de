"""adworld: a simulated platform of three surfaces and two ad products, and the logs it would write.

`Adworld.read(day)` makes one day from (seed, day) alone: requests with candidates, the true probability of every
outcome, the outcomes, and the log of a heavyweight ranker that sees the truth with a realistic ranker's error.
Equations and parameters are in docs/adworld.md.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from mtmd_assets.faults import PlatformError
from mtmd_assets.sources import LogDay
from mtmd_assets.sources.adworld_truth import (
    HOME,
    RELATED,
    SEARCH,
    Day,
    Logits,
    Requests,
    Rows,
    draw_candidates,
    draw_requests,
    side_effects,
    true_logits,
)
from mtmd_assets.sources.adworld_world import (
    CATEGORIES,
    DEVICES,
    LATENT,
    PRODUCTS,
    SHOPPING,
    SURFACES,
    Array,
    Constants,
    ads_of,
    generator,
    sigmoid,
    text,
    users_of,
)
from mtmd_assets.tables import tables

if TYPE_CHECKING:
    from mtmd_assets.platform import Platform

CHUNK = 1 << 17
"""Rows made at once, each chunk from streams of its own: what a day holds does not depend on the threads."""
EPOCH = date(2026, 1, 1).toordinal()
DAY_US = 86_400_000_000

# -- the ranker's error, in logits ------------------------------------------------------------------------------------
RANKER_DAYS = 28
"""Days between two versions of the heavyweight ranker."""
SLICE_BIAS, DAILY_BIAS = 0.05, 0.02
SYSTEMATIC = {"ctr": 0.15, "gctr": 0.15, "act": 0.25}
NOISE = {"ctr": 0.10, "gctr": 0.10, "act": 0.15}

# -- defects of the logs, as chances of an impression -----------------------------------------------------------------
UNSCORED, LATE, INVALID, TWICE, ORPHANS = 0.02, 0.015, 0.003, 0.01, 0.001
REPEATED, UNKNOWN_SURFACE = 0.0005, 0.0002
INVALID_VALUES = np.array([np.nan, 0.0, 1.0, 1.2, np.inf, -0.1])


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
        world = self.world_of(day)
        starts = range(0, world.rows, CHUNK)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
            chunks = list(pool.map(lambda start: _chunk(world, start), starts))
        return LogDay(
            impressions=self._wanted([i for i, _ in chunks], "impressions"),
            scores=self._wanted([s for _, s in chunks], "heavyweight_scores"),
            impressions_file=f"adworld (seed {self.source.seed})",
            scores_file=f"adworld's ranker (seed {self.source.seed})",
        )

    def look(self, day: date) -> None:
        """Nothing: every day is there."""

    def world_of(self, day: date) -> Day:
        """What the day's rows are drawn from."""
        s, ordinal = self.source, day.toordinal()
        users = users_of(self.constants, s.users, ordinal)
        ads = ads_of(self.constants, s.ads, s.users, ordinal)
        return Day(s.seed, ordinal, s.rows_per_day, self.constants, users, ads)

    def _wanted(self, parts: list[pl.DataFrame], table: str) -> pl.DataFrame:
        unknown = [c for c in self.columns[table] if c not in parts[0].columns]
        if unknown:
            raise PlatformError(f"source: adworld simulates no {', '.join(unknown)} for {table}")
        return pl.concat([p.select(list(self.columns[table])) for p in parts], rechunk=False)


def draw_chunk(world: Day, start: int) -> tuple[np.random.Generator, Requests, Rows, tuple[Logits, Array, Array]]:
    """Up to CHUNK rows from row `start` of the day, before they are logged, with `true_logits` of them; and what draws the rest."""
    rng = generator(world.seed, world.ordinal, "chunk", start)
    requests = draw_requests(rng, world, start, min(CHUNK, world.rows - start))
    rows = draw_candidates(rng, world, requests)
    return rng, requests, rows, true_logits(world, requests, rows)


def _chunk(world: Day, start: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Impressions and scores of up to CHUNK rows from row `start` of the day."""
    rng, requests, rows, (truth, match, peak) = draw_chunk(world, start)
    impressions = _impressions(rng, world, requests, rows, truth, match, peak, start)
    seen = _seen_by_ranker(rng, world, requests, rows, truth)
    scores = _score_log(rng, world, impressions, rows, seen)
    return _damaged(rng, impressions), scores


def _impressions(
    rng: np.random.Generator,
    world: Day,
    q: Requests,
    rows: Rows,
    truth: Logits,
    match: Array,
    peak: Array,
    start: int,
) -> pl.DataFrame:
    """The rows as they happened: keys, logged features, true probabilities and outcomes."""
    n = len(rows.ad)
    ctr, gctr, act = truth.unconditional()
    hide, repin = side_effects(world, q, rows, match, peak)

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
    return pl.concat(
        [_take(request_frame, rows.request), _take(world.ads.frame, rows.ad), outcomes], how="horizontal"
    ).with_columns(
        outcome_octr=pl.when(~pl.col("shopping")).then("act"),
        outcome_cvr=pl.when("shopping").then("act"),
        true_octr=pl.when(~pl.col("shopping")).then("true_act"),
        true_cvr=pl.when("shopping").then("true_act"),
    )


def _request_frame(rng: np.random.Generator, world: Day, q: Requests, first: int) -> pl.DataFrame:
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
    return frame[pl.Series(rows.astype(np.uintp))]


# -- the heavyweight ranker ------------------------------------------------------------------------------------------


def ranker_version(ordinal: int) -> int:
    """The number of the ranker that scores on a day: 1 for the first RANKER_DAYS days of 2026."""
    return (ordinal - EPOCH) // RANKER_DAYS + 1


def _seen_by_ranker(rng: np.random.Generator, world: Day, q: Requests, rows: Rows, truth: Logits) -> Logits:
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

    return Logits(seen("ctr", truth.ctr), seen("gctr", truth.gctr), seen("act", truth.act))


def _score_log(
    rng: np.random.Generator, world: Day, impressions: pl.DataFrame, rows: Rows, seen: Logits
) -> pl.DataFrame:
    """The ranker's log with its defects: scores missing, late, invalid, made twice, or of no known impression."""
    n = len(rows.ad)
    ctr, gctr, act = (p.astype(np.float64) for p in seen.unconditional())
    delay = np.exp(3 + 0.7 * rng.standard_normal(n, dtype=np.float32)).clip(5, 900).astype(np.float64)

    # One draw a row, so that a row has one defect at most and its counts are binomial: days differ as in a real log.
    lot = rng.random(n)
    edges = np.cumsum([0, UNSCORED, LATE, INVALID, TWICE, ORPHANS])
    unscored, late, invalid, twice, orphans = (np.flatnonzero((lot >= lo) & (lot < hi)) for lo, hi in pairwise(edges))
    delay[late] += 24 * 3600 + rng.exponential(6 * 3600, len(late))
    of_parent = rng.random(len(invalid)) < 0.5
    values = rng.choice(INVALID_VALUES, len(invalid))
    ctr[invalid[of_parent]], gctr[invalid[~of_parent]] = values[of_parent], values[~of_parent]

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
    repeated = np.flatnonzero(rng.random(n) < REPEATED)
    unknown = rng.random(n) < UNKNOWN_SURFACE
    surface = pl.when(pl.Series(unknown)).then(pl.lit("notifications")).otherwise("surface")
    impressions = impressions.with_columns(surface=surface)
    return pl.concat([impressions, _take(impressions, repeated)])
