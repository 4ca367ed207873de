"""Who asks for what in adworld, and how likely each outcome truly is: the equations of docs/adworld.md.

Works on one chunk of a day: `draw_requests`, `draw_candidates`, then `true_logits` and `side_effects`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mtmd_assets.sources.adworld_world import (
    CATEGORIES,
    COUNTRY_CLICK,
    COUNTRY_HOURS,
    DEVICE_SHARE,
    LATENT,
    SHOPPING,
    Ads,
    Array,
    Codes,
    Constants,
    Users,
    codes_of,
    sigmoid,
    uniform,
)

HOME, SEARCH, RELATED = range(3)
SURFACE_SHARE = np.array([0.60, 0.25, 0.15])
SHOPPING_SHARE = np.array([0.25, 0.42, 0.33], np.float32)
"""Share of shopping candidates on each surface."""
ON_TOPIC = np.array([0.35, 0.75, 0.60], np.float32)
"""How often retrieval picks a candidate from the category of the session, query or pin."""

# -- coefficients of the truth; rows are surfaces, columns products -------------------------------------------------
CTR_BASE = np.array([[-4.9, -5.1], [-4.2, -3.9], [-4.65, -4.3]], np.float32)
GCTR_BASE = np.array([[-0.4, -0.2], [0.1, 0.0], [-0.2, 0.1]], np.float32)
ACT_BASE = np.array([[-1.0, -3.6], [-0.4, -3.3], [-0.8, -3.5]], np.float32)
"""Of octr for standard ads, of cvr for shopping ads."""
HIDE_BASE = np.array([[-5.2, -5.5], [-6.0, -6.2], [-5.6, -5.8]], np.float32)
REPIN_BASE = np.array([[-4.6, -4.2], [-5.2, -4.6], [-4.4, -4.0]], np.float32)
TASTE = {"ctr": np.array([0.55, 0.25, 0.40]), "gctr": np.array([0.35, 0.15, 0.25]), "act": np.array([0.30, 0.25, 0.25])}
"""How much each surface's click, long click and act depend on the user's taste ..."""
TOPIC = {"ctr": np.array([0.0, 0.45, 0.40]), "gctr": np.array([0.0, 0.25, 0.20]), "act": np.array([0.0, 0.30, 0.15])}
"""... and on the topic of the query or pin."""
SATURATION = np.float32(2.0)
"""The largest effect of a match on a logit."""
SAME_CATEGORY = np.array([0.0, 0.35, 0.20], np.float32)
INTENT_CTR = np.array([-0.4, 1.0], np.float32)
INTENT_ACT = np.array([0.5, 1.6], np.float32)
"""Effect of a search's commercial intent on each product."""
PRICE_CTR, PRICE_ACT = 0.45, 0.70
RAPPORT_CTR, RAPPORT_ACT = 0.30, 0.20
PEAK_CTR = np.array([0.35, 0.20, 0.30], np.float32)
DEVICE_FORMAT = np.array([[0.0, 0.20, 0.10], [0.0, 0.15, 0.05], [0.05, -0.15, 0.10], [0.0, -0.20, -0.10]], np.float32)
DEVICE_GCTR = np.array([0.0, -0.1, 0.35, -0.25], np.float32)
LANDING_ACT = np.array([-0.2, 0.35, -0.3, 0.0], np.float32)


@dataclass(frozen=True)
class Day:
    """What the chunks of a day share."""

    seed: int
    ordinal: int
    rows: int
    constants: Constants
    users: Users
    ads: Ads


@dataclass(frozen=True)
class Requests:
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
class Rows:
    """The impressions of one chunk: which request, which ad."""

    request: npt.NDArray[np.intp]
    ad: npt.NDArray[np.intp]
    cell: npt.NDArray[np.intp]
    """surface * 2 + product"""
    surface: npt.NDArray[np.intp]
    product: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Logits:
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


# -- who asks for what ---------------------------------------------------------------------------------------------


