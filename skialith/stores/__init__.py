"""Databases behind one Protocol: MySQL (MariaDB, TiDB) and SQLite."""
