-- What a pre-ranker is for: in what share of the newest day's requests the model's first candidate is the heavyweight
-- ranker's, beside the share by chance. Of the candidates that were shown, so of those that an earlier ranker let through, and
-- have the task; of two that are equal the one with the higher id.
WITH newest AS MATERIALIZED (
    FROM predictions
    WHERE ds = (SELECT max(ds) FROM predictions)
),

requests AS (
    SELECT
        p.surface,
        p.task,
        count(*) AS candidates,
        arg_max(p.impression_id, (p.probability, p.impression_id))
        = arg_max(p.impression_id, (p.score, p.impression_id)) AS kept
    FROM newest AS p
    INNER JOIN impressions AS i USING (ds, impression_id)
    GROUP BY p.surface, p.task, p.model_version, i.request_id
)

SELECT
    surface,
    task,
    count(*) AS requests,
    round(avg(candidates), 1) AS candidates,
    round(avg(kept::INT), 3) AS best_kept,
    round(avg(1 / candidates), 3) AS by_chance
FROM requests
WHERE candidates > 1
GROUP BY ALL
ORDER BY surface, task;
