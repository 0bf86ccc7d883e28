-- Where the recorded steps of an agent are among its events, so that finding them costs their number and not that of the events.

CREATE TABLE IF NOT EXISTS agent_steps (
  record_key BLOB NOT NULL PRIMARY KEY CHECK (length(record_key) = 16),  -- identity of the step, as in agent_events, where it is recorded
  namespace TEXT NOT NULL CHECK (length(namespace) <= 32),               -- namespace
  agent_id TEXT NOT NULL CHECK (length(CAST(agent_id AS BLOB)) <= 1020), -- agent id
  store_time_ns INTEGER NOT NULL,        -- as in agent_events; first part of the order
  seq INTEGER NOT NULL                   -- as in agent_events; second part of the order
) WITHOUT ROWID;

CREATE INDEX IF NOT EXISTS agent_steps_by_agent ON agent_steps (namespace, agent_id, store_time_ns, seq);
