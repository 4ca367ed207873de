-- Every model's metrics: those of the daily evaluation, and those of the experiments (contenders, ablations, seeds).
CREATE OR REPLACE VIEW slice_metrics AS
FROM daily_slice_metrics
UNION ALL BY NAME
FROM experiment_slice_metrics;
