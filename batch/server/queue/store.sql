-- Statements of store.py, by name. A request is one row; its callback is a row of `webhook`.
-- Version 3 added `engine`, because a restarted server may use another one. Version 4 stores an idempotency key only in the
-- row of its request.

-- name: schema
CREATE TABLE request (
    seq INTEGER PRIMARY KEY,            -- order of acceptance
    request_id TEXT NOT NULL UNIQUE,
    app TEXT NOT NULL,
    accepted_at REAL NOT NULL,
    body BLOB NOT NULL,                 -- JSON; embedded images are in files/
    digest BLOB NOT NULL,               -- digest of app and input as received
    idempotency_key TEXT UNIQUE,
    priority INTEGER NOT NULL,
    start_by REAL,
    ended_at REAL,                      -- NULL: unfinished
    status INTEGER,
    payload BLOB,
    started_at REAL,
    inference_time REAL,
    billable_units REAL,
    error_type TEXT,
    retryable INTEGER,
    inline INTEGER,
    logs BLOB,
    owner TEXT NOT NULL DEFAULT '',     -- this and the following columns: since version 2
    brief INTEGER NOT NULL DEFAULT 0,   -- 1: remove input and output early
    file_life REAL,                     -- lifetime of its images in seconds; NULL: the server's retention
    source TEXT,                        -- path of its source image, if stored here
    kept_for REAL,                      -- lifetime of the result in seconds; NULL: the server's retention
    engine TEXT
) STRICT;
CREATE INDEX request_to_do ON request (seq) WHERE ended_at IS NULL;
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counter VALUES ('accepted', 0);

