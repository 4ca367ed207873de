-- The model's serving function: the dot product of the two towers' stored vectors is the logit (paper section 2.2).
-- For a task given another this is P(task | given); multiply along the chain for P(task | impression).
CREATE OR REPLACE MACRO probability(q, i) AS
    1 / (1 + exp(-list_dot_product(q::DOUBLE[], i::DOUBLE[])));

-- The bucket of a row: which tenth of its cell it is in by score, 0 the highest (paper table 6).
CREATE OR REPLACE MACRO tenth(cell, score, id) AS
    ntile(10) OVER (PARTITION BY cell ORDER BY score DESC, id) - 1;
