"""Map aiohttp's exceptions to failures, and remove the API key from them."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import ssl
from typing import TypeVar

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from msgspec.structs import replace
from multidict import CIMultiDict, CIMultiDictProxy

from bctrl_async._http.redaction import bearer_key, detached, sanitize
from bctrl_async._http.request import Operation, Request
from bctrl_async._http.response import ADVICE_BY_STATUS, MIB
from bctrl_async._kinds import Failure, Kind, Repeat
from bctrl_async._lifetime import is_cancelled
from bctrl_async.errors import format_duration, session_closed

_T = TypeVar("_T")

AIOHTTP_ERRORS = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
"""The exceptions that aiohttp may raise for a request; ValueError is for arguments."""

_ConnectError = (
    aiohttp.ClientConnectorError
    | aiohttp.ClientHttpProxyError
    | aiohttp.ServerFingerprintMismatch
)
_ADVICE_BY_CLASS: dict[type[BaseException], str] = {
    aiohttp.ClientProxyConnectionError: (
        "Check the URL of the proxy and the network; retrying is safe"
    ),
    aiohttp.ClientConnectorCertificateError: (
        "Check the host; trust a private CA with ssl= or --ca-file"
    ),
    ValueError: (
        "Check the base URL and the proxies; netrc must not name the host of the API"
    ),
}
_CURES = {
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Raise the system's limit of open files (sysctl fs.file-max)",
    errno.ENOBUFS: "Free memory of the machine",
    errno.ENOMEM: "Free memory of the machine",
    errno.EADDRNOTAVAIL: (
        "Check the host, and widen the range of local ports "
        "(sysctl net.ipv4.ip_local_port_range)"
    ),
}
"""The system's errors that are about the machine, not the server, and their cures."""
_PROXY_RULES = "Check that the proxy allows and can reach the host of the API"

_tells_of_threads = re.compile("new thread|after (interpreter )?shutdown").search
_has_only_words = re.compile("[A-Za-z ,.]+").fullmatch
_NO_HEADERS = CIMultiDictProxy[str](CIMultiDict())


def failed_request(
    error: BaseException, call: Request[_T], authorization: str, *, is_closed: bool
) -> Failure | None:
    """Return the failure of a request without a response; None to raise the exception.

    `is_closed` is True if the pool is closed.
    """
    cause = _scrub(error, bearer_key(authorization))
    if is_closed and isinstance(cause, RuntimeError | AssertionError):
        # The pool may be closed while the key is fetched, or a tracer waits.
        # Then a check or an assertion of aiohttp fails.
        return replace(Failure.of(session_closed()), in_doubt=call.is_connected)
    if is_closed and isinstance(cause, asyncio.CancelledError) and not is_cancelled():
        # Closing the pool cancels a DNS lookup, and aiohttp raises CancelledError in
        # every task that waits for it.
        summary = "the DNS lookup was still in progress"
        return Failure(kind=Kind.LOST, summary=summary, in_doubt=call.is_connected)
    lack = _lack(cause, call)
    if lack is not None or not isinstance(cause, AIOHTTP_ERRORS):
        return lack
    kind, summary = _describe(cause, call)
    advice = _ADVICE_BY_CLASS.get(type(cause))
    if isinstance(cause, aiohttp.ClientHttpProxyError):
        advice = ADVICE_BY_STATUS.get(cause.status, _PROXY_RULES)
    # None stands for what the kind says.
    in_doubt = None
    if kind is Kind.MISCONFIGURED:
        # A tracer or a middleware may raise a ValueError after the answer.
        in_doubt = call.is_connected
    return Failure(
        kind=kind, summary=summary, advice=advice, in_doubt=in_doubt, cause=cause
    )


def _lacks_thread(error: BaseException) -> bool:
    """Return True if no thread could be started."""
    # Python has no class of its own for this error.
    return isinstance(error, RuntimeError) and bool(_tells_of_threads(str(error)))


def partial_response(
    status: int,
    cause: BaseException | None,
    limit: aiohttp.ClientTimeout,
    operation: Operation[_T],
) -> Failure:
    """Return the failure of a 2xx whose body was cut short, slow or too long."""
    kind = Kind.UNREADABLE
    problem = "was truncated or cannot be decompressed"
    if cause is None:
        # Reading ended at the limit, not at an error.
        problem = f"has more than {operation.max_body // MIB} MiB"
    elif isinstance(cause, TimeoutError):
        kind = Kind.SLOW_BODY
        problem = f"took more than {format_duration(limit.total)}"
    elif operation.repeat is Repeat.READ:
        # A read is retried, as after a lost connection; a stop was accepted already.
        kind = Kind.CUT_SHORT
    summary = f"the server answered {status}, but the body {problem}"
    return Failure(kind=kind, summary=summary, status=status, cause=cause)


