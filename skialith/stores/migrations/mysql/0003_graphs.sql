-- The threads of LangGraph graphs: checkpoints, the values of their channels, and pending writes.
--
-- A row of graph_checkpoints or graph_blobs is a cell: what the operation with the greatest (store_time_ns, seq) made of it. Every
-- transaction locks the rows of its threads in graph_threads first. Contents are as LangGraph's serializer made them.

CREATE TABLE IF NOT EXISTS graph_threads (
  thread_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'hash of namespace and thread id',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  thread_id MEDIUMBLOB NOT NULL COMMENT 'thread id, UTF-8',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored its last deletion, Unix nanoseconds; nothing before that is in the tables; 0 if it was never deleted',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence of that deletion in the log'
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='threads of graphs, the deleted ones too';

CREATE TABLE IF NOT EXISTS graph_checkpoints (
  cell_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'hash of namespace, thread id, checkpoint namespace and checkpoint id',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  thread_key BINARY(16) NOT NULL COMMENT 'graph_threads.thread_key',
  ns_key BINARY(16) NOT NULL COMMENT 'hash of namespace, thread id and checkpoint namespace',
  checkpoint_id VARBINARY(1020) NOT NULL COMMENT 'checkpoint id, UTF-8; in their order the greatest is the latest',
  live TINYINT NOT NULL COMMENT '1, or 0 if it was deleted: then the row keeps an earlier put from coming back',
  run_key BINARY(16) NULL COMMENT 'hash of the id of the run that made it',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored it by the clock of the server, Unix nanoseconds; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log; second part of the order',
  body MEDIUMBLOB NULL COMMENT 'msgpack: thread id, checkpoint namespace, parent id, ids of its channel values, checkpoint, metadata; NULL if it is in payload_parts',
  body_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of that',
  body_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large one',
  KEY by_ns (ns_key, live, checkpoint_id),
  KEY by_thread (thread_key, live, checkpoint_id),
  KEY by_namespace (namespace, live, checkpoint_id),
  KEY by_run (namespace, run_key)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='checkpoints of graphs';

CREATE TABLE IF NOT EXISTS graph_blobs (
  blob_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'hash of namespace, thread id, checkpoint namespace, channel and version',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  thread_key BINARY(16) NOT NULL COMMENT 'graph_threads.thread_key',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored it by the clock of the server, Unix nanoseconds; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log; second part of the order',
  form VARBINARY(1020) NOT NULL COMMENT 'what the serializer calls its form',
  codec TINYINT UNSIGNED NOT NULL COMMENT 'encoding of body: 0 as the serializer made it, 1 compressed with zstd',
  body MEDIUMBLOB NULL COMMENT 'the value; NULL if it is in payload_parts',
  body_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of that',
  body_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large one',
  KEY by_thread (thread_key)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='values of the channels of graphs, one row for each version';

CREATE TABLE IF NOT EXISTS graph_writes (
  record_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'identity of the call that saved them',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  thread_key BINARY(16) NOT NULL COMMENT 'graph_threads.thread_key',
  cell_key BINARY(16) NOT NULL COMMENT 'graph_checkpoints.cell_key of the checkpoint at which they are pending',
  store_time_ns BIGINT NOT NULL COMMENT 'when the log stored it by the clock of the server, Unix nanoseconds; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'sequence in the log; second part of the order',
  codec TINYINT UNSIGNED NOT NULL COMMENT 'encoding of body: 0 msgpack, 1 msgpack compressed with zstd',
  body MEDIUMBLOB NULL COMMENT 'the record as it was saved: task id, task path, and the values by channel; NULL if it is in payload_parts',
  body_bytes BIGINT UNSIGNED NOT NULL COMMENT 'size of that',
  body_parts BINARY(16) NULL COMMENT 'payload_parts.parts_key of a large one',
  KEY by_cell (cell_key, store_time_ns, seq),
  KEY by_thread (thread_key)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='what the tasks of graphs wrote, one row for each call';
