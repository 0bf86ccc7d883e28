-- What lists of a whole namespace are read by: traces by time, those of one type, and dead letters.

CREATE INDEX IF NOT EXISTS agent_traces_by_position ON agent_traces (namespace, store_time_ns, seq);

CREATE INDEX IF NOT EXISTS agent_traces_by_type ON agent_traces (namespace, event_type, store_time_ns, seq);

-- With the key behind the position, which InnoDB's indexes have of themselves: a list goes on behind a letter, not a position.
DROP INDEX IF EXISTS dead_letters_by_position;

CREATE INDEX IF NOT EXISTS dead_letters_by_position ON dead_letters (namespace, store_time_ns, seq, sink, record_key);
