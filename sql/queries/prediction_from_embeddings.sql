-- Predictions of the newest day beside the stored vectors that give them: sigma(q . i) is P(task | given), equal to the
-- prediction for a task without parent; multiply along the chain for the others.
-- An impression leads to its request's vectors, then to its item's. Joined as a table of its own, so that no shell
-- starts with every request against every item.
WITH requests AS MATERIALIZED (
    SELECT j.ds, j.impression_id, j.item_id, j.surface, j.product, q.task, q.model_version, q.embedding
    FROM query_embeddings AS q
    INNER JOIN joined_examples AS j USING (ds, request_id)
    WHERE q.ds = (SELECT max(ds) FROM query_embeddings)
),

vectors AS (
    SELECT r.* EXCLUDE (embedding), probability(r.embedding, i.embedding) AS given_parent
    FROM requests AS r
    INNER JOIN item_embeddings AS i USING (ds, item_id, product, task, model_version)
)

SELECT
    v.ds,
    v.impression_id,
    v.surface,
    v.product,
    v.task,
    round(v.given_parent, 6) AS given_parent,
    round(p.probability, 6) AS prediction,
    round(p.score, 6) AS heavyweight_score
FROM vectors AS v
INNER JOIN predictions AS p USING (ds, impression_id, task, model_version)
ORDER BY v.impression_id, p.probability DESC
LIMIT 20;
