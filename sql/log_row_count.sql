-- Rows of the log received, accepted and rejected on a day that has no scores, each counted by itself.
SELECT
    'log' AS source,
    (SELECT sum(received) FROM log_row_counts WHERE ds = $day) AS received,
    (SELECT count(*) FROM impressions WHERE ds = $day) AS accepted,
    (SELECT count(*) FROM log_rejected_rows WHERE ds = $day) AS rejected
