"""Owned pools and their fast path. Only this folder uses private parts of aiohttp."""

from bctrl_async._http.fast.answer import PlainAnswer, loop_of, on_connection
from bctrl_async._http.fast.exchange import Exchange, FastPath, close_connection
from bctrl_async._http.fast.rehearsal import NO_CONTENT_TYPE, open_pool

__all__ = ["NO_CONTENT_TYPE", "Exchange", "FastPath", "PlainAnswer", "close_connection"]
__all__ += ["loop_of", "on_connection", "open_pool"]
