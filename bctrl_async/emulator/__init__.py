"""A local server for testing clients: the bctrl contract, with faults.

It imports nothing from the client and restates the wire format in plain dicts, so that
a bug cannot hide on both sides. Runtimes follow ``docs/contract/openapi.yaml``; error
responses follow ``errors.md`` beside it, called *contract errors.md* in this reference.
"""

from bctrl_async.emulator._assertions import ReceivedRequest
from bctrl_async.emulator._contract import WireRuntime
from bctrl_async.emulator._faults import Fault
from bctrl_async.emulator._replies import Reply
from bctrl_async.emulator._server import Emulator

__all__ = ["Emulator", "Fault", "ReceivedRequest", "Reply", "WireRuntime"]
