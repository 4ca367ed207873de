-- Every model's metrics: those of the daily evaluation, and those of the experiments (contenders, ablations, seeds), whose
-- constants are the daily ones again.
CREATE OR REPLACE VIEW slice_metrics AS
FROM daily_slice_metrics
UNION ALL BY NAME
FROM experiment_slice_metrics WHERE model NOT IN ('constant', 'constant_median');
