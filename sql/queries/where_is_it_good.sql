-- LogMAE of the daily model on the newest day by slice and task, beside the slice's own mean, with calibration
-- (sum p / sum t). The gain is null for a slice that the window had not seen.
SELECT
    m.surface,
    m.product,
    m.task,
    m.rows,
    round(m.logmae, 4) AS logmae,
    round(1 - m.logmae / nullif(c.logmae, 0), 3) AS gain_over_constant,
    round(m.calibration, 3) AS calibration
FROM daily_slice_metrics AS m
LEFT JOIN daily_slice_metrics AS c
    ON (c.ds, c.surface, c.product, c.task) = (m.ds, m.surface, m.product, m.task)
        AND c.model = 'constant' AND c.bucket IS NULL
WHERE m.model = 'mtmd' AND m.bucket IS NULL AND m.ds = (SELECT max(ds) FROM daily_slice_metrics)
ORDER BY m.surface, m.product, m.task;
