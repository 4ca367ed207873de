-- LogMAE of the model and of the two constants, a row a slice x task, rows of several days pooled.
--
-- Reads the view `slice_metrics`; $days is a list of evaluation days. `gain` is (constant - mtmd) / constant.
PIVOT (
    SELECT
        surface,
        product,
        task,
        model,
        sum(rows)::BIGINT AS rows,
        sum(rows * logmae) / sum(rows) AS logmae
    FROM slice_metrics
    WHERE bucket IS NULL AND list_contains($days, ds)
    GROUP BY ALL
)
ON model IN ('mtmd', 'constant', 'constant_median')
USING first(logmae)
GROUP BY surface, product, task, rows
