"""A rate that several processes share, so that together they keep within a server's limit.

    session = BctrlSession(pace=FilePace("/run/stop-runtimes/pace", rate=190))

Every process leases slots of one schedule, for 0.05 s at most. So the processes take turns, and
together never start more attempts than the rate allows in any second, plus one lease. A process
that dies costs one lease. No attempt waits for the store for longer than 0.25 s: a session that
cannot ask it goes on with its share of the rate, and logs a warning. If the store refuses the
session before its first lease, such as for a wrong password, calls raise `BctrlConfigError`.

`FilePace` serves the processes of one machine, `bctrl_async.redis.RedisPace` many machines.
"""

from bctrl_async.pace._file import FilePace
from bctrl_async.pace._leases import Pace

__all__ = ["FilePace", "Pace"]
