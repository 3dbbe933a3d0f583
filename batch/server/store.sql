-- The statements of store.py, by name. One table: a request is one row from its acceptance to its end.

-- name: schema
CREATE TABLE request (
    seq INTEGER PRIMARY KEY,            -- order of acceptance
    request_id TEXT NOT NULL UNIQUE,
    app TEXT NOT NULL,
    accepted_at REAL NOT NULL,
    body BLOB NOT NULL,                 -- JSON; pictures that came inside it lie in files/
    digest BLOB NOT NULL,               -- of app and input as received
    idempotency_key TEXT UNIQUE,
    priority INTEGER NOT NULL,
    start_by REAL,
    ended_at REAL,                      -- NULL: still to be done
    status INTEGER,
    payload BLOB,
    started_at REAL,
    inference_time REAL,
    billable_units REAL,
    error_type TEXT,
    retryable INTEGER,
    inline INTEGER,
    logs BLOB
) STRICT;
CREATE INDEX request_to_do ON request (seq) WHERE ended_at IS NULL;
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counter VALUES ('accepted', 0);

-- name: accept
INSERT INTO request (request_id, app, accepted_at, body, digest, idempotency_key, priority, start_by)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (idempotency_key) DO NOTHING;

-- name: earlier
SELECT request_id, digest FROM request WHERE idempotency_key = ?;

-- name: count
UPDATE counter SET value = value + ? WHERE name = 'accepted';

-- name: accepted
SELECT value FROM counter WHERE name = 'accepted';

-- name: end
UPDATE request
SET ended_at = ?, status = ?, payload = ?, started_at = ?, inference_time = ?, billable_units = ?, error_type = ?,
    retryable = ?, inline = ?, logs = ?
WHERE request_id = ? AND ended_at IS NULL;

-- name: find
SELECT app, ended_at, status, payload, started_at, inference_time, billable_units, error_type, retryable, inline, logs
FROM request WHERE request_id = ?;

-- name: body
SELECT body FROM request WHERE request_id = ?;

-- name: to_do
SELECT request_id, app, priority, start_by FROM request WHERE ended_at IS NULL ORDER BY seq;

-- name: latest
-- The newest requests, but of a long queue only its head: there is where something happens.
SELECT
    request_id, accepted_at, CASE WHEN length(body) <= 65536 THEN body END, started_at, ended_at, status,
    CASE WHEN length(payload) <= 65536 THEN payload END, error_type, inference_time, coalesce(inline, 0)
FROM request
WHERE seq <= coalesce((SELECT seq FROM request WHERE ended_at IS NULL ORDER BY seq LIMIT 1 OFFSET ?), 1 << 62)
ORDER BY seq DESC
LIMIT ?;
