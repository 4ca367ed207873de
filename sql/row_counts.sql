-- Rows received, accepted and rejected on one day, each counted by itself: `check_accounting` compares them.
--
-- Reads the day's inputs (log_received_of_day, impressions_of_day, scores_of_day), score_verdicts, and what was
-- written: joined_of_day, rejected_of_day.
SELECT
    'log' AS source,
    (SELECT sum(received) FROM log_received_of_day) AS received,
    (SELECT count(*) FROM impressions_of_day) AS accepted,
    (SELECT count(*) FROM rejected_of_day WHERE source = 'log') AS rejected
UNION ALL
SELECT
    'impressions',
    (SELECT count(*) FROM impressions_of_day),
    (SELECT count(*) FROM joined_of_day),
    (SELECT count(*) FROM rejected_of_day WHERE source = 'impressions')
UNION ALL
SELECT
    'heavyweight_scores',
    (SELECT count(*) FROM scores_of_day),
    (SELECT count(*) FROM score_verdicts WHERE reason IS NULL),
    (SELECT count(*) FROM rejected_of_day WHERE source = 'heavyweight_scores')
