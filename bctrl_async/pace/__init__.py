"""A rate that several processes share, to keep within a server's limit together.

    session = BctrlSession(rate=FilePace("/run/stop-runtimes/pace", rate=190))

A pace hands out slots, each of which allows one attempt. A session acquires as many as
it can use, but 0.05 s worth of them at most, or a single slot: the processes take
turns, and a process that dies costs two such leases. While the pace fails, a session
goes on somewhat slower than before, and logs a warning. If the store refuses the first
request (a wrong password), calls raise `BctrlConfigError`.

`FilePace` serves the processes of one machine, `bctrl_async.redis.RedisPace` many
machines. For another store, write a subclass of `Pace`.
"""

from bctrl_async.pace._file import FilePace
from bctrl_async.pace._leases import Pace

__all__ = ["FilePace", "Pace"]
