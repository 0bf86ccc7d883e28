-- What lists of a whole namespace are read by: traces by time, and those of one type.
--
-- MySQL has no CREATE INDEX IF NOT EXISTS. An index of this name that is there already, from a run that crashed or made ahead of an
-- upgrade on a large table, is left alone.

SET @skialith_add = IF(EXISTS (SELECT 1 FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = 'agent_traces' AND index_name = 'by_position'), 'DO 0', 'CREATE INDEX by_position ON agent_traces (namespace, store_time_ns, seq)');

PREPARE skialith_add FROM @skialith_add;

EXECUTE skialith_add;

SET @skialith_add = IF(EXISTS (SELECT 1 FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name = 'agent_traces' AND index_name = 'by_type'), 'DO 0', 'CREATE INDEX by_type ON agent_traces (namespace, event_type, store_time_ns, seq)');

PREPARE skialith_add FROM @skialith_add;

EXECUTE skialith_add;

DEALLOCATE PREPARE skialith_add;
