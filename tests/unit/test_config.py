"""Settings: arguments over environment, and no password in any message."""

from __future__ import annotations

import pytest

from skialith.config import load
from skialith.errors import ConfigurationError
from skialith.urls import redact


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://host:4222", "nats://host:4222"),
        ("nats://t0ken@host", "nats://***@host"),
        ("nats://u:pa/ssWORD@host:4222", "nats://u:***@host:4222"),
        ("nats://u:pa#ssWORD@host:4222", "nats://u:***@host:4222"),
        ("mysql://u:p@ssWORD@host/db", "mysql://u:***@host/db"),
        ("mysql://u:[ssWORD@host/db", "mysql://u:***@host/db"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize("url", ["nats://u:pa/ssWORD@host:4222", "nats://u:pa#ssWORD@host", "nats://u:ssWORD@:4222"])
def test_a_url_that_does_not_parse_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="%2F") as caught:
        load({}, nats_url=url)
    assert "ssWORD" not in str(caught.value)


def test_an_argument_wins_over_the_environment() -> None:
    environment = {"SKIALITH_NAMESPACE": "env", "SKIALITH_TIMEOUT": "3", "SKIALITH_WRITER": "off"}
    config = load(environment, namespace="argument", timeout=None)
    assert (config.namespace, config.timeout, config.writer) == ("argument", 3.0, "off")


def test_settings_are_hashable_and_frozen() -> None:
    assert hash(load({})) == hash(load({}))
    with pytest.raises(AttributeError):
        load({}).namespace = "other"  # type: ignore[misc]