def _scrub(error: BaseException, key: str) -> BaseException:
    """Remove what may contain the key or the credentials of a proxy from an error."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        # The message may be an answer that was cut short.
        error.message = "Server disconnected"
        error.args = (error.message,)
    elif isinstance(error, aiohttp.ClientHttpProxyError):
        url = error.request_info.real_url.with_user(None)
        info = aiohttp.RequestInfo(url, error.request_info.method, _NO_HEADERS, url)
        message = sanitize(error.message, key)
        return type(error)(info, (), status=error.status, message=message)
    elif isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        # A ClientResponseError has the headers of the request, and in them the key.
        return HttpProcessingError(message=sanitize(error.message, key))
    elif isinstance(error, aiohttp.ClientConnectorError):
        connection_key, reason = error.args
        # The frames of the reason's traceback refer to the reason: a cycle.
        detached(reason)
        if connection_key.proxy is not None:
            # If TLS fails in a tunnel, the error names the proxy with its credentials.
            connection_key = connection_key._replace(proxy=None, proxy_auth=None)
            return type(error)(connection_key, reason)
    elif isinstance(error, ValueError):
        # The text may quote a part of a proxy's URL, such as the password.
        text = str(error)
        if not _has_only_words(text):
            text = f"{type(error).__name__} (not shown)"
        return ValueError(text)
    return detached(error)


def _lack(error: BaseException, call: Request[_T]) -> Failure | None:
    """Return the failure of a connection that the machine could not make, or None."""
    if _lacks_thread(error):
        # aiohttp looks up hosts in threads; a borrowed pool may need others, too.
        return Failure(
            kind=Kind.NO_RESOURCES,
            summary=f"no connection: the DNS lookup got no thread: {error}",
            advice="Raise the limit of threads and processes (ulimit -u)",
            in_doubt=call.is_connected,
            cause=error,
        )
    if not isinstance(error, aiohttp.ClientConnectorError):
        return None
    number = _system_number(error.os_error)
    if isinstance(error, aiohttp.ClientConnectorDNSError) and number not in _CURES:
        # Some resolvers that get no file descriptor say that a host is not known.
        number = _number_of_open_error()
    if number not in _CURES:
        return None
    return Failure(
        kind=Kind.NO_RESOURCES,
        summary=f"no connection: {os.strerror(number)}",
        advice=f"{_CURES[number]}, or lower max_connections (--concurrency)",
        cause=error,
    )


def _number_of_open_error() -> int:
    """Return the number of the error if no socket can be opened now, or 0."""
    try:
        socket.socket().close()
    except OSError as error:
        return _system_number(error)
    return 0


def _describe(  # noqa: PLR0911 - a table.
    error: BaseException, call: Request[_T]
) -> tuple[Kind, str]:
    """Return the kind of an error, and a summary with none of aiohttp's internals."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            limit = format_duration(call.limit.connect)
            return Kind.SLOW_CONNECTION, f"no connection within {limit}"
        case TimeoutError():
            return (
                Kind.SLOW_ANSWER,
                f"no response within {format_duration(call.limit.total)}",
            )
        # These are raised before any part of the request is sent. A certificate error
        # is also a ValueError.
        case (
            aiohttp.ServerFingerprintMismatch()
            | aiohttp.ClientConnectorCertificateError()
        ):
            return Kind.UNTRUSTED, f"no connection: {_connection_problem(error)}"
        case aiohttp.ClientHttpProxyError() | aiohttp.ClientConnectorError():
            return Kind.NO_CONNECTION, f"no connection: {_connection_problem(error)}"
        case ValueError():
            return Kind.MISCONFIGURED, f"aiohttp rejected the request: {error}"
        case HttpProcessingError():
            return Kind.NOT_HTTP, f"invalid HTTP response: {error.message}"
    return (
        Kind.LOST,
        f"connection lost before a response: {str(error) or type(error).__name__}",
    )


def _connection_problem(error: _ConnectError) -> str:
    """Return where a connection failed, and why."""
    match error:
        case aiohttp.ClientHttpProxyError():
            return f"the proxy answered {error.status} {error.message}".rstrip()
        case aiohttp.ServerFingerprintMismatch():
            reason = "the certificate has another fingerprint"
        case aiohttp.ClientConnectorCertificateError():
            reason = _reason(error.certificate_error)
        case aiohttp.ClientProxyConnectionError():
            return f"proxy {error.host}:{error.port}: {_reason(error.os_error)}"
        case _:
            reason = _reason(error.os_error)
    return f"{error.host}:{error.port}: {reason}"


def _reason(error: Exception) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"the certificate is not trusted: {error.verify_message}"
        case ssl.SSLError(reason="WRONG_VERSION_NUMBER"):
            return "it does not speak TLS"
        case OSError() if _system_number(error):
            # The text of asyncio would repeat the address.
            return os.strerror(_system_number(error))
    return getattr(error, "strerror", None) or str(error)


def _system_number(error: OSError) -> int:
    """Return the number that the system has given to an error, or 0."""
    # The numbers of TLS and of name look-ups are their own.
    number = error.errno
    is_foreign = isinstance(error, ssl.SSLError | socket.gaierror)
    if is_foreign or number is None or number not in errno.errorcode:
        return 0
    return number
