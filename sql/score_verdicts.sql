-- What becomes of each heavyweight score row of a day: the latest valid one an impression is used (reason is null).
--
-- Reads scores_of_day, impressions_of_day, log_rejected_of_day (one day's files, each row with its `line` in the file)
-- and slice_tasks (surface, product, has: which tasks the slice has). From the platform file come the macros
--   slice_scores(s, has)       the scores of the tasks that the slice has, null for the others
--   score_fault(scores, has)   null if they are valid: each strictly in (0, 1), no child above its parent.
-- A score made before its impression's `ts` is valid: in some logs ranking precedes the impression's record.
-- `out_of_scope` and `impression_rejected`: the log's row of its impression was rejected, for that reason or another.
-- Faults of the row come before sampling, so that the shares of faulty rows do not depend on the sample rate.
CREATE OR REPLACE TEMP TABLE score_verdicts AS
WITH turned_away AS (
    SELECT impression_id, bool_or(reason = 'out_of_scope') AS out_of_scope
    FROM log_rejected_of_day
    GROUP BY impression_id
),

placed AS (
    SELECT
        s.line,
        s.impression_id,
        i.line AS impression_line,
        s.scored_at,
        s.ranker_version,
        r.out_of_scope,
        s.scored_at > i.ts + $lateness AS late,
        in_sample(i.impression_id, $sample_rate) AS sampled,
        slice_scores(s, t.has) AS scores,
        t.has
    FROM scores_of_day AS s
    LEFT JOIN impressions_of_day AS i ON i.impression_id = s.impression_id
    LEFT JOIN slice_tasks AS t ON t.surface = i.surface AND t.product = i.product
    LEFT JOIN turned_away AS r ON r.impression_id = s.impression_id
),

judged AS MATERIALIZED (
    SELECT
        line,
        impression_id,
        impression_line,
        scored_at,
        ranker_version,
        scores,
        CASE
            WHEN impression_line IS NULL AND out_of_scope THEN 'out_of_scope'
            WHEN impression_line IS NULL AND NOT out_of_scope THEN 'impression_rejected'
            WHEN impression_line IS NULL THEN 'orphan'
            WHEN scored_at IS NULL THEN 'invalid_score'
            WHEN score_fault(scores, has) IS NOT NULL THEN score_fault(scores, has)
            WHEN late THEN 'late'
            WHEN NOT sampled THEN 'impression_sampled_out'
        END AS fault
    FROM placed
),

-- Only these few need the sort that a window is.
contested AS (
    SELECT impression_line
    FROM judged
    WHERE fault IS NULL
    GROUP BY impression_line
    HAVING count(*) > 1
),

superseded AS (
    SELECT line
    FROM judged
    SEMI JOIN contested USING (impression_line)
    WHERE fault IS NULL
    -- Ties on time go to the greater version, then to the greater scores, so that the file's order is irrelevant.
    QUALIFY row_number() OVER (
        PARTITION BY impression_line
        ORDER BY scored_at DESC, ranker_version DESC NULLS LAST, scores DESC NULLS LAST, line
    ) > 1
)

SELECT
    j.* EXCLUDE (fault),
    CASE WHEN s.line IS NOT NULL THEN 'superseded' ELSE fault END AS reason
FROM judged AS j
LEFT JOIN superseded AS s ON s.line = j.line
