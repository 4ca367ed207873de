-- Why an impression of a day is not joined with a score; those with a score in use are not in it.
--
-- Reads impressions_of_day and score_verdicts. `only_late_scores`: it has valid scores, all of them late.
-- Lack of a score comes before sampling, so that its share does not depend on the sample rate.
CREATE OR REPLACE TEMP TABLE unjoined_impressions AS
WITH used AS (
    SELECT impression_line
    FROM score_verdicts
    WHERE reason IS NULL
),

unused AS (
    SELECT
        impression_line,
        bool_or(reason = 'impression_sampled_out') AS sampled_out,
        bool_or(reason = 'late') AS late
    FROM score_verdicts
    WHERE reason <> 'superseded' AND impression_line IS NOT NULL
    GROUP BY impression_line
),

unjoined AS (
    SELECT i.line, i.impression_id
    FROM impressions_of_day AS i
    ANTI JOIN used AS u ON u.impression_line = i.line
)

SELECT
    i.line,
    i.impression_id,
    CASE
        WHEN n.impression_line IS NULL THEN 'no_score'
        WHEN n.sampled_out THEN 'sampled_out'
        WHEN n.late THEN 'only_late_scores'
        ELSE 'only_invalid_scores'
    END AS reason
FROM unjoined AS i
LEFT JOIN unused AS n ON n.impression_line = i.line
