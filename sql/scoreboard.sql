-- LogMAE of the model and of the two constants, a row a slice x task, rows of several days pooled.
--
-- Reads `daily_slice_metrics`; $days is a list of evaluation days. `rows` are the model's. A constant is null unless it is of
-- the same rows: it lacks the days whose window had not seen the slice.
WITH pooled AS (
    SELECT
        surface,
        product,
        task,
        model,
        sum(rows)::BIGINT AS rows,
        sum(rows * logmae) / sum(rows) AS logmae
    FROM daily_slice_metrics
    WHERE bucket IS NULL AND list_contains($days, ds)
    GROUP BY ALL
)

SELECT
    m.surface,
    m.product,
    m.task,
    m.rows,
    m.logmae AS mtmd,
    c.logmae AS constant,
    d.logmae AS constant_median
FROM pooled AS m
LEFT JOIN pooled AS c
    ON (c.surface, c.product, c.task, c.rows) = (m.surface, m.product, m.task, m.rows) AND c.model = 'constant'
LEFT JOIN pooled AS d
    ON (d.surface, d.product, d.task, d.rows) = (m.surface, m.product, m.task, m.rows) AND d.model = 'constant_median'
WHERE m.model = 'mtmd'
