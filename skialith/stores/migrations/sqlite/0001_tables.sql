-- The tables of Skialith for SQLite; the same columns as migrations/mysql, where each has its comment as data.
--
-- Every table has one unique key, the record's own: a position in the log (store_time_ns, seq) is not unique, after a power
-- loss sequences are handed out again. Ids are TEXT compared byte by byte (BINARY). The CHECKs refuse what MySQL's column
-- types refuse. Statements end with a semicolon at the end of a line.

-- Schema version of Skialith.
CREATE TABLE IF NOT EXISTS skialith_migrations (
  version INTEGER NOT NULL PRIMARY KEY,  -- number of the migration file
  name TEXT NOT NULL,                    -- name of the migration file
  applied_us INTEGER NOT NULL            -- when it was applied, Unix microseconds
);

-- Which log feeds which namespace.
CREATE TABLE IF NOT EXISTS wals (
  namespace TEXT NOT NULL PRIMARY KEY,   -- one log feeds one namespace
  wal_id TEXT NOT NULL,                  -- identity of the log (JetStream stream) whose records are written here
  bound_us INTEGER NOT NULL              -- when it was bound, Unix microseconds
);

-- Saved events, exactly as they were saved.
CREATE TABLE IF NOT EXISTS agent_events (
  record_key BLOB NOT NULL PRIMARY KEY CHECK (length(record_key) = 16),  -- identity: hash of namespace, agent id and event id; the first row wins
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),               -- namespace
  agent_id TEXT NOT NULL CHECK (length(CAST(agent_id AS BLOB)) <= 1020), -- agent id
  event_id TEXT NOT NULL CHECK (length(CAST(event_id AS BLOB)) <= 1020), -- event id
  step_index INTEGER NOT NULL,           -- step of the agent when the event was saved
  event_type TEXT NOT NULL CHECK (length(event_type) <= 255),            -- kind of event: thought, tool_call, observation, ...
  created_us INTEGER NOT NULL,           -- when it was saved by the clock of the caller, Unix microseconds
  store_time_ns INTEGER NOT NULL,        -- when the log stored it by the clock of the server, Unix nanoseconds; first part of the order
  seq INTEGER NOT NULL,                  -- sequence in the log; second part of the order, alone it orders nothing
  codec INTEGER NOT NULL CHECK (codec BETWEEN 0 AND 255),                -- encoding of body: 0 msgpack, 1 msgpack compressed with zstd
  body BLOB,                             -- payload as it was saved, byte for byte; NULL if it is in payload_parts
  body_bytes INTEGER NOT NULL,           -- size of the payload as encoded
  body_parts BLOB                        -- payload_parts.parts_key of a large payload
);

CREATE INDEX IF NOT EXISTS agent_events_by_agent ON agent_events (namespace, agent_id, store_time_ns, seq);

-- Saved states of agents; the greatest (store_time_ns, seq) is current.
CREATE TABLE IF NOT EXISTS agent_checkpoints (
  record_key BLOB NOT NULL PRIMARY KEY CHECK (length(record_key) = 16),  -- identity of the call that saved it
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),               -- namespace
  agent_id TEXT NOT NULL CHECK (length(CAST(agent_id AS BLOB)) <= 1020), -- agent id
  step_index INTEGER NOT NULL,           -- step of the checkpoint
  created_us INTEGER NOT NULL,           -- when it was saved by the clock of the caller, Unix microseconds
  store_time_ns INTEGER NOT NULL,        -- when the log stored it by the clock of the server, Unix nanoseconds
  seq INTEGER NOT NULL,                  -- sequence in the log
  codec INTEGER NOT NULL CHECK (codec BETWEEN 0 AND 255),                -- encoding of body: 0 msgpack, 1 msgpack compressed with zstd
  body BLOB,                             -- state as it was saved, byte for byte; NULL if it is in payload_parts
  body_bytes INTEGER NOT NULL,           -- size of the state as encoded
  body_parts BLOB                        -- payload_parts.parts_key of a large state
);

CREATE INDEX IF NOT EXISTS agent_checkpoints_by_agent ON agent_checkpoints (namespace, agent_id, store_time_ns, seq);

