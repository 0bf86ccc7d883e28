"""Which database a URL names, and what is said to one that names none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from skialith.errors import ConfigurationError
from skialith.stores import open_store
from skialith.stores.mysql import MySqlStore
from skialith.stores.sqlite import SqliteStore


def arguments(url: str) -> dict[str, Any]:
    return MySqlStore(url)._arguments


def test_every_part_of_a_mysql_url() -> None:
    assert arguments("mysql://us%40er:p%3A%2F%25w@db.example:3307/my%20db") == {
        "user": "us@er",
        "password": "p:/%w",
        "host": "db.example",
        "port": 3307,
        "database": "my db",
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://u@h/d", {"user": "u", "host": "h", "port": 3306, "database": "d"}),
        ("mysql:///d", {"host": "127.0.0.1", "port": 3306, "database": "d"}),
        ("mysql://localhost:3307/d", {"host": "127.0.0.1", "port": 3307, "database": "d"}),
        ("mysql://[::1]:3307/d", {"host": "::1", "port": 3307, "database": "d"}),
        ("mysql://u:@h/d", {"user": "u", "password": "", "host": "h", "port": 3306, "database": "d"}),
        (
            "mysql://u@h/d?unix_socket=/run/my%20sql.sock",
            {"user": "u", "unix_socket": "/run/my sql.sock", "database": "d"},
        ),
        ("mysql://h/d?ssl_mode=required", {"host": "h", "port": 3306, "database": "d", "ssl_mode": "REQUIRED"}),
    ],
)
def test_mysql_urls(url: str, expected: dict[str, Any]) -> None:
    assert arguments(url) == expected


def test_tls_files_make_tls_required(tmp_path: Path) -> None:
    file = tmp_path / "a file.pem"
    file.touch()
    path = str(file).replace(" ", "%20")
    assert arguments(f"mysql://h/d?ssl_ca={path}")["ssl_mode"] == "VERIFY_CA"
    assert arguments(f"mysql://h/d?ssl_cert={path}&ssl_key={path}")["ssl_mode"] == "REQUIRED"
    given = arguments(f"mysql://h/d?ssl_ca={path}&ssl_cert={path}&ssl_key={path}&ssl_mode=VERIFY_IDENTITY")
    assert given["ssl"] == {"ca": str(file), "cert": str(file), "key": str(file)}
    assert given["ssl_mode"] == "VERIFY_IDENTITY"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://u:secret@h", "names no database"),
        ("mysql://u:secret@h/", "names no database"),
        ("mysql://u:secret@h/a/b", "names no database"),
        ("mysql://u:secret@h:port/d", "cannot be parsed"),
        ("mysql://u:secret@h:99999/d", "cannot be parsed"),
        ("mysql://u:secret@h/d#x", "%23"),
        ("mysql://u:secret@h/d?charset=latin1", r"'charset'; known: ssl_ca, ssl_cert, ssl_key, ssl_mode, unix_socket"),
        ("mysql://u:secret@h/d?unix_socket=", "'unix_socket' is empty"),
        ("mysql://u:secret@h/d?ssl_mode=maybe", "'MAYBE' is none of DISABLED, PREFERRED"),
        ("mysql://u:secret@h/d?ssl_ca=/no/such/file", "no file '/no/such/file'"),
        ("sqlite://u:secret@relative.db", "one slash too few"),
        ("sqlite:///", "names no file"),
        ("sqlite:///folder/", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///a.db?mode=ro", "no options"),
        ("sqlite:///a.db#x", "%23"),
        ("sqlite:///a%00b", "names no file"),
        ("postgresql://u:secret@h/d", "not supported: use mysql://.* or sqlite:///"),
        ("just text", "not supported"),
        ("mysql://[::1/d", "cannot be parsed"),
    ],
)
def test_bad_urls(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_sqlite_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = SqliteStore("sqlite:///here/a%20b%3F%23.db")
    monkeypatch.chdir("/")
    assert store.path == tmp_path / "here" / "a b?#.db"
    assert SqliteStore("sqlite:////there/x.db").path == Path("/there/x.db")


def test_the_password_is_not_shown() -> None:
    assert open_store("mysql://u:secret@h/d").url == "mysql://u:***@h/d"


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'skialith\[mysql\]'"):
        open_store("mysql://u@h/d")
