-- How often each entity was shown from day {first} to day {last}, and with which outcomes: one row an entity.
-- A rate's two counts (`x_of_y` and `y_for_x`) take only the rows where both are known.
CREATE OR REPLACE TEMP TABLE {table} AS
SELECT {by}, {counts}
FROM impressions
WHERE ds BETWEEN DATE '{first}' AND DATE '{last}'
GROUP BY {by};
