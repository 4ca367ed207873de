-- Experiments (`make results`) training by training: mean LogMAE over the slice x task cells that have 200 rows on all days together.
WITH cells AS (
    SELECT *, sum(rows) OVER (PARTITION BY model, seed, surface, product, task) AS rows_of_all_days
    FROM experiment_slice_metrics
    WHERE bucket IS NULL AND model NOT IN ('constant', 'constant_median')
)

SELECT ds, model, seed, count(*) AS cells, round(avg(logmae), 4) AS logmae
FROM cells
WHERE rows_of_all_days >= 200
GROUP BY ALL
ORDER BY ds, model, seed;
