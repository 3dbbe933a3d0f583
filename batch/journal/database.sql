-- The journal's statements, by name. `database.py` parses this file once and runs nothing else.
-- Instants are Unix seconds, durations seconds, money US dollars.

-- name: create_meta
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- name: create_sessions
-- One row per opening for writing. `spent_usd` is the money settled in the session, `finished` the number of jobs
-- finished in it, `last_finished_at` the time of the last finish.
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY,
    started_at REAL NOT NULL,
    ended_at REAL,
    version TEXT NOT NULL,
    spent_usd REAL NOT NULL DEFAULT 0,
    finished INTEGER NOT NULL DEFAULT 0,
    last_finished_at REAL
) STRICT;

-- name: create_jobs
-- Narrow on purpose: each step of a job writes it. `id` ascends in the order of first mention. `answer_id` and
-- `end_id` refer to the outcomes of the last attempt; those of earlier attempts stay in `outcomes`. `cost_usd` is the
-- cost of the job so far, including failed attempts.
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    session INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    intended_at REAL,
    accepted_at REAL,
    request_id TEXT,
    status_url TEXT,
    response_url TEXT,
    cancel_url TEXT,
    reserved_usd REAL NOT NULL,
    cost_usd REAL,
    reason TEXT,
    answer_id INTEGER,
    end_id INTEGER
) STRICT;

-- name: create_open_jobs
-- Small for a run of any size: it holds only requests that have not ended or can still be collected.
CREATE INDEX IF NOT EXISTS open_jobs ON jobs (intended_at, id)
WHERE state IN ('intended', 'accepted', 'answered', 'unknown', 'collectable');

-- name: create_request_ids
-- Two jobs never share a request id. Ids ascend with time, so new ones are adjacent in the index.
CREATE INDEX IF NOT EXISTS request_ids ON jobs (request_id) WHERE request_id IS NOT NULL;

-- name: create_bodies
-- The last intended body of each job. Read only when a job is resumed.
CREATE TABLE bodies (
    job_id INTEGER PRIMARY KEY,
    body BLOB NOT NULL
) STRICT;

-- name: create_start_timeouts
-- Start timeouts of submits that have not ended. Older versions ignore this table and may intend a job again, so a row
-- is valid only for the intent with the same `intended_at`. Created if missing.
CREATE TABLE IF NOT EXISTS start_timeouts (
    job_id INTEGER PRIMARY KEY,
    intended_at REAL NOT NULL,
    seconds REAL NOT NULL
) STRICT;

-- name: create_outcomes
-- Append-only: one row per answer, finish, failure, and failed attempt to collect an answer or its images. `output` is
-- the answer's body as received (`batch.journal.answers`). `images` is a JSON list of lists
-- [url, width, height, content_type, file_name, file_size, path, sha256].
CREATE TABLE outcomes (
    id INTEGER PRIMARY KEY,
    job_id INTEGER NOT NULL,
    happening TEXT NOT NULL,
    session INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    at REAL NOT NULL,
    request_id TEXT,
    output BLOB,
    engine TEXT,
    billable_units REAL,
    cost_usd REAL,
    queue_seconds REAL,
    total_seconds REAL,
    images BLOB,
    download_seconds REAL,
    error_type TEXT,
    error_message TEXT
) STRICT;

-- name: create_failed_request_ids
-- Request ids of failed attempts; the job may have a newer one.
CREATE INDEX IF NOT EXISTS failed_request_ids ON outcomes (request_id)
WHERE happening = 'fail' AND request_id IS NOT NULL;

