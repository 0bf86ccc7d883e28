"""The writer: moves records from the log to a database, one transaction per batch, commit before ack."""
