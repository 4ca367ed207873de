-- Features whose missing rate breaks the contract (present, absent) or moved from its trailing days (drift).
SELECT ds, surface, product, feature, rule, rows, round(missing_rate, 4) AS seen, min_rate, max_rate
FROM feature_missingness
WHERE NOT passed
ORDER BY ds DESC, rule, rows DESC;
