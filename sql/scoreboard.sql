-- LogMAE of the model and of the two constants, a row a slice x task, rows of several days pooled.
--
-- Reads `daily_slice_metrics`; $days is a list of evaluation days. `rows` are the model's.
SELECT
    surface,
    product,
    task,
    sum(rows) FILTER (model = 'mtmd')::BIGINT AS rows,
    sum(rows * logmae) FILTER (model = 'mtmd') / sum(rows) FILTER (model = 'mtmd') AS mtmd,
    sum(rows * logmae) FILTER (model = 'constant') / sum(rows) FILTER (model = 'constant') AS constant,
    sum(rows * logmae) FILTER (model = 'constant_median') / sum(rows) FILTER (model = 'constant_median') AS constant_median
FROM daily_slice_metrics
WHERE bucket IS NULL AND list_contains($days, ds)
GROUP BY surface, product, task
HAVING count(*) FILTER (model = 'mtmd') > 0