-- name: create_uploads
CREATE TABLE uploads (
    sha256 TEXT PRIMARY KEY,
    at REAL NOT NULL,
    url TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- name: create_files
-- Facts about local images, valid while size and modification time stay the same.
CREATE TABLE files (
    path BLOB PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    megapixels REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- name: upgrade_1
-- Version 1 had no state `collectable`: it stored such jobs as failed.
DROP INDEX IF EXISTS open_jobs;

-- name: upgrade_1_outcomes
UPDATE outcomes SET happening = 'uncollected'
WHERE happening = 'fail' AND error_type IN (
    'malformed_output', 'result_file_gone', 'result_file_damaged', 'result_file_too_large', 'http_404', 'not_found'
) AND id IN (SELECT end_id FROM jobs WHERE state = 'failed' AND request_id IS NOT NULL);

-- name: upgrade_1_jobs
UPDATE jobs SET state = 'collectable'
WHERE state = 'failed' AND end_id IN (SELECT id FROM outcomes WHERE happening = 'uncollected');

-- name: begin_session
INSERT INTO sessions (started_at, version) VALUES (:at, :version) RETURNING number;

-- name: end_session
UPDATE sessions SET ended_at = :at WHERE number = :session;

-- name: sum_up
UPDATE sessions
SET spent_usd = spent_usd + :usd, finished = finished + :finished,
    last_finished_at = coalesce(:last_finished_at, last_finished_at)
WHERE number = :session;

-- name: last_ids
SELECT (SELECT coalesce(max(number), 0) FROM sessions),
       (SELECT coalesce(max(id), 0) FROM jobs),
       (SELECT coalesce(max(id), 0) FROM outcomes);

-- name: load_jobs
SELECT id, key, state, session, attempt, intended_at, accepted_at, request_id, status_url, response_url,
       cancel_url, reserved_usd, cost_usd, reason, answer_id, end_id
FROM jobs WHERE key IN (SELECT value FROM json_each(?));

-- name: put_jobs
INSERT INTO jobs (id, key, state, session, attempt, intended_at, accepted_at, request_id, status_url, response_url,
                  cancel_url, reserved_usd, cost_usd, reason, answer_id, end_id)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    state = excluded.state, session = excluded.session, attempt = excluded.attempt,
    intended_at = excluded.intended_at, accepted_at = excluded.accepted_at, request_id = excluded.request_id,
    status_url = excluded.status_url, response_url = excluded.response_url, cancel_url = excluded.cancel_url,
    reserved_usd = excluded.reserved_usd, cost_usd = excluded.cost_usd, reason = excluded.reason,
    answer_id = excluded.answer_id, end_id = excluded.end_id;

-- name: put_bodies
INSERT OR REPLACE INTO bodies (job_id, body) VALUES (?, ?);

-- name: put_start_timeouts
INSERT OR REPLACE INTO start_timeouts (job_id, intended_at, seconds) VALUES (?, ?, ?);

-- name: drop_start_timeouts
DELETE FROM start_timeouts WHERE job_id IN (SELECT value FROM json_each(?));

-- name: slim_bodies
UPDATE bodies SET body = slim_body(body)
WHERE job_id IN (SELECT value FROM json_each(?)) AND length(body) > 4096;

-- name: slim_answers
UPDATE outcomes SET output = slim_answer(output) WHERE id IN (SELECT value FROM json_each(?)) AND output IS NOT NULL;

-- name: put_outcomes
INSERT INTO outcomes (id, job_id, happening, session, attempt, at, request_id, output, engine, billable_units,
                      cost_usd, queue_seconds, total_seconds, images, download_seconds, error_type, error_message)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: put_uploads
INSERT OR REPLACE INTO uploads (sha256, at, url) VALUES (?, ?, ?);

-- name: find_upload
SELECT url FROM uploads WHERE sha256 = ? AND at >= ?;

-- name: find_jobs
SELECT j.key, j.state, j.session, j.attempt, e.at
FROM jobs AS j LEFT JOIN outcomes AS e ON e.id = j.end_id AND j.state = 'collectable'
WHERE j.key IN (SELECT value FROM json_each(?));

-- name: find_requests
SELECT request_id FROM jobs WHERE request_id IN (SELECT value FROM json_each(?))
UNION SELECT request_id FROM outcomes WHERE request_id IN (SELECT value FROM json_each(?));

-- name: find_owners
-- Jobs to which a request id belongs, or belonged in a failed attempt.
SELECT request_id, key FROM jobs WHERE request_id IN (SELECT value FROM json_each(:ids)) AND request_id IS NOT NULL
UNION ALL
SELECT o.request_id, j.key FROM outcomes AS o JOIN jobs AS j ON j.id = o.job_id
WHERE o.happening = 'fail' AND o.request_id IS NOT NULL AND o.request_id IN (SELECT value FROM json_each(:ids));

-- name: open_ids
SELECT id FROM jobs
WHERE state IN ('intended', 'accepted', 'answered', 'unknown', 'collectable')
  AND state IN (SELECT value FROM json_each(?))
ORDER BY intended_at, id;

-- name: all_ids
SELECT id FROM jobs WHERE state IN (SELECT value FROM json_each(?)) ORDER BY intended_at, id;

-- name: read_entries
SELECT j.key, j.state, j.attempt, j.intended_at, b.body, j.accepted_at, j.request_id, j.status_url,
       j.response_url, j.cancel_url, j.reserved_usd, t.seconds, coalesce(a.at, e.at), a.output, a.billable_units, a.engine
FROM json_each(:ids) AS wanted
CROSS JOIN jobs AS j ON j.id = wanted.value
LEFT JOIN bodies AS b ON b.job_id = j.id
LEFT JOIN outcomes AS a ON a.id = j.answer_id
LEFT JOIN outcomes AS e ON e.id = j.end_id
LEFT JOIN start_timeouts AS t ON t.job_id = j.id AND t.intended_at = j.intended_at
WHERE j.state IN (SELECT value FROM json_each(:states))
ORDER BY wanted.key;

-- name: read_outcomes
-- Columns in the order of `batch.journal.records.JobOutcome`, for jobs by key and for a range of ids.
WITH wanted (id) AS (
    SELECT known.id FROM json_each(:keys) AS asked CROSS JOIN jobs AS known ON known.key = asked.value
    UNION ALL
    SELECT id FROM jobs WHERE id > :after AND id <= :upto
)
SELECT j.key, j.state, j.attempt, j.request_id, j.intended_at, coalesce(a.at, e.at),
       a.output, e.images, a.queue_seconds, a.total_seconds, e.download_seconds,
       CASE WHEN a.id IS NULL THEN e.billable_units ELSE a.billable_units END, j.cost_usd, a.engine,
       CASE j.state WHEN 'unknown' THEN 'unknown' ELSE e.error_type END,
       CASE j.state WHEN 'unknown' THEN j.reason ELSE e.error_message END
FROM wanted
CROSS JOIN jobs AS j ON j.id = wanted.id
LEFT JOIN outcomes AS a ON a.id = j.answer_id
LEFT JOIN outcomes AS e ON e.id = j.end_id;

-- name: jobs_after
SELECT j.id, j.key, j.state, j.request_id, j.reserved_usd, j.cost_usd, a.output, e.images
FROM jobs AS j
LEFT JOIN outcomes AS a ON a.id = j.answer_id
LEFT JOIN outcomes AS e ON e.id = j.end_id
WHERE j.id > ? ORDER BY j.id LIMIT ?;

-- name: jobs_of
SELECT j.id, j.key, j.state, j.request_id, j.reserved_usd, j.cost_usd, a.output, e.images
FROM json_each(?) AS wanted
CROSS JOIN jobs AS j ON j.key = wanted.value
LEFT JOIN outcomes AS a ON a.id = j.answer_id
LEFT JOIN outcomes AS e ON e.id = j.end_id;

-- name: ended_after
SELECT o.id, j.key, o.request_id, o.at, o.happening = 'fail', o.billable_units, o.cost_usd
FROM outcomes AS o JOIN jobs AS j ON j.id = o.job_id
WHERE o.id > ? AND o.happening <> 'finish' ORDER BY o.id LIMIT ?;

-- name: count_states
SELECT state, count(*) FROM jobs GROUP BY state;

-- name: sum_spent
SELECT coalesce(sum(spent_usd), 0.0) FROM sessions;

-- name: sum_open
SELECT coalesce(sum(reserved_usd), 0.0), min(intended_at) FROM jobs
WHERE state IN ('intended', 'accepted', 'answered', 'unknown', 'collectable') AND state <> 'collectable';

-- name: read_sessions
SELECT number, started_at, ended_at, version, spent_usd, finished, last_finished_at FROM sessions ORDER BY number;

-- name: finished_since
SELECT coalesce(sum(finished), 0), max(last_finished_at) FROM sessions WHERE started_at >= ?;

-- name: find_file
SELECT sha256, megapixels FROM files WHERE path = ? AND size_bytes = ? AND mtime_ns = ?;

-- name: put_files
INSERT OR REPLACE INTO files (path, size_bytes, mtime_ns, sha256, megapixels) VALUES (?, ?, ?, ?, ?);

-- name: get_meta
SELECT value FROM meta WHERE name = ?;

-- name: put_meta
INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?);
