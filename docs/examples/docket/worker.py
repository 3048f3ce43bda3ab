"""A worker that runs the bulk stops of the queue.

    BCTRL_API_KEY=… python docs/examples/docket/worker.py

When it receives SIGTERM or SIGINT it sends nothing new, waits for the requests in
flight, and puts its stops back into the queue. When it is killed, another worker
resumes them after `REDELIVERY`. The command `docket worker` would wait until its stops
have ended.
"""

import asyncio
import logging
import signal
from contextlib import suppress
from datetime import timedelta

from docket import Worker
from stops import docket, shut_down

REDELIVERY = timedelta(seconds=30)
"""Time without a sign of life after which a worker counts as dead. docket gives none
while it is shut down, so this is longer than `DRAIN`."""


async def main() -> None:
    async with docket, Worker(docket, redelivery_timeout=REDELIVERY) as worker:
        running = asyncio.create_task(worker.run_forever())

        def end() -> None:
            running.cancel()
            shut_down()

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, end)
        with suppress(asyncio.CancelledError):
            await running


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(main())
