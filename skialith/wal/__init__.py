"""The write-ahead log: one JetStream stream per namespace, and the connection to it."""
