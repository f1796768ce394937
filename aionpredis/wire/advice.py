"""What is said of a connection that could not be made: no secrets, and what to do about it. Text only."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

import redis

__all__ = ["advice", "chain", "is_refusal", "scrub", "secrets"]

# AuthenticationError is a redis ConnectionError in every release, so it is asked for first. NOAUTH comes as itself,
# WRONGPASS as either, NOPERM (an ACL user who may not SELECT) as a ResponseError. All without that word.
_REFUSED = (
    redis.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)

# Redis and Valkey quote the arguments of a command that they do not know: AUTH's, where it was renamed. Cut after 128 bytes.
_QUOTED = re.compile(r",? with args beginning with:.*", re.DOTALL)

# X509_V_ERR_…, as OpenSSL numbers them in <openssl/x509_vfy.h>
_NOT_YET_VALID, _EXPIRED = 9, 10
_OTHER_NAME = 62, 64  # a host name, an IP address

_CERTIFICATE_WANTED = "the server asks for a client's certificate: ssl_certfile=, ssl_keyfile="

_REASONS = {
    "CERTIFICATE_REQUIRED": _CERTIFICATE_WANTED,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": _CERTIFICATE_WANTED,
    "UNKNOWN_CA": "the server does not know the CA of ssl_certfile=",
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know the CA of ssl_certfile=",
    "WRONG_VERSION_NUMBER": "that port is without TLS: redis://",
    "RECORD_LAYER_FAILURE": "that port is without TLS: redis://",
    "KEY_VALUES_MISMATCH": "ssl_keyfile= is not the key of ssl_certfile=",
}


def secrets(settings: Mapping[str, Any]) -> list[str]:
    """Those among the arguments of redis-py's connection."""
    return [str(value) for name in ("password", "ssl_password") if (value := settings.get(name))]


def scrub(message: str, secrets: list[str]) -> str:
    """The message without them."""
    message = _QUOTED.sub("", message)
    for secret in secrets:
        message = message.replace(secret, "***")
    return message


def is_refusal(error: Exception) -> bool:
    """Whether a server refused the user, the password or the user's rights."""
    return isinstance(error, _REFUSED) or str(error).startswith(("WRONGPASS", "NOAUTH"))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def advice(error: BaseException, *, scheme: str) -> str:
    """What may help, to be put behind the error's own text; empty if that says everything. ``scheme``: the URL's."""
    for each in chain(error):
        if isinstance(each, ssl.SSLCertVerificationError):
            return _certificate(each.verify_code)
        if isinstance(each, ssl.SSLError) and each.reason in _REASONS:
            return _REASONS[each.reason]
    text = str(error).lower()
    if "pem lib" in text:
        return "ssl_certfile= or ssl_keyfile= is not in PEM format, or the key is encrypted: ssl_password="
    if not any(word in text for word in ("timed out", "timeout", "eof", "closed", "reset")):
        return ""
    if scheme == "redis":
        return "if that port speaks TLS: rediss://"
    if scheme != "rediss":
        return ""
    return f"if that port is without TLS: redis://; if {_CERTIFICATE_WANTED}"


def _certificate(code: int) -> str:
    if code in _OTHER_NAME:
        return "connect by a name that is in the server's certificate"
    if code in (_EXPIRED, _NOT_YET_VALID):
        return "the server's certificate has to be renewed, or this machine's clock is wrong"
    return "name the certificate of the CA that signed the server's: ssl_ca_certs="
