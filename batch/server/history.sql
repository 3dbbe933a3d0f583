-- The statements of history.py, by name. They only read; the table is store.sql's.

-- name: by_sent
SELECT seq FROM request
WHERE accepted_at >= :start AND accepted_at < :end AND accepted_at <= :known
  AND (:waiting OR ended_at <= :known)
  AND (:low IS NULL OR (ended_at <= :known AND status BETWEEN :low AND :high))
  AND (:owner IS NULL OR owner = :owner)
ORDER BY
    coalesce(ended_at, :known + 1) > :known DESC,
    CASE WHEN :by_duration THEN ended_at - accepted_at ELSE ended_at END DESC,
    seq DESC
LIMIT :limit OFFSET :offset;

-- name: by_end
SELECT seq FROM request
WHERE accepted_at < :end AND accepted_at <= :known
  AND coalesce(ended_at, accepted_at) >= :start AND coalesce(ended_at, accepted_at) < :end
  AND (:waiting OR ended_at <= :known)
  AND (:low IS NULL OR (ended_at <= :known AND status BETWEEN :low AND :high))
  AND (:owner IS NULL OR owner = :owner)
ORDER BY
    coalesce(ended_at, :known + 1) > :known DESC,
    CASE WHEN :by_duration THEN ended_at - accepted_at ELSE ended_at END DESC,
    seq DESC
LIMIT :limit OFFSET :offset;

-- name: by_id
SELECT seq FROM request
WHERE request_id = :request_id
  AND accepted_at >= :start AND accepted_at < :end AND accepted_at <= :known
  AND (:waiting OR ended_at <= :known)
  AND (:low IS NULL OR (ended_at <= :known AND status BETWEEN :low AND :high))
  AND (:owner IS NULL OR owner = :owner)
LIMIT :limit OFFSET :offset;

-- name: rows
SELECT
    seq, request_id, app, accepted_at, started_at, ended_at, status,
    CASE WHEN :payloads AND length(body) <= :most THEN body END,
    CASE WHEN :payloads AND NOT coalesce(inline, 0) AND length(payload) <= :most THEN payload END
FROM request WHERE seq IN (SELECT value FROM json_each(:seqs));

-- name: charges
SELECT request_id, app, accepted_at, billable_units FROM request
WHERE accepted_at >= :start AND accepted_at < :end AND billable_units > 0
  AND (:request_ids IS NULL OR request_id IN (SELECT value FROM json_each(:request_ids)))
  AND (:owner IS NULL OR owner = :owner)
ORDER BY accepted_at DESC, seq DESC
LIMIT :limit OFFSET :offset;

-- name: units_a_call
SELECT avg(billable_units) FROM (
    SELECT billable_units FROM request WHERE billable_units > 0 AND (:owner IS NULL OR owner = :owner)
    ORDER BY seq DESC LIMIT 1000
);
