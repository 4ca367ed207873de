-- Experiments (`make results`): the three models whose first candidate is most often the heavyweight ranker's, by task and
-- evaluation day, with the worst and the best of their trainings. Of those that scored every evaluation day: ablations may be
-- of the last one only. As is_the_best_kept.sql, which is of the daily model.
WITH everywhere AS (
    SELECT model
    FROM experiment_models
    GROUP BY model
    HAVING count(DISTINCT ds) = (SELECT count(DISTINCT ds) FROM experiment_models)
),

requests AS (
    SELECT
        p.ds,
        p.task,
        p.model,
        p.seed,
        arg_max(p.impression_id, (p.probability, p.impression_id))
        = arg_max(p.impression_id, (p.score, p.impression_id)) AS kept
    FROM experiment_predictions AS p
    INNER JOIN impressions AS i USING (ds, impression_id)
    WHERE p.model IN (FROM everywhere)
    GROUP BY p.ds, p.task, p.model, p.seed, p.model_version, i.request_id
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
