"""What an error of MySQL, MariaDB or TiDB means: the row's own fault, a lost connection, or the database's trouble."""

from __future__ import annotations

from ..errors import StoreConnectionLost, StoreDataError, StoreError, StoreMisconfigured, StoreUnavailable

DATA_ERRORS = {
    1048: "ER_BAD_NULL_ERROR",
    1264: "ER_WARN_DATA_OUT_OF_RANGE",
    1265: "WARN_DATA_TRUNCATED",
    1292: "ER_TRUNCATED_WRONG_VALUE",
    1366: "ER_TRUNCATED_WRONG_VALUE_FOR_FIELD",
    1367: "ER_ILLEGAL_VALUE_FOR_TYPE",
    1406: "ER_DATA_TOO_LONG",
    3140: "ER_INVALID_JSON_TEXT",
    3141: "ER_INVALID_JSON_TEXT_IN_PARAM",
    3142: "ER_INVALID_JSON_BINARY_DATA",
    3144: "ER_INVALID_JSON_CHARSET",
    3146: "ER_INVALID_TYPE_FOR_JSON",
    3150: "ER_JSON_VALUE_TOO_BIG",
    3151: "ER_JSON_KEY_TOO_BIG",
    3155: "ER_NUMERIC_JSON_VALUE_OUT_OF_RANGE",
    3156: "ER_INVALID_JSON_VALUE_FOR_CAST",
    3157: "ER_JSON_DOCUMENT_TOO_DEEP",
    3158: "ER_JSON_DOCUMENT_NULL_KEY",
    3819: "ER_CHECK_CONSTRAINT_VIOLATED",  # MySQL
    4025: "ER_CONSTRAINT_FAILED",  # MariaDB; its JSON columns are text with a check
}
"""Errors that speak against one row. Everything that is not here is transient, because what is taken for the row's fault
by mistake becomes a dead letter, and what is taken for the database's by mistake only waits. 1153 (packet too large) is not
here: a session has room for the longest statement or there is none, so it speaks of the server, or of a proxy before it."""

CONNECTION_ERRORS = {
    1053: "ER_SERVER_SHUTDOWN",
    1152: "ER_ABORTING_CONNECTION",
    1153: "ER_NET_PACKET_TOO_LARGE",  # the server closes the connection behind it
    1158: "ER_NET_READ_ERROR",
    1159: "ER_NET_READ_INTERRUPTED",
    1160: "ER_NET_ERROR_ON_WRITE",
    1161: "ER_NET_WRITE_INTERRUPTED",
    1927: "ER_CONNECTION_KILLED",  # MariaDB
    2006: "CR_SERVER_GONE_ERROR",
    2013: "CR_SERVER_LOST",
    2026: "CR_SSL_CONNECTION_ERROR",
    2027: "CR_MALFORMED_PACKET",
    2055: "CR_SERVER_LOST_EXTENDED",
    3169: "ER_SESSION_WAS_KILLED",
    4031: "ER_CLIENT_INTERACTION_TIMEOUT",
}
"""Errors after which the connection is gone. So is what ran on it, unless it was the COMMIT, whose fate is then unknown."""

_REFUSALS = {1044, 1045, 1049, 1142, 1227, 1698}
"""Access denied, unknown database, missing privilege: settings that no waiting mends."""

_RESTORE = (
    "run `skialith migrate` if this database is new, else restore the schema: this table is not as Skialith made it"
)

_ADVICE = {
    1021: "the server's disk is full: free space on it",
    1026: "the server cannot write a file: its disk is full or broken (errno 28: full), see the server's log",
    1030: "the server's disk is full or broken (errno 28: full), see the server's log",
    1040: "the server has no free connections: raise max_connections or run fewer processes",
    1044: "GRANT the user all privileges on the database",
    1045: "check user and password in database_url",
    1047: "the cluster node takes no commands now: check its state",
    1049: "create it: CREATE DATABASE with the name in database_url",
    1054: _RESTORE,
    1114: "the server's disk or tablespace is full: free space",
    1136: _RESTORE,
    1142: "GRANT the user SELECT, INSERT, UPDATE, DELETE, CREATE and INDEX on the database",
    1146: "run `skialith migrate` if this database is new, else restore the table: migrations that are done are not done again",
    1153: "set max_allowed_packet to 16M or more on the server, and on any proxy before it",
    1203: "the user has too many connections: raise max_user_connections or run fewer processes",
    1205: "another transaction holds a row or the table for long (a backup, an ALTER), or this cluster node lags; it is "
    "tried again",
    1213: "two transactions met; it is tried again",
    1227: "GRANT the user the privilege that is named",
    1226: "the user has used up a limit of its account: raise it (ALTER USER ... WITH MAX_...)",
    1290: "the server is read-only: use the primary in database_url",
    1364: _RESTORE,
    1526: "add the partition that is missing: the table was partitioned by somebody else than Skialith",
    1644: "a trigger on the table refuses the row: remove it",
    1665: "set binlog_format to ROW or MIXED",
    1698: "this user may only log in through the unix socket: use another user in database_url",
    1792: "the server is read-only: use the primary in database_url",
    1820: "the user's password has expired: set it anew (ALTER USER)",
    1836: "the server is read-only: use the primary in database_url",
    1862: "the user's password has expired: set it anew (ALTER USER)",
    2002: "is the server running at the host, port or socket in database_url?",
    2003: "is the server running at the host and port in database_url?",
    2005: "check the host in database_url",
    2026: "check the server's certificate and ssl_ca, ssl_cert, ssl_key, ssl_mode in database_url",
    3118: "the account is locked: ALTER USER ... ACCOUNT UNLOCK",  # MySQL
    4151: "the account is locked: ALTER USER ... ACCOUNT UNLOCK",  # MariaDB
}


def translate(error: Exception, url: str, *, connecting: bool = False) -> StoreError:
    """The error to raise for a driver's ``error``; ``connecting``: it came before there was a connection to be lost."""
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    said = str(error.args[1]) if len(error.args) > 1 else str(error)
    if code in DATA_ERRORS:
        return StoreDataError(
            f"{url} refuses a row for its data: {said} (error {code}, {DATA_ERRORS[code]})", code=code
        )
    if connecting:
        advice = _ADVICE.get(code, "is the server running at the host and port in database_url?")
        kind = StoreMisconfigured if code in _REFUSALS else StoreUnavailable
        return kind(f"cannot connect to {url}: {said or type(error).__name__} (error {code}); {advice}")
    # The driver answers with (0, "") on a connection that it closed itself.
    if code in CONNECTION_ERRORS or (code == 0 and type(error).__name__ == "InterfaceError"):
        name = CONNECTION_ERRORS.get(code, "connection closed")
        return StoreConnectionLost(
            f"lost the connection to {url}: {said or name} (error {code}, {name}); {_ADVICE.get(code, 'it is tried again')}"
        )
    advice = _ADVICE.get(code, "it is tried again; see the server's log")
    kind = StoreMisconfigured if code in _REFUSALS else StoreUnavailable
    return kind(f"{url} failed: {said} (error {code}); {advice}")
