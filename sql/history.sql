-- The features from history of the impressions of one day: each entity's counts of the days before, joined by its key.
-- A count is 0 and a rate the platform's own where the entity was never shown; an unknown entity's are missing.
CREATE OR REPLACE TEMP TABLE {table} AS
SELECT {features}
FROM (SELECT * FROM impressions WHERE ds = DATE '{day}') AS r
{joins};
