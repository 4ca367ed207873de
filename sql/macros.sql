-- The model's serving function: the dot product of the two towers' stored vectors is the logit (paper section 2.2).
-- For a task given another this is P(task | given); multiply along the chain for P(task | impression).
CREATE OR REPLACE MACRO probability(q, i) AS
    1 / (1 + exp(-list_dot_product(q::DOUBLE[], i::DOUBLE[])));
