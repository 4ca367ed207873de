-- What the constant predictors say of the rows that the model predicted, in the same columns.
--
-- Reads `predicted` and `constants`. A slice x task that the window never saw has no constant and no row here.
SELECT
    c.model,
    p.model_version,
    p.seed,
    p.impression_id,
    p.user_id,
    p.surface,
    p.product,
    p.task,
    p.score,
    c.probability
FROM predicted AS p
INNER JOIN (
    UNPIVOT constants ON constant, constant_median INTO NAME model VALUE probability
) AS c USING (surface, product, task)
