"""The inhabitants of adworld: who the users and ads of a day are, what they are like, and what is logged of them.

Everything about a user or an ad is a pure function of (seed, its id) and of the day, so that any day can be made
alone. docs/adworld.md holds the equations; the names here are the symbols there.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl

Array = npt.NDArray[np.floating]
Codes = npt.NDArray[np.int64]

SURFACES = ("home_feed", "search", "related_pins")
PRODUCTS = ("standard", "shopping")
STANDARD, SHOPPING = 0, 1
CATEGORIES = (
    "home_decor", "fashion", "beauty", "food", "travel", "diy", "fitness", "wedding", "parenting", "garden",
    "electronics", "art", "cars", "finance", "education", "pets", "gaming", "books", "health", "outdoors",
)  # fmt: skip
COUNTRIES = ("US", "GB", "DE", "FR", "BR", "JP", "IN", "MX")
COUNTRY_SHARE = np.array([0.42, 0.12, 0.10, 0.08, 0.10, 0.06, 0.07, 0.05])
COUNTRY_HOURS = np.array([-6, 0, 1, 1, -3, 9, 5, -6])
COUNTRY_WALLET = np.array([0.5, 0.3, 0.4, 0.2, -0.5, 0.3, -0.8, -0.5], np.float32)
COUNTRY_CLICK = np.array([0.05, 0.0, -0.1, -0.05, 0.25, -0.3, 0.3, 0.2], np.float32)
AGES = ("18_24", "25_34", "35_44", "45_54", "55_64", "65_plus")
AGE_SHARE = np.array([0.26, 0.30, 0.19, 0.12, 0.08, 0.05])
AGE_WALLET = np.array([-0.5, 0.0, 0.2, 0.3, 0.2, 0.0], np.float32)
GENDERS = ("female", "male", "unspecified")
GENDER_SHARE = np.array([0.66, 0.27, 0.07])
DEVICES = ("ios", "android", "desktop", "mobile_web")
DEVICE_SHARE = np.array([0.42, 0.36, 0.14, 0.08])
FORMATS = ("image", "video", "carousel")
FORMAT_SHARE = np.array([0.6, 0.25, 0.15])
LANDING_TYPES = ("article", "storefront", "signup_form", "app_store")
LANDING_SHARE = np.array([0.35, 0.35, 0.18, 0.12])
PRODUCT_GROUPS = ("apparel", "furniture", "kitchen", "toys", "jewelry", "gadgets", "cosmetics", "tools")

LATENT = 6
"""Dimensions of taste and content."""
ADS_PER_USER_AND_DAY = 20.0
"""Traffic of the whole platform, which the counters count; the log holds a sample of `rows_per_day` of it."""
ADS_PER_ADVERTISER = 10
SHOPPING_SLOTS = 0.4
"""Share of the ad slots that hold shopping ads."""


# -- random draws that depend on nothing but their key -----------------------------------------------------------


def generator(seed: int, day: int, purpose: str, index: int = 0) -> np.random.Generator:
    """An independent stream for every (seed, day, purpose, index)."""
    key = hashlib.blake2b(f"{seed}/{day}/{purpose}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def uniform(seed: int, purpose: str, ids: Codes) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for every id: the same whichever ids are asked for together."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    for _ in range(2):  # splitmix64's finaliser, twice: consecutive ids and related keys come out unrelated
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54


def normal(seed: int, purpose: str, ids: Codes) -> Array:
    """One standard normal number for every id (Box-Muller)."""
    radius = np.sqrt(-2 * np.log(uniform(seed, purpose, ids))).astype(np.float32)
    angle = (2 * np.pi * uniform(seed, purpose + " angle", ids)).astype(np.float32)
    return radius * np.cos(angle)


def normals(seed: int, purpose: str, ids: Codes) -> Array:
    """A standard normal vector for every id: (LATENT, ids)."""
    return np.stack([normal(seed, f"{purpose} {k}", ids) for k in range(LATENT)])


def choice(seed: int, purpose: str, ids: Codes, share: npt.NDArray[np.float64]) -> Codes:
    """A code for every id, distributed as `share`."""
    return codes_of(uniform(seed, purpose, ids), share)


def codes_of(u: npt.NDArray[np.floating], share: npt.NDArray[np.float64]) -> Codes:
    """The code of every quantile `u` of the distribution `share`."""
    return np.searchsorted(np.cumsum(share)[:-1] / share.sum(), u, side="right")


def text(names: tuple[str, ...], codes: Codes, missing: npt.NDArray[np.bool_] | None = None) -> pl.Series:
    """The names of `codes`; null where `missing`."""
    values = pl.Series([*names, None], dtype=pl.String)
    return values.gather(codes if missing is None else np.where(missing, len(names), codes))


def sigmoid(z: Array) -> Array:
    """1 / (1 + exp(-z)), in (0, 1): logits are far inside ±15."""
    return 1 / (1 + np.exp(-np.clip(z, -15, 15)))


def _tenants(seed: int, what: str, slots: int, day: int, low: float, high: float) -> tuple[Codes, Codes, Codes]:
    """Who lives in each of `slots` slots: (slot, id, age in days).

    A slot is let again whenever its term, between `low` and `high` days (log-uniform), ends; the next tenant has a
    new id. So the population keeps its size, and who is there depends on the day alone.
    """
    slot = np.arange(slots, dtype=np.int64)
    term = np.exp(np.log(low) + np.log(high / low) * uniform(seed, f"{what} term", slot)).astype(np.int64)
    since = day + (term * uniform(seed, f"{what} offset", slot)).astype(np.int64)
    return slot, 1 + slot + slots * (since // term), since % term


def _rotate(a: Array, b: Array, day: float, period: Array, phase: Array) -> Array:
    """Drift: a slow rotation between two draws, so that the distribution over entities never changes."""
    angle = (2 * np.pi * (day / period + phase)).astype(np.float32)
    return np.cos(angle) * a + np.sin(angle) * b


# -- what does not change -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constants:
    """What one seed fixes for good: where categories lie, and how each task weighs the latent dimensions."""

    seed: int

    def _generator(self, purpose: str) -> np.random.Generator:
        return generator(self.seed, 0, purpose)

    @cached_property
    def centre(self) -> Array:
        """μ: (LATENT, categories), each of the length that a standard normal vector has on average."""
        mu = self._generator("centre").standard_normal((LATENT, len(CATEGORIES)))
        mu -= mu.mean(1, keepdims=True)
        return (mu * np.sqrt(LATENT) / np.linalg.norm(mu, axis=0)).astype(np.float32)

    @cached_property
    def popularity(self) -> npt.NDArray[np.float64]:
        """Share of each category in the interests of all users and in the ads on offer."""
        share = 1 / np.arange(2, 2 + len(CATEGORIES)) ** 0.7
        return self._generator("popularity").permutation(share / share.sum())

    @cached_property
    def commerciality(self) -> Array:
        """How much a query of each category is about buying (logit)."""
        return self._generator("commerciality").normal(-0.3, 0.8, len(CATEGORIES)).astype(np.float32)

    @cached_property
    def price_level(self) -> Array:
        """Mean ln(price) of each product group."""
        return self._generator("price level").normal(3.5, 0.6, len(PRODUCT_GROUPS)).astype(np.float32)

    @cached_property
    def season(self) -> Array:
        """Phase of each category's yearly season."""
        return self._generator("season").uniform(0, 1, len(CATEGORIES)).astype(np.float32)

    @cached_property
    def taste_weight(self) -> dict[str, Array]:
        """w: how a task weighs each dimension on each surface, (surfaces, LATENT).

        A part shared by the surfaces and a smaller part of each one's own.
        """
        weights = {}
        for task in ("ctr", "gctr", "act"):
            g = self._generator(f"taste weight {task}")
            shared, own = g.uniform(0.4, 1.6, LATENT), g.normal(0, 0.25, (len(SURFACES), LATENT))
            weights[task] = (np.clip(shared + own, 0, None) / np.sqrt(LATENT)).astype(np.float32)
        return weights


