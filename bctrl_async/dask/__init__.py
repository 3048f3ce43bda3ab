"""A bulk stop on a cluster of dask.distributed (extra `dask`).

    from dask.distributed import Client
    from bctrl_async.dask import stop_runtimes

    async with Client("tcp://scheduler:8786", asynchronous=True) as client:
        report = await stop_runtimes(client, targets, journal="night.jsonl")

The targets are cut into chunks, which the workers of the cluster stop. Each worker has a session of
its own, with the key from its own environment. The outcomes come back as they are known, into one
report and one journal.
"""

try:
    from bctrl_async.dask._stop import stop_runtimes
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] not in {"dask", "distributed"}:
        raise
    raise ModuleNotFoundError(
        "bctrl_async.dask needs dask.distributed: python -m pip install 'bctrl-async[dask]'",
        name=_error.name,
    ) from _error

__all__ = ["stop_runtimes"]
