-- Every feature's missing rate in every slice against the rules `present` and `absent` (the contract) and `drift`.
CREATE OR REPLACE VIEW feature_missingness AS
SELECT surface, product, feature, rule, rows, missing, missing_rate, min_rate, max_rate, passed, ds
FROM feature_contract
UNION ALL
SELECT surface, product, feature, rule, rows, missing, missing_rate, min_rate, max_rate, passed, ds
FROM feature_drift;
