-- The two constant predictors of each slice x task: its mean and its median over the training window.
--
-- Reads `window_examples` (the window's joined_examples). The median (of logarithms) is the constant that minimises LogMAE;
-- the mean is the calibrated one.
WITH window_scores AS (
    UNPIVOT (SELECT surface, product, weight, COLUMNS('^score_.*') FROM window_examples)
    ON COLUMNS(* EXCLUDE (surface, product, weight))
    INTO NAME task VALUE score
)

SELECT
    surface,
    product,
    regexp_replace(task, '^score_', '') AS task,
    sum(weight * score) / sum(weight) AS constant,
    exp(median(ln(greatest(score, $floor)))) AS constant_median
FROM window_scores
GROUP BY ALL
