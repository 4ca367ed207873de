-- By how much mtmd beats each contender: the result of the latest evaluation days.
CREATE OR REPLACE VIEW improvements AS
SELECT * EXCLUDE ds
FROM improvement_results
WHERE ds = (SELECT max(ds) FROM improvement_results);