# -- users ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Users:
    """The users of one day. Arrays are (users,) or (LATENT, users)."""

    id: Codes
    taste: Array
    propensity: Array
    patience: Array
    commercial: Array
    annoyance: Array
    wallet: Array
    country: Codes
    device: Codes
    reach: npt.NDArray[np.float64]
    """Cumulative share of the requests."""
    interests: Array
    """Cumulative distribution over categories, (users, categories)."""
    frame: pl.DataFrame
    """What is logged: `user_id` and the features of the user."""


def users_of(c: Constants, users: int, day: int) -> Users:
    """The users of `day`, an ordinal."""
    seed = c.seed
    _, ids, tenure = _tenants(seed, "user", users, day, 300, 4000)
    g = generator(seed, day, "users")

    def draw_taste(which: str) -> Array:
        first, second = (choice(seed, f"{which} interest {i}", ids, c.popularity) for i in (1, 2))
        return 0.6 * c.centre[:, first] + 0.4 * c.centre[:, second] + 0.6 * normals(seed, f"{which} taste", ids)

    a, b = draw_taste("a"), draw_taste("b")
    period = (300 + 600 * uniform(seed, "taste period", ids)).astype(np.float32)
    phase = uniform(seed, "taste phase", ids).astype(np.float32)
    taste, yesterday = (_rotate(a, b, d, period, phase) for d in (day, day - 1))

    country = choice(seed, "country", ids, COUNTRY_SHARE)
    age = choice(seed, "age", ids, AGE_SHARE)
    gender = choice(seed, "gender", ids, GENDER_SHARE)
    propensity = normal(seed, "propensity", ids)
    activity = np.exp(normal(seed, "activity", ids)).astype(np.float64)
    activity /= activity.mean()

    # Counters, as a serving system would have them: of strictly earlier days, at most as many as the account is old.
    seen = g.poisson(ADS_PER_USER_AND_DAY * activity * np.minimum(tenure, 7))
    clicks = g.poisson(seen * sigmoid(-3.7 + 0.40 * propensity + COUNTRY_CLICK[country]))

    logged = yesterday + 0.25 * normals(seed, "taste error", ids)
    logged += 0.1 * g.standard_normal(logged.shape, dtype=np.float32)
    logged[:, (tenure < 2) | (g.random(users) < 0.015)] = np.nan
    interests = np.exp(0.8 * (taste.T @ c.centre))
    interests /= interests.sum(1, keepdims=True)
    interests = np.cumsum(0.8 * interests + 0.2 * c.popularity, axis=1).astype(np.float32)
    interests[:, -1] = 1
    return Users(
        id=ids,
        taste=taste,
        propensity=propensity,
        patience=normal(seed, "patience", ids),
        commercial=normal(seed, "commercial", ids),
        annoyance=normal(seed, "annoyance", ids),
        wallet=COUNTRY_WALLET[country] + AGE_WALLET[age] + 0.5 * normal(seed, "wallet", ids),
        country=country,
        device=choice(seed, "device", ids, DEVICE_SHARE),
        reach=np.cumsum(activity) / activity.sum(),
        interests=interests,
        frame=pl.DataFrame(
            {
                "user_id": ids,
                "viewer_id": ids,
                "user_country": text(COUNTRIES, country),
                "user_age_bucket": text(AGES, age, uniform(seed, "age unknown", ids) < 0.06),
                "user_gender": text(GENDERS, gender, uniform(seed, "gender unknown", ids) < 0.04),
                "user_tenure_days": tenure.astype(np.float32),
                "user_ads_seen_7d": seen.astype(np.float32),
                "user_clicks_7d": clicks.astype(np.float32),
                **{f"user_taste_{k}": logged[k] for k in range(LATENT)},
            }
        ).fill_nan(None),
    )


