"""Credentials and TLS for nats-py, from the settings and the URL."""

from __future__ import annotations

import ssl
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..config import Config
from ..errors import ConfigurationError


def access_options(config: Config, url: str) -> dict[str, Any]:
    """Connect options of nats-py for one or more comma-separated URLs. Raises ``ConfigurationError``.

    As options and not in the URL: nats-py does not decode percent escapes there, and sends no credentials to servers that
    it learned of from the cluster.
    """
    options: dict[str, Any] = {}
    first = urlsplit(url.split(",", maxsplit=1)[0].strip())
    if first.username is not None and first.password is not None:
        options["user"], options["password"] = (
            unquote(first.username),
            unquote(first.password),
        )
    elif first.username is not None:
        options["token"] = unquote(first.username)
    if config.nats_creds:
        _check_keys("SKIALITH_NATS_CREDS", config.nats_creds, ("BEGIN NATS USER JWT", "BEGIN USER NKEY SEED"))
        options["user_credentials"] = config.nats_creds
    if config.nats_nkey_seed:
        _check_keys("SKIALITH_NATS_NKEY_SEED", config.nats_nkey_seed, ())
        options["nkeys_seed"] = config.nats_nkey_seed
    if wants_tls(url) or config.nats_tls_ca or config.nats_tls_cert:
        options["tls"] = _tls_context(config)
    return options


def _check_keys(setting: str, path: str, parts: tuple[str, ...]) -> None:
    """nats-py reads a credentials file without these parts for ever, and needs a package that it does not ask for."""
    try:
        text = Path(path).read_text("utf-8", "replace")
    except OSError as error:
        raise ConfigurationError(f"{setting} cannot be read: {error}") from error
    missing = [part for part in parts if part not in text]
    if missing:
        raise ConfigurationError(f"{setting}: {path} is no credentials file, it has no line `{missing[0]}`")
    if find_spec("nkeys") is None:
        raise ConfigurationError(f"{setting} needs the package nkeys: pip install nkeys")


def _tls_context(config: Config) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=config.nats_tls_ca)
        if config.nats_tls_cert:
            context.load_cert_chain(config.nats_tls_cert, config.nats_tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"the TLS files cannot be used ({error}): check SKIALITH_NATS_TLS_CA, SKIALITH_NATS_TLS_CERT and "
            "SKIALITH_NATS_TLS_KEY"
        ) from error
    return context


def wants_tls(url: str) -> bool:
    """Whether the URL asks for TLS."""
    return url.strip().startswith("tls://")


def bare(url: str) -> str:
    """One URL without its credentials."""
    parts = urlsplit(url.strip())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
