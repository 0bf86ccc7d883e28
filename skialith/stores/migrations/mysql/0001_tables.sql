-- The tables of Skialith for MySQL 8, MariaDB 10.6+ and TiDB 7.5+.
--
-- Every table has one unique key, the record's own: two unique keys would deadlock two writers, and a position in the log
-- (store_time_ns, seq) is not unique: after a power loss sequences are handed out again.
-- Ids are VARBINARY: no collation makes 'a' equal to 'a '. Statements end with a semicolon at the end of a line and may be
-- run again after a crash half way, because DDL commits by itself.

CREATE TABLE IF NOT EXISTS skialith_migrations (
  version INT NOT NULL PRIMARY KEY COMMENT 'number of the migration file',
  name VARCHAR(100) NOT NULL COMMENT 'name of the migration file',
  applied_us BIGINT NOT NULL COMMENT 'when it was applied, Unix microseconds'
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='schema version of Skialith';

CREATE TABLE IF NOT EXISTS wals (
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY COMMENT 'one log feeds one namespace',
  wal_id VARBINARY(1020) NOT NULL COMMENT 'identity of the log (JetStream stream) whose records are written here',
  bound_us BIGINT NOT NULL COMMENT 'when it was bound, Unix microseconds'
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='which log feeds which namespace';

CREATE TABLE IF NOT EXISTS agent_events (
  record_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'identity: hash of namespace, agent id and event id; the first row wins',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  agent_id VARBINARY(1020) NOT NULL COMMENT 'agent id, UTF-8',
  event_id VARBINARY(1020) NOT NULL COMMENT 'event id, UTF-8',
  step_index BIGINT NOT NULL COMMENT 'step of the agent when the event was saved',
  event_type VARCHAR(255) NOT NULL COMMENT 'kind of event: thought, tool_call, observation, ...',
  created_us BIGINT NOT NULL COMMENT 'when it was saved by the clock of the caller, Unix microseconds',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored it by the clock of the server, Unix nanoseconds; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log; second part of the order, alone it orders nothing',
  codec TINYINT UNSIGNED NOT NULL COMMENT 'encoding of body: 0 msgpack, 1 msgpack compressed with zstd',
  body MEDIUMBLOB NULL COMMENT 'payload as it was saved, byte for byte; NULL if it is in payload_parts',
  body_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of the payload as encoded',
  body_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large payload',
  KEY by_agent (namespace, agent_id, store_time_ns, seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='saved events, exactly as they were saved';

CREATE TABLE IF NOT EXISTS agent_checkpoints (
  record_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'identity of the call that saved it',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  agent_id VARBINARY(1020) NOT NULL COMMENT 'agent id, UTF-8',
  step_index BIGINT NOT NULL COMMENT 'step of the checkpoint',
  created_us BIGINT NOT NULL COMMENT 'when it was saved by the clock of the caller, Unix microseconds',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored it by the clock of the server, Unix nanoseconds; the greatest (store_time_ns, seq) is current',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log',
  codec TINYINT UNSIGNED NOT NULL COMMENT 'encoding of body: 0 msgpack, 1 msgpack compressed with zstd',
  body MEDIUMBLOB NULL COMMENT 'state as it was saved, byte for byte; NULL if it is in payload_parts',
  body_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of the state as encoded',
  body_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large state',
  KEY by_agent (namespace, agent_id, store_time_ns, seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='saved states of agents';

CREATE TABLE IF NOT EXISTS agent_traces (
  record_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'identity of the event, as in agent_events',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  agent_id VARBINARY(1020) NOT NULL COMMENT 'agent id, UTF-8; compare this one',
  agent_text VARCHAR(255) NOT NULL COMMENT 'agent id as text, to be read',
  event_id VARBINARY(1020) NOT NULL COMMENT 'event id, UTF-8; compare this one',
  event_text VARCHAR(255) NOT NULL COMMENT 'event id as text, to be read',
  step_index BIGINT NOT NULL COMMENT 'step of the agent when the event was saved',
  event_type VARCHAR(255) NOT NULL COMMENT 'kind of event: thought, tool_call, observation, ...',
  payload JSON NOT NULL COMMENT 'payload as JSON; what JSON cannot hold is replaced by an object that says why',
  created_at DATETIME(6) NOT NULL COMMENT 'when it was saved by the clock of the caller, UTC',
  logged_at DATETIME(6) NOT NULL COMMENT 'when the log stored it by the clock of the server, UTC',
  store_time_ns BIGINT NOT NULL COMMENT 'the same in Unix nanoseconds; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log; second part of the order',
  KEY by_agent (namespace, agent_id, store_time_ns, seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='events as JSON, for people and their SQL';

CREATE TABLE IF NOT EXISTS dead_letters (
  sink VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'who gave it up: writer or trace_ingest',
  record_key BINARY(16) NOT NULL COMMENT 'identity of the record, or hash of subject and position if the message does not decode',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  subject VARBINARY(8192) NOT NULL COMMENT 'subject of the message in the log',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored it by the clock of the server, Unix nanoseconds; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log; second part of the order',
  error_code INT NOT NULL COMMENT 'error code of the database driver, 0 if it has none',
  error TEXT NOT NULL COMMENT 'why it was given up',
  dead_us BIGINT NOT NULL COMMENT 'when it was given up, Unix microseconds',
  raw MEDIUMBLOB NULL COMMENT 'the message as it stood in the log; NULL if it is in payload_parts',
  raw_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of the message',
  raw_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large message',
  kind TINYINT UNSIGNED NULL COMMENT '1 event, 2 checkpoint; this and what follows is NULL if the message does not decode',
  agent_id VARBINARY(1020) NULL COMMENT 'agent id, UTF-8',
  record_id MEDIUMBLOB NULL COMMENT 'event id, UTF-8; empty for a checkpoint',
  step_index BIGINT NULL COMMENT 'step of the agent',
  event_type MEDIUMBLOB NULL COMMENT 'kind of event, UTF-8',
  created_us BIGINT NULL COMMENT 'when it was saved by the clock of the caller, Unix microseconds',
  codec TINYINT UNSIGNED NULL COMMENT 'encoding of body: 0 msgpack, 1 msgpack compressed with zstd',
  body MEDIUMBLOB NULL COMMENT 'payload; NULL if it is in payload_parts, or was not in the log any more',
  body_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of the payload as encoded',
  body_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large payload',
  manifest_size BIGINT UNSIGNED NULL COMMENT 'large records: size of the body that followed in the log',
  manifest_chunks INT UNSIGNED NULL COMMENT 'large records: number of messages of the body',
  manifest_digest VARBINARY(255) NULL COMMENT 'large records: digest of the body',
  PRIMARY KEY (sink, record_key),
  KEY by_position (namespace, store_time_ns, seq),
  KEY by_agent (namespace, agent_id, sink, kind, store_time_ns, seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='records that the database refused for their data, with the reason';

CREATE TABLE IF NOT EXISTS payload_parts (
  parts_key BINARY(16) NOT NULL COMMENT 'hash of the owning row and the whole payload: parts of two payloads never mix',
  n INT UNSIGNED NOT NULL COMMENT 'number of the part, from 0',
  data MEDIUMBLOB NOT NULL COMMENT 'at most 1 MiB of the payload',
  PRIMARY KEY (parts_key, n)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='payloads over 1 MiB in parts, written with the row that owns them';
