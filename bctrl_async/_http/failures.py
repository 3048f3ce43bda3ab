"""Map aiohttp's exceptions to our own errors, and remove the API key from them."""

from __future__ import annotations

import errno
import os
import re
import ssl
from typing import TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict, CIMultiDictProxy

from bctrl_async._http.redaction import bearer_key, detached, sanitize
from bctrl_async._http.request import Operation, Request
from bctrl_async._http.response import ADVICE, MIB
from bctrl_async.errors import (
    BctrlConfigError,
    BctrlError,
    BctrlNetworkError,
    BctrlResponseError,
    BctrlTimeoutError,
    format_duration,
)

_T = TypeVar("_T")

AIOHTTP_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
"""The exceptions that aiohttp may raise for a request; ValueError is for bad arguments."""

# These are raised before any part of the request is sent.
_ConnectError = (
    aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError | aiohttp.ServerFingerprintMismatch
)
_CERTIFICATE_ERRORS = (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch)

_PROXY = "Check the URL of the proxy and the network; retrying is safe"
_TLS = "Check the host; if its CA is a private one, trust that"
_PROXY_RULES = "Check that the proxy allows and can reach the host of the API"

_is_words = re.compile("[A-Za-z ,.]+").fullmatch
_NO_HEADERS = CIMultiDictProxy[str](CIMultiDict())


def failed_request(error: Exception, call: Request[_T], authorization: str) -> BctrlError:
    """Return our error for one of `AIOHTTP_ERRORS` that came instead of a response."""
    cause = _scrub(error, bearer_key(authorization))
    mapped = _map_error(cause, call)
    mapped.__cause__ = cause
    return mapped


def is_untrusted(error: BctrlError) -> bool:
    """Return True if there was no connection because the server's certificate is not trusted."""
    return isinstance(error.__cause__, _CERTIFICATE_ERRORS)


def partial_response(
    status: int, cause: BaseException | None, limit: aiohttp.ClientTimeout, operation: Operation[_T]
) -> BctrlError:
    """Return the error for an incomplete 2xx body; `cause` is None for a body beyond `max_body`."""
    kind: type[BctrlNetworkError] = BctrlResponseError
    problem = "was truncated or cannot be decompressed"
    if cause is None:
        problem = f"has more than {operation.max_body // MIB} MiB"
    elif isinstance(cause, TimeoutError):
        kind, problem = BctrlTimeoutError, f"took more than {format_duration(limit.total)}"
    elif not operation.stops:
        # A GET may be sent again, but not a stop: the server has accepted it.
        kind = BctrlNetworkError
    summary = f"the server answered {status}, but the body {problem}"
    error = kind(summary, may_have_stopped=True, status=status)
    error.__cause__ = cause
    return error


def _scrub(error: Exception, key: str) -> BaseException:
    """Remove the parts of an error that may contain the key or the credentials of a proxy."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        error.message = "Server disconnected"
        error.args = (error.message,)
    elif isinstance(error, aiohttp.ClientHttpProxyError):
        url = error.request_info.real_url.with_user(None)
        info = aiohttp.RequestInfo(url, error.request_info.method, _NO_HEADERS, url)
        message = sanitize(error.message, key) or ""
        return type(error)(info, (), status=error.status, message=message)
    elif isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        # A ClientResponseError has the headers of the request, and in them the key.
        return HttpProcessingError(message=sanitize(error.message, key) or "")
    elif isinstance(error, aiohttp.ClientConnectorError):
        place, reason = error.args
        # The frames of the reason's traceback refer to the reason, which is a reference cycle.
        detached(reason)
        if place.proxy is not None:
            # If TLS fails in a tunnel, the error names the proxy with its credentials.
            return type(error)(place._replace(proxy=None, proxy_auth=None), reason)
    elif isinstance(error, ValueError):
        # The text may quote a part of a proxy's URL, such as the password.
        words = str(error)
        return ValueError(words if _is_words(words) else f"{type(error).__name__} (not shown)")
    return detached(error)


def _map_error(error: BaseException, call: Request[_T]) -> BctrlError:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return BctrlTimeoutError(f"no connection within {format_duration(call.limit.connect)}")
    if isinstance(error, TimeoutError):
        return BctrlTimeoutError(
            f"no response within {format_duration(call.limit.total)}", may_have_stopped=True
        )
    # This comes before ValueError, since a certificate error is also a ValueError.
    if isinstance(error, _ConnectError):
        return _no_connection(error)
    if isinstance(error, ValueError):
        return BctrlConfigError(
            f"aiohttp rejected the request: {error}",
            advice="Check the base URL and the proxies; netrc must not name the host of the API",
            # A tracer or a middleware may raise a ValueError after the answer.
            may_have_stopped=call.is_connected,
        )
    if isinstance(error, HttpProcessingError):
        return BctrlResponseError(f"invalid HTTP response: {error.message}", may_have_stopped=True)
    return BctrlNetworkError(
        f"connection lost before a response: {str(error) or type(error).__name__}",
        may_have_stopped=True,
    )


def _no_connection(error: _ConnectError) -> BctrlNetworkError:
    """Return the error of a failed connection; its text has none of aiohttp's internals."""
    advice = None
    match error:
        case aiohttp.ClientHttpProxyError():
            text = f"the proxy answered {error.status} {error.message}".rstrip()
            advice = ADVICE.get(error.status, _PROXY_RULES)
        case aiohttp.ClientProxyConnectionError():
            text, advice = f"proxy {error.host}:{error.port}: {_reason(error.os_error)}", _PROXY
        case aiohttp.ClientConnectorCertificateError():
            text, advice = f"{error.host}:{error.port}: {_reason(error.certificate_error)}", _TLS
        case aiohttp.ServerFingerprintMismatch():
            text = f"{error.host}:{error.port}: the certificate has another fingerprint"
        case _:
            text = f"{error.host}:{error.port}: {_reason(error.os_error)}"
    return BctrlNetworkError(f"no connection: {text}", advice=advice)


def _reason(error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"the certificate is not trusted: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "it does not speak TLS"
        case OSError() if not isinstance(error, ssl.SSLError) and error.errno in errno.errorcode:
            # The text of asyncio would repeat the address.
            return os.strerror(error.errno or 0)
    return getattr(error, "strerror", None) or str(error)
