-- Statements of the audit's temporary database, by name. `tables.py` parses this file once.

-- name: create_requests
-- Every accepted request of the journal, with the cost that we counted.
CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    counted_usd REAL NOT NULL DEFAULT 0,
    units REAL,
    ended_at REAL,
    jobs INTEGER NOT NULL DEFAULT 1
) STRICT, WITHOUT ROWID;

-- name: create_bills
-- Pages shift while they are read: a repeated event counts once, but another instant is another charge.
CREATE TABLE bills (
    request_id TEXT NOT NULL,
    at REAL NOT NULL,
    units REAL NOT NULL,
    usd REAL NOT NULL,
    PRIMARY KEY (request_id, at, units)
) STRICT, WITHOUT ROWID;

-- name: create_shown
CREATE TABLE shown (job TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

-- name: create_files
CREATE TABLE files (path TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;

-- name: add_request
INSERT INTO requests (id, job, counted_usd, units, ended_at) VALUES (:id, :job, :usd, :units, :at)
ON CONFLICT (id) DO UPDATE SET
    counted_usd = counted_usd + excluded.counted_usd,
    units = coalesce(units, excluded.units),
    ended_at = coalesce(ended_at, excluded.ended_at),
    jobs = jobs + (job <> excluded.job);

-- name: count_requests
SELECT count(*), count(ended_at), coalesce(sum(counted_usd), 0.0) FROM requests;

-- name: shared_requests
SELECT id, job, jobs, count(*) OVER () FROM requests WHERE jobs > 1 ORDER BY id LIMIT ?;

-- name: add_bill
INSERT OR IGNORE INTO bills (request_id, at, units, usd) VALUES (?, ?, ?, ?);

-- name: count_bills
SELECT count(DISTINCT b.request_id), coalesce(sum(b.usd), 0.0) FROM bills AS b JOIN requests AS r ON r.id = b.request_id;

-- name: foreign_bills
SELECT count(DISTINCT request_id), coalesce(sum(usd), 0.0) FROM bills
WHERE NOT EXISTS (SELECT 1 FROM requests WHERE requests.id = bills.request_id);

-- name: billed_twice
SELECT r.id, r.job, count(*) AS times, count(*) OVER ()
FROM requests AS r JOIN bills AS b ON b.request_id = r.id
GROUP BY r.id HAVING times > 1 ORDER BY r.id LIMIT ?;

-- name: billed_otherwise
-- More than we counted, or other units than the result's header. A smaller amount is a discount or a reservation that
-- was rounded up. Nothing is counted for requests that have not ended, or without a known price.
SELECT r.id, r.job, r.counted_usd, r.units, sum(b.usd), sum(b.units), count(*) OVER ()
FROM requests AS r JOIN bills AS b ON b.request_id = r.id
WHERE r.ended_at IS NOT NULL
GROUP BY r.id
HAVING count(*) = 1
   AND ((:priced AND sum(b.usd) > r.counted_usd + :fuzz) OR abs(sum(b.units) - coalesce(r.units, sum(b.units))) > :fuzz)
ORDER BY r.id LIMIT :count;

-- name: unbilled
-- Only results that reported billed units: a cost that we counted without such a report may be zero.
SELECT r.id, r.job, r.units, count(*) OVER ()
FROM requests AS r
WHERE r.units > :fuzz AND r.ended_at < :before
  AND NOT EXISTS (SELECT 1 FROM bills WHERE bills.request_id = r.id)
ORDER BY r.id LIMIT :count;

-- name: add_shown
INSERT OR IGNORE INTO shown (job) VALUES (?);

-- name: find_shown
SELECT job FROM shown WHERE job IN (SELECT value FROM json_each(?));

-- name: add_file
INSERT OR IGNORE INTO files (path) VALUES (?);

-- name: find_files
SELECT path FROM files WHERE path IN (SELECT value FROM json_each(?));