-- Events as JSON, for people and their SQL.
CREATE TABLE IF NOT EXISTS agent_traces (
  record_key BLOB NOT NULL PRIMARY KEY CHECK (length(record_key) = 16),  -- identity of the event, as in agent_events
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),               -- namespace
  agent_id TEXT NOT NULL CHECK (length(CAST(agent_id AS BLOB)) <= 1020), -- agent id
  event_id TEXT NOT NULL CHECK (length(CAST(event_id AS BLOB)) <= 1020), -- event id
  step_index INTEGER NOT NULL,           -- step of the agent when the event was saved
  event_type TEXT NOT NULL CHECK (length(event_type) <= 255),            -- kind of event: thought, tool_call, observation, ...
  payload TEXT NOT NULL CHECK (json_valid(payload)),                     -- payload as JSON; what JSON cannot hold is replaced by an object that says why
  created_at TEXT NOT NULL,              -- when it was saved by the clock of the caller, UTC, YYYY-MM-DD HH:MM:SS.ffffff
  logged_at TEXT NOT NULL,               -- when the log stored it by the clock of the server, UTC
  store_time_ns INTEGER NOT NULL,        -- the same in Unix nanoseconds; first part of the order
  seq INTEGER NOT NULL                   -- sequence in the log; second part of the order
);

CREATE INDEX IF NOT EXISTS agent_traces_by_agent ON agent_traces (namespace, agent_id, store_time_ns, seq);

-- Records that the database refused for their data, with the reason.
CREATE TABLE IF NOT EXISTS dead_letters (
  sink TEXT NOT NULL,                    -- who gave it up: writer or trace_ingest
  record_key BLOB NOT NULL CHECK (length(record_key) = 16),              -- identity of the record, or hash of subject and position if the message does not decode
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),               -- namespace
  subject TEXT NOT NULL CHECK (length(CAST(subject AS BLOB)) <= 8192),   -- subject of the message in the log
  store_time_ns INTEGER NOT NULL,        -- when the log stored it by the clock of the server, Unix nanoseconds; first part of the order
  seq INTEGER NOT NULL,                  -- sequence in the log; second part of the order
  error_code INTEGER NOT NULL,           -- error code of the database driver, 0 if it has none
  error TEXT NOT NULL,                   -- why it was given up
  dead_us INTEGER NOT NULL,              -- when it was given up, Unix microseconds
  raw BLOB,                              -- the message as it stood in the log; NULL if it is in payload_parts
  raw_bytes INTEGER NOT NULL,            -- size of the message
  raw_parts BLOB,                        -- payload_parts.parts_key of a large message
  kind INTEGER,                          -- 1 event, 2 checkpoint; this and what follows is NULL if the message does not decode
  agent_id TEXT CHECK (length(CAST(agent_id AS BLOB)) <= 1020),          -- agent id
  record_id TEXT,                        -- event id; empty for a checkpoint
  step_index INTEGER,                    -- step of the agent
  event_type TEXT,                       -- kind of event
  created_us INTEGER,                    -- when it was saved by the clock of the caller, Unix microseconds
  codec INTEGER,                         -- encoding of body: 0 msgpack, 1 msgpack compressed with zstd
  body BLOB,                             -- payload; NULL if it is in payload_parts, or was not in the log any more
  body_bytes INTEGER NOT NULL,           -- size of the payload as encoded
  body_parts BLOB,                       -- payload_parts.parts_key of a large payload
  manifest_size INTEGER,                 -- large records: size of the body that followed in the log
  manifest_chunks INTEGER,               -- large records: number of messages of the body
  manifest_digest BLOB,                  -- large records: digest of the body
  PRIMARY KEY (sink, record_key)
);

CREATE INDEX IF NOT EXISTS dead_letters_by_position ON dead_letters (namespace, store_time_ns, seq);

CREATE INDEX IF NOT EXISTS dead_letters_by_agent ON dead_letters (namespace, agent_id, sink, kind, store_time_ns, seq);

-- Payloads over 1 MiB in parts, written with the row that owns them.
CREATE TABLE IF NOT EXISTS payload_parts (
  parts_key BLOB NOT NULL CHECK (length(parts_key) = 16),                -- hash of the owning row and the whole payload: parts of two payloads never mix
  n INTEGER NOT NULL,                    -- number of the part, from 0
  data BLOB NOT NULL,                    -- at most 1 MiB of the payload
  PRIMARY KEY (parts_key, n)
);
