-- Distance between a model's probabilities and the heavyweight scores, a row a slice x task and one a tenth of it.
--
-- Reads `scored` (model, model_version, seed, impression_id, surface, product, task, score, probability).
-- LogMAE is mean |ln p - ln t|. It, KL and BCE floor both at $floor (and 1 - p at 1e-12); `floored` is the share of rows
-- where either was below.
-- bucket: `tenth` (macros.sql); null is the whole slice.
WITH ranked AS (
    SELECT
        *,
        greatest(probability, $floor) AS p,
        greatest(score, $floor) AS t,
        tenth((model, model_version, seed, surface, product, task), score, impression_id) AS bucket
    FROM scored
),

terms AS (
    SELECT
        *,
        ln(1 - least(p, 1 - 1e-12)) AS ln_not_p,
        ln(1 - least(t, 1 - 1e-12)) AS ln_not_t
    FROM ranked
)

SELECT
    model,
    model_version,
    seed,
    surface,
    product,
    task,
    bucket,
    count(*) AS rows,
    avg(abs(ln(p) - ln(t))) AS logmae,
    avg(abs(probability - score)) AS mae,
    avg(t * (ln(t) - ln(p)) + (1 - t) * (ln_not_t - ln_not_p)) AS kl,
    avg(-t * ln(p) - (1 - t) * ln_not_p) AS bce,
    sum(probability) / sum(score) AS calibration,
    avg((probability < $floor OR score < $floor)::INT) AS floored
FROM terms
GROUP BY GROUPING SETS (
    (model, model_version, seed, surface, product, task, bucket),
    (model, model_version, seed, surface, product, task)
)
ORDER BY model, surface, product, task, bucket NULLS FIRST
