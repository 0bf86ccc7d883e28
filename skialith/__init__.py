"""Skialith: the write-ahead log for AI agents."""