-- name: schema_2
CREATE INDEX request_of ON request (owner, seq) WHERE owner != '';  -- empty on a server without keys
CREATE INDEX request_ended ON request (ended_at, accepted_at, owner, status) WHERE ended_at IS NOT NULL;  -- for request_log.py
CREATE INDEX request_brief ON request (ended_at) WHERE kept_for IS NOT NULL;
CREATE INDEX request_source ON request (source) WHERE source IS NOT NULL;
CREATE TABLE webhook (
    request_id TEXT PRIMARY KEY,
    url TEXT NOT NULL,
    host TEXT NOT NULL,
    base TEXT NOT NULL,                 -- origin of the server as the submitter used it
    due_at REAL,                        -- NULL: the request is unfinished
    tries INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX webhook_due ON webhook (due_at, host) WHERE due_at IS NOT NULL;
CREATE TRIGGER webhook_begins AFTER UPDATE OF ended_at ON request BEGIN
    UPDATE webhook SET due_at = NEW.ended_at WHERE request_id = NEW.request_id;
END;
CREATE TRIGGER webhook_expires AFTER DELETE ON request BEGIN
    DELETE FROM webhook WHERE request_id = OLD.request_id;
END;

-- name: schema_tags
-- A separate table, created if missing, so that earlier versions of restyle can still open the file.
CREATE TABLE IF NOT EXISTS tags (
    request_id TEXT PRIMARY KEY,
    tags TEXT NOT NULL                  -- JSON object
) STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS tags_expire AFTER DELETE ON request BEGIN
    DELETE FROM tags WHERE request_id = OLD.request_id;
END;

-- name: upgrade_1
ALTER TABLE request ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE request ADD COLUMN brief INTEGER NOT NULL DEFAULT 0;
ALTER TABLE request ADD COLUMN file_life REAL;
ALTER TABLE request ADD COLUMN source TEXT;
ALTER TABLE request ADD COLUMN kept_for REAL;

-- name: upgrade_2
ALTER TABLE request ADD COLUMN engine TEXT;

-- name: upgrade_3
DROP TABLE IF EXISTS spent_key;

-- name: accept
INSERT INTO request (
    request_id, app, accepted_at, body, digest, idempotency_key, priority, start_by, owner, brief, file_life, source
)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (idempotency_key) DO NOTHING;

-- name: earlier
-- The request that holds an idempotency key, and whether the key can be reused: the request has ended, and the key, the
-- result or its images have expired.
SELECT request_id, digest, ended_at IS NOT NULL AND (
    accepted_at < ? OR ended_at + coalesce(kept_for, ?) < ? OR (status < 400 AND ended_at + file_life < ?)
)
FROM request
WHERE idempotency_key = ?;

-- name: free_key
UPDATE request SET idempotency_key = NULL WHERE idempotency_key = ?;

-- name: over
SELECT * FROM (
    SELECT seq FROM request WHERE ended_at < :before AND kept_for IS NULL
    ORDER BY ended_at LIMIT :limit
)
UNION ALL
SELECT * FROM (
    SELECT seq FROM request WHERE kept_for IS NOT NULL AND ended_at + kept_for < :now LIMIT :limit
);

-- name: forget
DELETE FROM request WHERE seq IN (SELECT value FROM json_each(?));

-- name: sources
SELECT DISTINCT source FROM request WHERE source IN (SELECT value FROM json_each(?));

-- name: count
UPDATE counter SET value = value + ? WHERE name = 'accepted';

-- name: accepted
SELECT value FROM counter WHERE name = 'accepted';

-- name: end
UPDATE request
SET ended_at = ?, status = ?, payload = ?, started_at = ?, inference_time = ?, billable_units = ?, error_type = ?,
    retryable = ?, inline = ?, logs = ?, kept_for = ?, engine = ?
WHERE request_id = ? AND ended_at IS NULL;

-- name: find
SELECT app, ended_at, status, payload, started_at, inference_time, billable_units, error_type, retryable, inline, logs,
    owner, kept_for, engine
FROM request WHERE request_id = ?;

-- name: body
SELECT body FROM request WHERE request_id = ?;

-- name: to_do
SELECT request_id, app, priority, start_by, owner, brief, file_life FROM request WHERE ended_at IS NULL ORDER BY seq;

-- name: latest
-- The newest requests, and those around the head of the queue, where requests start and end.
WITH head (seq) AS (
    SELECT coalesce((SELECT seq FROM request WHERE ended_at IS NULL ORDER BY seq LIMIT 1 OFFSET :ahead), 1 << 62)
)
SELECT seq FROM (SELECT seq FROM request ORDER BY seq DESC LIMIT :newest)
UNION
SELECT seq FROM (SELECT seq FROM request WHERE seq <= (SELECT seq FROM head) ORDER BY seq DESC LIMIT :around);

-- name: latest_of
-- The same for one owner. SQLite uses the partial index only if the query says that the owner is not empty.
WITH head (seq) AS (
    SELECT coalesce((SELECT seq FROM request WHERE ended_at IS NULL ORDER BY seq LIMIT 1 OFFSET :ahead), 1 << 62)
)
SELECT seq FROM (SELECT seq FROM request WHERE owner = :owner AND owner != '' ORDER BY seq DESC LIMIT :newest)
UNION
SELECT seq FROM (
    SELECT seq FROM request
    WHERE owner = :owner AND owner != '' AND seq <= (SELECT seq FROM head)
    ORDER BY seq DESC
    LIMIT :around
);

-- name: listed
SELECT
    request_id, accepted_at, CASE WHEN length(body) <= 65536 THEN body END, started_at, ended_at, status,
    CASE WHEN length(payload) <= 65536 THEN payload END, error_type, inference_time, coalesce(inline, 0)
FROM request
WHERE seq IN (SELECT value FROM json_each(?))
ORDER BY seq DESC;

-- name: webhooks
SELECT count(*) FROM webhook;

-- name: webhook
INSERT INTO webhook (request_id, url, host, base) VALUES (?, ?, ?, ?);

-- name: tags
INSERT INTO tags (request_id, tags) VALUES (?, ?);

-- name: webhooks_due
-- Oldest first, without those in flight and without hosts at their limit.
SELECT request_id, url, host, base, tries
FROM webhook
WHERE due_at <= ? AND host NOT IN (SELECT value FROM json_each(?)) AND request_id NOT IN (SELECT value FROM json_each(?))
ORDER BY due_at
LIMIT ?;

-- name: webhook_next
SELECT min(due_at) FROM webhook WHERE due_at > ?;

-- name: webhook_again
UPDATE webhook SET due_at = ?, tries = tries + 1 WHERE request_id = ?;

-- name: webhook_over
DELETE FROM webhook WHERE request_id = ?;
