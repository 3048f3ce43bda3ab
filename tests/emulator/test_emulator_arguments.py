"""Invalid arguments of the emulator, of a reply and of the assertions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from bctrl_async.emulator import Emulator, Fault, Reply


def make(**options: Any) -> Callable[[], object]:  # noqa: ANN401 - invalid options.
    return partial(Emulator, **options)


def reply(status: Any = 403, **options: Any) -> Callable[[], object]:  # noqa: ANN401
    return partial(Reply, status, **options)


def call(name: str, *args: object, **options: object) -> Callable[[], object]:
    return partial(getattr(Emulator(), name), *args, **options)


INVALID: list[tuple[Callable[[], object], str]] = [
    (make(host=1), "host is 1: give str, not int"),
    (make(port=True), "port is True: give int, not bool"),
    (make(port=-1), "port is -1: give 0 to 65535"),
    (make(api_key=""), "api_key is empty: give"),
    (make(seed=0.5), "seed is 0.5: give int, not float"),
    (make(rate_limit=0), "rate_limit is 0: give 0.0001 to 1000000"),
    (make(fault_latency=float("nan")), "fault_latency is nan: give 0 to"),
    (make(on_request="x"), "on_request is 'x': give a function"),
    (make(faults=[]), r"faults is \[\]: give Mapping, not list"),
    (make(faults={"x": 0.1}), "faults has 'x': give members of Fault"),
    (make(faults={Reply(403): 1}), r"faults has Reply\(status=403"),
    (make(faults={Fault.HANG: -0.1}), r"faults\[hang\] is -0.1: give 0 to 1"),
    (make(faults={Fault.HANG: 0.6, Fault.FAILED: 0.6}), "add up to 1.2: give"),
    (call("add_runtime", "", "crm"), "workspace_id is empty"),
    (call("add_runtime", "ws", None), "alias is None: give str, not NoneType"),
    (call("add_runtime", "ws", "\ud800"), "surrogates not allowed"),
    (call("add_runtime", "ws", "crm", kind="car"), "'car': give one of browser"),
    (call("status", UUID(int=1), "crm"), r"workspace_id is UUID\(.*: give str, not UUID"),
    (call("inject", "hang"), "fault is 'hang': give Fault or Reply"),
    (call("inject", method="get"), "method is 'get': give one of POST, GET"),
    (call("poison", "ws", "crm", 403), "fault is 403: give Fault or"),
    (call("assert_stopped", "ws-1"), "no alias is given: name the runtimes"),
    (call("assert_stopped", "ws-1", ["crm"]), r"alias is \['crm'\]: give str, not list"),
    (call("assert_not_stopped", ("ws-1", "crm"), "crm"), "workspace_id is .*: give str, not tuple"),
    (reply(199), "status is 199: give 200 to 599"),
    (reply(takes_effect=1), "takes_effect is 1: give bool"),
    (reply(headers=None), "headers is None: give Mapping"),
    (reply(headers={"Retry-After": 7}), r"headers\['Retry-After'\] is 7: give str, not int"),
    (reply(headers={"a b": "x"}), "headers has 'a b': 'x', which HTTP"),
    (reply(headers={"x": "1\r\ny: 2"}), "which HTTP cannot express"),
    (reply(code="x", body={}), "code and body are both given"),
    (reply(200, code="x"), "code is for .*: give a status of 400 to 599, not 200"),
    (reply(200, body=object()), "body cannot be sent: Object of type object"),
    (reply(200, body="\ud800"), "body cannot be sent: .*surrogates not allowed"),
]


@pytest.mark.parametrize(("invalid", "message"), INVALID, ids=[text for _, text in INVALID])
def test_an_invalid_argument_is_an_error_with_advice(
    invalid: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        invalid()
