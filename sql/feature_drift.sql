-- How far each feature's missing rate moved from the mean of its trailing days (drift warns and never gates).
--
-- Computed when read, from the published days of `feature_contract`, so that it cannot depend on the order in which
-- days were built. The trailing days are the drift_days() calendar days before; days that are not published, slices
-- without rows and rates that broke the contract are passed over, and a day with none before it has no row. drift_days()
-- and drift_tolerance() come from the platform file.
CREATE OR REPLACE VIEW feature_drift AS
WITH compared AS (
    SELECT
        d.surface,
        d.product,
        d.feature,
        d.ds,
        any_value(d.rows) AS rows,
        any_value(d.missing) AS missing,
        any_value(d.missing_rate) AS missing_rate,
        avg(t.missing_rate) AS mean_rate
    FROM feature_contract AS d
    JOIN feature_contract AS t
        ON t.surface = d.surface AND t.product = d.product AND t.feature = d.feature
        AND t.ds BETWEEN d.ds - drift_days()::INTEGER AND d.ds - 1
    WHERE d.rows > 0 AND t.rows > 0 AND t.passed
    GROUP BY d.surface, d.product, d.feature, d.ds
)

SELECT
    surface,
    product,
    feature,
    'drift' AS rule,
    rows,
    missing,
    missing_rate,
    mean_rate - drift_tolerance() AS min_rate,
    mean_rate + drift_tolerance() AS max_rate,
    missing_rate BETWEEN mean_rate - drift_tolerance() AND mean_rate + drift_tolerance() AS passed,
    ds
FROM compared;
