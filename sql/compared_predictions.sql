-- A model's predictions on consecutive days, with each row's bucket (`tenth`, macros.sql) in its day's slice x task.
SELECT
    seed,
    ds AS day,
    impression_id,
    user_id,
    surface,
    product,
    task,
    score,
    probability,
    tenth((ds, seed, surface, product, task), score, impression_id)::INT AS bucket
FROM experiment_predictions
WHERE ds BETWEEN $first AND $last AND model = $model AND list_contains($seeds, seed)
