"""Doors to the same engine from frameworks that run agents; each needs its extra."""