def draw_requests(rng: np.random.Generator, world: Day, start: int, n: int) -> Requests:
    """The requests that make up `n` rows from row `start` of the day, in order of time."""
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
    return Requests(
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


def draw_candidates(rng: np.random.Generator, world: Day, q: Requests) -> Rows:
    """The ads that retrieval finds for every request."""
    request = np.repeat(np.arange(len(q.size), dtype=np.intp), q.size)
    n, ads = len(request), world.ads
    surface = q.surface.astype(np.intp)[request]
    product = (rng.random(n, dtype=np.float32) < SHOPPING_SHARE[surface]).astype(np.intp)
    on_topic = rng.random(n, dtype=np.float32) < ON_TOPIC[surface]
    category = np.where(on_topic, q.category.astype(np.intp)[request], len(CATEGORIES))
    # Quantiles a golden step apart: a request rarely holds the same ad twice, and each ad keeps its share.
    position = np.arange(n) - np.repeat(np.cumsum(q.size) - q.size, q.size)
    quantile = (rng.random(len(q.size))[request] + 0.6180339887498949 * position) % 1
    low, high = world.ads.cells[product, category].T
    ad = np.searchsorted(ads.reach, low + quantile * (high - low), side="right") - 1
    ad = ad.clip(0, len(ads.reach) - 2).astype(np.intp)
    product = ads.product.astype(np.intp)[ad]
    return Rows(request, ad, surface * 2 + product, surface, product)


# -- the truth -------------------------------------------------------------------------------------------------------


def true_logits(world: Day, q: Requests, rows: Rows) -> tuple[Logits, Array, Array]:
    """Logits of click, long click and act; and the two kinds of match, which hides and repins share."""
    c, users, ads = world.constants, world.users, world.ads
    r, a, s, p = rows.request, rows.ad, rows.surface, rows.product
    taste = users.taste[:, q.user]

    # match: a dot product of what the request wants, in the task's and surface's weighing, with the ad's content;
    # it saturates: an ad that fits well gains little from fitting better.
    # peak: the strongest single interest that user and ad share, which no dot product of the two can express.
    wants = {
        task: (TASTE[task][q.surface] * c.taste_weight[task][q.surface].T).astype(np.float32) * taste
        + (TOPIC[task][q.surface] / np.sqrt(LATENT)).astype(np.float32) * q.topic
        for task in ("ctr", "gctr", "act")
    }
    match: dict[str, Array] = {task: np.zeros(len(r), np.float32) for task in wants}
    peak: Array = np.full(len(r), -np.inf, np.float32)
    for k in range(LATENT):
        content = ads.content[k][a]
        for task, want in wants.items():
            match[task] += want[k][r] * content
        np.maximum(peak, taste[k][r] * content, out=peak)
    for task in match:
        match[task] = SATURATION * np.tanh(match[task] / SATURATION)
    peak = np.minimum(peak, 4) - 1.2

    search, related, home = q.surface == SEARCH, q.surface == RELATED, q.surface == HOME
    intent = np.where(search, q.intent - 0.45, 0).astype(np.float32)
    evening = np.cos(2 * np.pi * (np.arange(24) - 20) / 24).astype(np.float32)
    same = (SAME_CATEGORY[s] * (ads.category[a] == q.category[r])).astype(np.float32)
    same *= np.where(search, 0.6 + 0.2 * np.minimum(q.length, 5), 1).astype(np.float32)[r]
    # A price far from what the user usually spends puts off, in either direction.
    mismatch = np.abs(ads.price[a] - users.wallet[q.user][r]) * (p == SHOPPING)
    # What this user and this advertiser have with each other (a follower, a customer): logged nowhere.
    pair = (users.id[q.user] << 32)[r] + ads.advertiser[a]
    rapport = (np.sqrt(12) * (uniform(world.seed, "rapport", pair) - 0.5)).astype(np.float32)

    query_ctr = 0.40 * users.propensity[q.user] + COUNTRY_CLICK[users.country[q.user]] + 0.12 * evening[q.hour]
    query_ctr += home * (0.5 * (q.freshness - 0.5) - 0.25 * (np.log1p(q.depth) - 2.3))
    query_ctr -= related * 0.12 * q.pin_popularity
    ctr = CTR_BASE.ravel()[rows.cell] + query_ctr.astype(np.float32)[r] + ads.appeal[a] + match["ctr"] + same
    ctr += DEVICE_FORMAT.ravel()[(q.device * 3)[r] + ads.format[a]] + INTENT_CTR[p] * intent[r]
    ctr += PEAK_CTR[s] * peak - PRICE_CTR * mismatch + RAPPORT_CTR * rapport

    query_gctr = 0.5 * users.patience[q.user] + DEVICE_GCTR[q.device]
    item_gctr = 0.6 * ads.stickiness + 0.2 * ads.quality + 0.25 * ads.speed + 0.25 * (ads.format == 1)
    gctr = GCTR_BASE.ravel()[rows.cell] + query_gctr[r] + item_gctr.astype(np.float32)[a] + match["gctr"] + 0.1 * peak

    item_act = 0.5 * ads.usefulness + np.where(
        ads.product == SHOPPING,
        1.0 * ads.discount + 0.25 * ads.rating + 0.15 * ads.stock,
        LANDING_ACT[ads.landing] + 0.25 * ads.rank,
    )
    act = ACT_BASE.ravel()[rows.cell] + (0.45 * users.commercial)[q.user][r] + item_act.astype(np.float32)[a]
    act += match["act"] + INTENT_ACT[p] * intent[r] - PRICE_ACT * mismatch + RAPPORT_ACT * rapport
    return Logits(ctr, gctr, act), match["ctr"], peak


def side_effects(world: Day, q: Requests, rows: Rows, match: Array, peak: Array) -> tuple[Array, Array]:
    """P(hide | impression) and P(repin | impression)."""
    quality = world.ads.quality[rows.ad]
    query_hide = 0.7 * world.users.annoyance[q.user] + 0.15 * (q.surface == HOME) * (np.log1p(q.depth) - 2.3)
    hide = HIDE_BASE.ravel()[rows.cell] + query_hide.astype(np.float32)[rows.request] - 0.3 * quality - 0.6 * match
    repin = REPIN_BASE.ravel()[rows.cell] + 0.3 * quality + 0.6 * match + 0.3 * peak
    return sigmoid(hide), sigmoid(repin)
