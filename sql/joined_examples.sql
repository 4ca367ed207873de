-- One row an impression with its latest valid scores, in the order of the log.
--
-- Reads impressions_of_day (the published day, each row with its `line`), score_verdicts, the macro example_weight and
-- history_of_day (impression_id and the features from history, if the platform has any). Ordering by line makes a
-- rebuilt day identical to the last bit, its row groups too; the choice among scores was made on narrow tables.
SELECT
    i.* EXCLUDE (line),
    h.* EXCLUDE (impression_id),
    unnest(v.scores),
    v.ranker_version,
    example_weight() AS weight
FROM impressions_of_day AS i
JOIN score_verdicts AS v ON v.impression_line = i.line
LEFT JOIN history_of_day AS h ON h.impression_id = i.impression_id
WHERE v.reason IS NULL
ORDER BY i.line
