-- Statements of request_log.py, by name. Read-only; store.sql defines the table.
-- `known`: events after this time are not listed yet.

-- name: by_end
-- Follows the index request_ended: no sort, and the scan stops at the end of the page.
SELECT seq FROM request
WHERE ended_at >= :start AND ended_at <= :known
  AND CASE WHEN :of_ends THEN ended_at ELSE accepted_at END >= :start
  AND CASE WHEN :of_ends THEN ended_at ELSE accepted_at END < :end
  AND (:low IS NULL OR status BETWEEN :low AND :high)
  AND (:owner IS NULL OR owner = :owner)
ORDER BY ended_at DESC, accepted_at DESC
LIMIT :limit OFFSET :offset;

-- name: by_duration
SELECT seq FROM request
WHERE ended_at >= :start AND ended_at <= :known
  AND CASE WHEN :of_ends THEN ended_at ELSE accepted_at END >= :start
  AND CASE WHEN :of_ends THEN ended_at ELSE accepted_at END < :end
  AND (:low IS NULL OR status BETWEEN :low AND :high)
  AND (:owner IS NULL OR owner = :owner)
ORDER BY ended_at - accepted_at DESC, ended_at DESC, seq DESC
LIMIT :limit OFFSET :offset;

-- name: with_waiting
-- Unfinished requests come first. Scans the whole table; used by fault injection only, where stores are small.
SELECT seq FROM (
    SELECT seq, accepted_at, status, owner, CASE WHEN ended_at <= :known THEN ended_at END AS ended_at FROM request
    WHERE accepted_at <= :known
)
WHERE CASE WHEN :of_ends THEN coalesce(ended_at, accepted_at) ELSE accepted_at END >= :start
  AND CASE WHEN :of_ends THEN coalesce(ended_at, accepted_at) ELSE accepted_at END < :end
  AND (:low IS NULL OR (ended_at IS NOT NULL AND status BETWEEN :low AND :high))
  AND (:owner IS NULL OR owner = :owner)
ORDER BY ended_at IS NULL DESC, CASE WHEN :longest THEN ended_at - accepted_at ELSE ended_at END DESC, seq DESC
LIMIT :limit OFFSET :offset;

-- name: by_id
SELECT seq FROM request
WHERE request_id = :request_id
  AND CASE WHEN :of_ends THEN coalesce(ended_at, accepted_at) ELSE accepted_at END >= :start
  AND CASE WHEN :of_ends THEN coalesce(ended_at, accepted_at) ELSE accepted_at END < :end
  AND CASE WHEN :waiting THEN accepted_at ELSE ended_at END <= :known
  AND (:low IS NULL OR (ended_at <= :known AND status BETWEEN :low AND :high))
  AND (:owner IS NULL OR owner = :owner)
LIMIT :limit OFFSET :offset;

-- name: rows
SELECT
    seq, request_id, app, accepted_at, started_at, ended_at, status,
    CASE WHEN :payloads AND NOT brief AND length(body) <= :most THEN body END,
    CASE WHEN :payloads AND NOT brief AND NOT coalesce(inline, 0) AND length(payload) <= :most THEN payload END
FROM request WHERE seq IN (SELECT value FROM json_each(:seqs));

-- name: charges
SELECT request_id, app, accepted_at, billable_units, NULL FROM request
WHERE ended_at >= :start AND accepted_at >= :start AND accepted_at < :end AND billable_units > 0
  AND (:request_ids IS NULL OR request_id IN (SELECT value FROM json_each(:request_ids)))
  AND (:owner IS NULL OR owner = :owner)
ORDER BY ended_at DESC, accepted_at DESC
LIMIT :limit OFFSET :offset;

-- name: tagged_charges
-- As charges, with each request's tags. `tags` is a JSON object: for each key, the list of accepted values.
SELECT request_id, app, accepted_at, billable_units, coalesce(t.tags, '{}') FROM request LEFT JOIN tags AS t USING (request_id)
WHERE ended_at >= :start AND accepted_at >= :start AND accepted_at < :end AND billable_units > 0
  AND (:request_ids IS NULL OR request_id IN (SELECT value FROM json_each(:request_ids)))
  AND (:owner IS NULL OR owner = :owner)
  AND NOT EXISTS (
      SELECT 1 FROM json_each(:tags) AS asked
      WHERE coalesce((SELECT value FROM json_each(coalesce(t.tags, '{}')) WHERE key = asked.key), '(untagged)')
          NOT IN (SELECT value FROM json_each(asked.value))
  )
ORDER BY ended_at DESC, accepted_at DESC
LIMIT :limit OFFSET :offset;

-- name: units_a_call
SELECT avg(billable_units) FROM (
    SELECT billable_units FROM request
    WHERE ended_at IS NOT NULL AND billable_units > 0 AND (:owner IS NULL OR owner = :owner)
    ORDER BY ended_at DESC
    LIMIT 1000
);
