-- Experiments (`make results`): the three models whose first candidate is most often the heavyweight ranker's, by task and
-- evaluation day, with the worst and the best of their trainings. As is_the_best_kept.sql, which is of the daily model.
WITH requests AS (
    SELECT
        p.ds,
        p.task,
        p.model,
        p.seed,
        arg_max(p.impression_id, (p.probability, p.impression_id))
        = arg_max(p.impression_id, (p.score, p.impression_id)) AS kept
    FROM experiment_predictions AS p
    INNER JOIN joined_examples AS j USING (ds, impression_id)
    WHERE p.model NOT IN ('constant', 'constant_median')
    GROUP BY p.ds, p.task, p.model, p.seed, p.model_version, j.request_id
    HAVING count(*) > 1
),

trainings AS (
    SELECT ds, task, model, seed, count(*) AS requests, avg(kept::INT) AS share
    FROM requests
    GROUP BY ALL
)

SELECT
    task,
    ds,
    model,
    max(requests) AS requests,
    count(*) AS trainings,
    round(min(share), 4) AS worst,
    round(avg(share), 4) AS best_kept,
    round(max(share), 4) AS best
FROM trainings
GROUP BY task, ds, model
QUALIFY rank() OVER (PARTITION BY task, ds ORDER BY avg(share) DESC) <= 3
ORDER BY task, ds, avg(share) DESC;
