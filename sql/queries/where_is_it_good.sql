-- LogMAE of the daily model on the newest day by slice and task, beside the slice's own mean, with calibration
-- (sum p / sum t).
SELECT
    m.surface,
    m.product,
    m.task,
    m.rows,
    round(m.logmae, 4) AS logmae,
    round(1 - m.logmae / c.logmae, 3) AS gain_over_constant,
    round(m.calibration, 3) AS calibration
FROM daily_slice_metrics AS m
INNER JOIN daily_slice_metrics AS c USING (ds, surface, product, task)
WHERE m.model = 'mtmd' AND c.model = 'constant' AND m.bucket IS NULL AND c.bucket IS NULL
    AND m.ds = (SELECT max(ds) FROM daily_slice_metrics)
ORDER BY m.surface, m.product, m.task;
