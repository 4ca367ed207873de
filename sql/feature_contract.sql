-- Missing rate of every feature in every slice, in one scan, against the contract.
--
-- Reads examples_of_day (surface, product and nothing but features) and contract (surface, product, feature, rule,
-- min_rate, max_rate). Joined from the contract's side, so that a slice that vanished fails its rules, unless
-- $empty_allowed. A slice of fewer than $judged_from rows may lack anything: its rates say little.
WITH counted AS (
    SELECT
        surface,
        product,
        count(*) AS rows,
        count(COLUMNS(* EXCLUDE (surface, product)))
    FROM examples_of_day
    GROUP BY surface, product
),

profile AS (
    UNPIVOT counted ON COLUMNS(* EXCLUDE (surface, product, rows)) INTO NAME feature VALUE present
),

measured AS (
    SELECT
        c.surface,
        c.product,
        c.feature,
        c.rule,
        coalesce(p.rows, 0) AS rows,
        coalesce(p.rows - p.present, 0) AS missing,
        (p.rows - p.present) / p.rows AS missing_rate,
        c.min_rate,
        if(p.rows < $judged_from, 1, c.max_rate) AS max_rate
    FROM contract AS c
    LEFT JOIN profile AS p ON p.surface = c.surface AND p.product = c.product AND p.feature = c.feature
    WHERE p.rows IS NOT NULL OR NOT $empty_allowed
)

SELECT
    *,
    coalesce(missing_rate BETWEEN min_rate AND max_rate, false) AS passed
FROM measured
ORDER BY surface, product, feature
