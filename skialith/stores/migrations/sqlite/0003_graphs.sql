-- The threads of LangGraph graphs, for SQLite; the same columns as migrations/mysql, where each has its comment as data.

-- Threads of graphs, the deleted ones too; (store_time_ns, seq) is the last deletion's, before which nothing is in the tables.
CREATE TABLE IF NOT EXISTS graph_threads (
  thread_key BLOB NOT NULL PRIMARY KEY CHECK (length(thread_key) = 16),
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),
  thread_id BLOB NOT NULL,
  store_time_ns INTEGER NOT NULL,
  seq INTEGER NOT NULL
);

-- Checkpoints of graphs.
CREATE TABLE IF NOT EXISTS graph_checkpoints (
  cell_key BLOB NOT NULL PRIMARY KEY CHECK (length(cell_key) = 16),
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),
  thread_key BLOB NOT NULL,
  ns_key BLOB NOT NULL,
  checkpoint_id TEXT NOT NULL CHECK (length(CAST(checkpoint_id AS BLOB)) <= 1020),
  live INTEGER NOT NULL CHECK (live IN (0, 1)),
  run_key BLOB,
  store_time_ns INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  body BLOB,
  body_bytes INTEGER NOT NULL,
  body_parts BLOB
);

CREATE INDEX IF NOT EXISTS graph_checkpoints_by_ns ON graph_checkpoints (ns_key, live, checkpoint_id, cell_key);

CREATE INDEX IF NOT EXISTS graph_checkpoints_by_thread ON graph_checkpoints (thread_key, live, checkpoint_id, cell_key);

CREATE INDEX IF NOT EXISTS graph_checkpoints_by_namespace ON graph_checkpoints (namespace, live, checkpoint_id, cell_key);

CREATE INDEX IF NOT EXISTS graph_checkpoints_by_run ON graph_checkpoints (namespace, run_key);

-- Values of the channels of graphs, one row for each version.
CREATE TABLE IF NOT EXISTS graph_blobs (
  blob_key BLOB NOT NULL PRIMARY KEY CHECK (length(blob_key) = 16),
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),
  thread_key BLOB NOT NULL,
  store_time_ns INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  form TEXT NOT NULL CHECK (length(CAST(form AS BLOB)) <= 1020),
  codec INTEGER NOT NULL CHECK (codec BETWEEN 0 AND 255),
  body BLOB,
  body_bytes INTEGER NOT NULL,
  body_parts BLOB
);

CREATE INDEX IF NOT EXISTS graph_blobs_by_thread ON graph_blobs (thread_key);

-- What the tasks of graphs wrote, one row for each call.
CREATE TABLE IF NOT EXISTS graph_writes (
  record_key BLOB NOT NULL PRIMARY KEY CHECK (length(record_key) = 16),
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),
  thread_key BLOB NOT NULL,
  cell_key BLOB NOT NULL,
  store_time_ns INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  codec INTEGER NOT NULL CHECK (codec BETWEEN 0 AND 255),
  body BLOB,
  body_bytes INTEGER NOT NULL,
  body_parts BLOB
);

CREATE INDEX IF NOT EXISTS graph_writes_by_cell ON graph_writes (cell_key, store_time_ns, seq);

CREATE INDEX IF NOT EXISTS graph_writes_by_thread ON graph_writes (thread_key);
