-- Where the recorded steps of an agent are among its events, so that finding them costs their number and not that of the events.

CREATE TABLE IF NOT EXISTS agent_steps (
  record_key BINARY(16) NOT NULL PRIMARY KEY COMMENT 'identity of the step, as in agent_events, where it is recorded',
  namespace VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL COMMENT 'namespace',
  agent_id VARBINARY(1020) NOT NULL COMMENT 'agent id, UTF-8',
  store_time_ns BIGINT NOT NULL COMMENT 'as in agent_events; first part of the order',
  seq BIGINT UNSIGNED NOT NULL COMMENT 'as in agent_events; second part of the order',
  KEY by_agent (namespace, agent_id, store_time_ns, seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin ROW_FORMAT=DYNAMIC COMMENT='index of the events that record steps';
