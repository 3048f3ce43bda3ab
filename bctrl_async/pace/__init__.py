"""A rate that several processes share, so that together they keep within a server's limit.

    session = BctrlSession(pace=FilePace("/run/stop-runtimes/pace", rate=190))

A store keeps one schedule. Every process leases its slots, the times at which an attempt may start,
for 0.05 s at most: the processes take turns, and together never start more attempts in any second
than the rate allows, plus one lease. A process that dies costs one lease. No attempt waits for the
store for longer than 0.25 s: without it, a session keeps to its share of the rate, and logs a
warning. If the store refuses its first lease (a wrong password), calls raise `BctrlConfigError`.

`FilePace` serves the processes of one machine, `bctrl_async.redis.RedisPace` many machines.
"""

from bctrl_async.pace._file import FilePace
from bctrl_async.pace._leases import Pace

__all__ = ["FilePace", "Pace"]