# -- ads --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ads:
    """The live ads of one day, ordered by product and category. Arrays are (ads,) or (LATENT, ads)."""

    content: Array
    advertiser: Codes
    product: Codes
    category: Codes
    format: Codes
    landing: Codes
    quality: Array
    """Appeal of the creative, less its fatigue."""
    stickiness: Array
    """What a click finds: drives long clicks."""
    usefulness: Array
    """Drives outbound clicks and conversions."""
    price: Array
    """ln(price), centred; not meaningful for standard ads."""
    discount: Array
    rating: Array
    """Standardised, 0 for standard ads; `stock`, `speed` and `rank` likewise where an ad has none."""
    stock: Array
    speed: Array
    rank: Array
    appeal: Array
    """The part of the click logit that depends on the ad alone."""
    reach: npt.NDArray[np.float64]
    """Cumulative share of the traffic, starting with 0: (ads + 1,)."""
    cells: npt.NDArray[np.float64]
    """Where in `reach` the ads of a product and category begin and end: (products, categories + 1, 2).

    The last category stands for all of the product; an empty cell does too.
    """
    frame: pl.DataFrame
    """What is logged: `item_id`, `product`, the features of the ad, `bid` and `objective`."""


CLICK_BASE_OF_PRODUCT = (-4.0, -3.9)
"""About the mean click logit of each product: used only for the counters of ads."""


