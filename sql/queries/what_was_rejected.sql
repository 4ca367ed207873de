-- Where rows went: every source's rejected rows by day and reason.
SELECT ds, source, reason, count(*) AS rows
FROM rejected_rows
GROUP BY ALL
ORDER BY ds DESC, rows DESC;
