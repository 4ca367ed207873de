-- Every row of a day that did not become part of an example, with its reason.
--
-- `row` holds the content where the lake has it nowhere else (log), and tells an impression's score rows apart.
-- Reads log_rejected_of_day, unjoined_impressions and score_verdicts.
SELECT source, impression_id, reason, row
FROM (
    SELECT 1 AS part, line, 'log' AS source, impression_id, reason, row
    FROM log_rejected_of_day
    UNION ALL
    SELECT 2, line, 'impressions', impression_id, reason, NULL
    FROM unjoined_impressions
    UNION ALL
    SELECT 3, line, 'heavyweight_scores', impression_id, reason, to_json({scored_at: scored_at, ranker_version: ranker_version})::VARCHAR
    FROM score_verdicts
    WHERE reason IS NOT NULL
)
ORDER BY part, line