def ads_of(c: Constants, ads: int, users: int, day: int) -> Ads:
    """The live ads of `day`, an ordinal, on a platform with that many users."""
    seed = c.seed
    slot, ids, age = _tenants(seed, "ad", ads, day, 15, 200)
    product = ((slot * 0.6180339887) % 1 < SHOPPING_SLOTS).astype(np.int64)
    advertiser = slot // ADS_PER_ADVERTISER
    home = choice(seed, "advertiser category", advertiser, c.popularity)
    elsewhere = uniform(seed, "category elsewhere", ids) < 0.3
    category = np.where(elsewhere, choice(seed, "category", ids, c.popularity), home)

    # Cells of product and category become ranges of the arrays.
    order = np.lexsort((slot, category, product))
    slot, ids, age, product, advertiser, category = (v[order] for v in (slot, ids, age, product, advertiser, category))
    shopping = product == SHOPPING
    g = generator(seed, day, "ads")

    own = _rotate(
        normals(seed, "content a", ids),
        normals(seed, "content b", ids),
        day,
        (500 + 1000 * uniform(seed, "content period", ids)).astype(np.float32),
        uniform(seed, "content phase", ids).astype(np.float32),
    )
    content = 0.75 * c.centre[:, category] + 0.66 * own

    group = choice(seed, "product group", ids, np.full(len(PRODUCT_GROUPS), 1.0))
    price = np.where(shopping, normal(seed, "price", ids), 0)
    discounted = shopping & (uniform(seed, "discounted", ids) < 0.4)
    discount = np.where(discounted, 0.5 * uniform(seed, "discount", ids), 0).astype(np.float32)
    rating = np.where(shopping, 0.7 * normal(seed, "rating", ids) + 0.7 * normal(seed, "merchant", advertiser), 0)
    stock = np.where(shopping, normal(seed, "stock", ids), 0)
    speed = np.where(shopping, 0, 0.6 * normal(seed, "speed", ids) + 0.8 * normal(seed, "site speed", advertiser))
    rank = np.where(shopping, 0, normal(seed, "domain rank", advertiser))
    talent = 0.6 * normal(seed, "advertiser quality", advertiser) + 0.8 * normal(seed, "quality", ids)

    def quality_of(at: float) -> Array:
        """Creatives wear out: quality falls with the logarithm of age."""
        wear = np.log1p(np.maximum(age - (day - at), 0) / 30)
        return (talent - 0.5 * wear).astype(np.float32)

    def appeal_of(at: float) -> Array:
        season = 0.15 * np.sin(2 * np.pi * (at / 365.25 + c.season[category]))
        of_product = np.where(shopping, 0.9 * discount + 0.15 * rating, 0.12 * speed + 0.1 * rank)
        return (0.4 * quality_of(at) + season + of_product).astype(np.float32)

    # Reach: budgets are log-normal, a new ad ramps up over its first days, and pacing varies from day to day.
    budget = np.exp(normal(seed, "budget", ids)).astype(np.float64)
    share = budget * (1 - np.exp(-(age + 1) / 3)) * np.exp(0.2 * g.standard_normal(ads))
    reach = np.concatenate([[0.0], np.cumsum(share) / share.sum()])

    # The week before, from the ad's expected traffic and mean rate then, with the noise of finite counts.
    traffic = ADS_PER_USER_AND_DAY * users * budget / budget.sum() * (1 - np.exp(-np.maximum(age, 1) / 6))
    shown = g.poisson(traffic * np.minimum(age, 7))
    base = np.where(shopping, CLICK_BASE_OF_PRODUCT[SHOPPING], CLICK_BASE_OF_PRODUCT[STANDARD])
    clicked = g.poisson(shown * sigmoid(base + 0.4 + appeal_of(day - 4)))
    click_rate = np.where(shown > 0, clicked / np.maximum(shown, 1), np.nan).astype(np.float32)
    click_rate[g.random(ads) < 0.01] = np.nan

    logged = content + 0.2 * normals(seed, "content error", ids)
    logged[:, uniform(seed, "content unknown", ids) < 0.02] = np.nan

    def only(where: npt.NDArray[np.bool_], values: npt.NDArray[np.floating], unknown: float, what: str) -> Array:
        """`values` as logged: absent outside `where`, and unknown for a share of the ads."""
        absent = ~where | (uniform(seed, f"{what} unknown", ids) < unknown)
        return np.where(absent, np.nan, values).astype(np.float32)

    converts = shopping & (uniform(seed, "objective", ids) < 0.6)
    bid = np.exp(np.where(converts, 2.3 + 0.3 * price, -0.7) + 0.5 * normal(seed, "bid", ids))
    bid = bid.astype(np.float64) * np.exp(0.1 * g.standard_normal(ads))

    landing = choice(seed, "landing", ids, LANDING_SHARE)
    form = choice(seed, "format", ids, FORMAT_SHARE)
    ln_price = c.price_level[group] + 0.7 * price
    frame = pl.DataFrame(
        {
            "item_id": ids,
            "product": text(PRODUCTS, product),
            "ad_id": ids,
            "advertiser_id": 1 + advertiser,
            "ad_category": text(CATEGORIES, category),
            "creative_format": text(FORMATS, form),
            "ad_age_days": age.astype(np.float32),
            "ad_impressions_7d": shown.astype(np.float32),
            "ad_ctr_7d": click_rate,
            **{f"ad_content_{k}": logged[k] for k in range(LATENT)},
            "product_category": text(PRODUCT_GROUPS, group, ~shopping),
            "price": only(shopping, np.exp(ln_price), 0.005, "price"),
            "discount": only(shopping, discount, 0.0, "discount"),
            "merchant_rating": only(shopping, np.clip(4.2 + 0.4 * rating, 1, 5), 0.05, "rating"),
            "stock": only(shopping, np.floor(np.exp(4 + 1.2 * stock)), 0.02, "stock"),
            "landing_page_type": text(LANDING_TYPES, landing, shopping),
            "landing_page_speed": only(~shopping, np.exp(0.7 - 0.4 * speed), 0.05, "speed"),
            "outbound_domain_rank": only(~shopping, np.floor(np.exp(9 - 1.5 * rank)), 0.03, "rank"),
            "bid": bid,
            "objective": text(("click", "conversion"), converts.astype(np.int64)),
        }
    ).fill_nan(None)
    return Ads(
        content=content,
        advertiser=advertiser,
        product=product,
        category=category,
        format=form,
        landing=landing,
        quality=quality_of(day),
        stickiness=normal(seed, "stickiness", ids),
        usefulness=0.6 * normal(seed, "advertiser use", advertiser) + 0.8 * normal(seed, "usefulness", ids),
        price=(c.price_level[group] - 3.5 + 0.7 * price).astype(np.float32),
        discount=discount,
        rating=rating.astype(np.float32),
        stock=stock.astype(np.float32),
        speed=speed.astype(np.float32),
        rank=rank.astype(np.float32),
        appeal=appeal_of(day),
        reach=reach,
        cells=_cells(product, category, reach),
        frame=frame,
    )


def _cells(product: Codes, category: Codes, reach: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    n = len(CATEGORIES)
    cells = np.empty((len(PRODUCTS), n + 1, 2))
    for p in range(len(PRODUCTS)):
        whole = reach[np.searchsorted(product, [p, p + 1])]
        edges = reach[np.searchsorted(product * n + category, p * n + np.arange(n + 1))]
        cells[p, :n] = np.stack([edges[:-1], edges[1:]], axis=1)
        cells[p, n] = whole
        cells[p, cells[p, :, 0] == cells[p, :, 1]] = whole
    return cells
