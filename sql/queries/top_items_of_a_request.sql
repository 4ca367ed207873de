-- What serving does: one request's query vector against every item vector of the same model version.
WITH request AS (
    SELECT ds, model_version, request_id, task, embedding FROM query_embeddings
    WHERE task = (SELECT task FROM query_embeddings LIMIT 1)
    ORDER BY ds DESC, request_id LIMIT 1
)

SELECT r.request_id, i.item_id, i.product, r.task, probability(r.embedding, i.embedding) AS p
FROM request AS r
INNER JOIN item_embeddings AS i USING (ds, model_version, task)
ORDER BY p DESC
LIMIT 10;
