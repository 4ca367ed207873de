-- By how much mtmd beats each contender: the newest result (of the last evaluation day).
CREATE OR REPLACE VIEW improvements AS
SELECT * EXCLUDE ds
FROM improvement_results
WHERE ds = (SELECT max(ds) FROM improvement_results);
