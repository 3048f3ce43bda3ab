"""The input of a bulk stop: any iterable of targets, read one item at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sized,
)
from itertools import islice
from uuid import UUID

from msgspec.structs import replace

from bctrl_async import _config, _refs
from bctrl_async._calls.call import as_error
from bctrl_async._calls.results import running_of
from bctrl_async._lifetime import is_cancelled
from bctrl_async.errors import BctrlConfigError, BctrlResponseError, quote
from bctrl_async.filters import Selection
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import StopOutcome

Target = RuntimeRef | Runtime | tuple[str | UUID, str]
Targets = Iterable[Target] | AsyncIterable[Target]

_MAX_BLOCKING = 0.005
"""Seconds for which a generator may block the loop; a slower generator is awaited."""
_EXPECTED = "an iterable or async iterable of (workspace id, alias)"


class Input:
    """An input that workers read; raises BctrlConfigError if it is unsuitable.

    `is_awaited` is True if the input is async, or a generator that took long for its
    last item. `count` items were read; `length` is the number of all items, if known.
    `error` is the exception of the input, and `selection` the list of a workspace once
    it is fetched.
    """

    def __init__(self, targets: Targets) -> None:
        check_targets(targets)
        self._async_items: AsyncIterator[object] | None = None
        self._items: Iterator[object] | None = None
        if isinstance(targets, AsyncIterable):
            self._async_items = aiter(targets)
        else:
            self._items = iter(targets)
        self._collection: Sized | None = None
        self.length: int | None = None
        if isinstance(targets, Sized):
            self._collection = targets
            self.length = len(targets)
        self.selection: Selection | None = None
        if isinstance(targets, Selection):
            self.selection = targets
        self._is_prepared = False
        self.is_awaited: bool = self._async_items is not None
        self.count: int = 0
        self.error: BaseException | None = None
        # This is True once nothing more is read.
        self.is_closed: bool = False
        self._at_end = False
        # A worker that only sends a parked stop does not wait for a reader.
        self._list_lock = asyncio.Lock()
        self._reader_lock = asyncio.Lock()

    @property
    def is_exhausted(self) -> bool:
        """True once every item was read."""
        if self.length is None or self._collection is None:
            return self._at_end
        # A list may have grown since its length was taken.
        return self.count >= max(self.length, len(self._collection))

    def end(self) -> None:
        """Stop reading, except for the items that a list had when the run started."""
        if self._items is None or self.length is None:
            self.is_closed = True
        else:
            # A callback may add to the list for ever, so its first length counts.
            self._items = islice(self._items, max(self.length - self.count, 0))

    def with_listed(self, outcome: StopOutcome) -> StopOutcome:
        """Return an outcome with the listed runtime if no request can have ended it."""
        if self.selection is None:
            return outcome
        runtime = self.selection.running.get(outcome.target.alias)
        if runtime is None:
            return outcome
        if outcome.runtime is not None and outcome.runtime.id != runtime.id:
            # It took the alias between the list and the stop.
            self.selection.running[outcome.target.alias] = outcome.runtime
        if not outcome.result.has_no_effect:
            return outcome
        running = running_of(outcome.result, runtime)
        # `at` is the time of the list: another run may have stopped it since.
        return replace(outcome, runtime=runtime, running=running, at=self.selection.at)

    async def prepare(self, on_list: Callable[[Selection], Awaitable[None]]) -> None:
        """Fetch a workspace's list, if that is the input; pass it to `on_list`, once.

        No item is read before. If a worker is cancelled here, the next starts again.
        """
        async with self._list_lock:
            if not self._is_prepared:
                await self._fetch_selection()
                if self.selection is not None:
                    await on_list(self.selection)
                self._is_prepared = True

    async def _fetch_selection(self) -> None:
        """Set `selection`, in a subclass that fetches it."""

    async def next(self) -> tuple[int, object] | None:
        """Return the index of the next item and the item, or None at the end."""
        async with self._reader_lock:
            if self.is_closed or self._async_items is None:
                # The event loop gets a turn before each item of a slow generator.
                await asyncio.sleep(0)
                return self.next_nowait()
            try:
                item = await anext(self._async_items)
            except StopAsyncIteration:
                self._close()
            except BaseException as error:  # noqa: BLE001 - the run raises it.
                self._close_unless_cancelled(error)
            else:
                self.count += 1
                return self.count - 1, item
            return None

    def next_nowait(self) -> tuple[int, object] | None:
        """Return the next item, as `next` does, of an input that is not async."""
        if self.is_closed or self._items is None:
            return None
        started = time.monotonic()
        try:
            item = next(self._items)
            self.is_awaited = (
                self.length is None and time.monotonic() - started > _MAX_BLOCKING
            )
        except StopIteration:
            self._close()
        except BaseException as error:  # noqa: BLE001 - the run raises it.
            self._close(error)
        else:
            self.count += 1
            return self.count - 1, item
        return None

    def _close_unless_cancelled(self, error: BaseException) -> None:
        """Close the input with its error, but raise a cancellation of the reader."""
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            raise error
        self._close(error)
        if isinstance(error, GeneratorExit):
            raise error

    def _close(self, error: BaseException | None = None) -> None:
        """Read nothing more, at the end of the input or after its error."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            error = as_error(error, "the input")
        self.error = error
        self.is_closed = True
        self._at_end = error is None
        # The iterator may have a file open, which closes when the iterator is dropped.
        self._items = None


class Listing(Input):
    """An input that is fetched as a list when the run starts."""

    def __init__(self, fetch: Callable[[], Awaitable[Selection]]) -> None:
        super().__init__(())
        # There are no items and no length before the list.
        self._items = self.length = None
        self._fetch = fetch

    async def _fetch_selection(self) -> None:
        """Fetch the list, unless that was done or reading has ended."""
        if self.selection is None and not self.is_closed:
            try:
                selection = await self._fetch()
            except BaseException as error:  # noqa: BLE001 - the run raises it.
                self._close_unless_cancelled(error)
            else:
                self.selection = self._collection = selection
                self._items = iter(selection)
                self.length = len(selection)


def check_targets(targets: object) -> None:
    """Raise BctrlConfigError for a single target, a text, or what is not iterable."""
    match targets:
        # A list of two names is not matched: `check_first` rejects its items.
        case Runtime() | RuntimeRef() | tuple((str() | UUID(), str() | UUID())):
            raise BctrlConfigError(
                f"invalid targets: expected {_EXPECTED}, not a single target",
                advice="Pass a list, such as [('ws-1', 'crm')]",
                argument="targets",
            )
    # `iter` also takes an object that has only `__getitem__`.
    has_items = hasattr(targets, "__getitem__")
    can_iterate = has_items or isinstance(targets, Iterable | AsyncIterable)
    if not can_iterate or isinstance(targets, str | bytes | Mapping):
        raise _config.invalid_type("targets", type(targets), _EXPECTED)


def check_first(item: object) -> None:
    """Raise BctrlConfigError if the first item, so probably each, has a wrong type."""
    # An exception stands for an unreadable item, which `target_of` raises.
    if not isinstance(item, Exception) and len(_refs.parts(item)) != _refs.PAIR:
        raise BctrlConfigError(
            f"invalid targets: expected {_EXPECTED}; the first item is {quote(item)}",
            advice="Pass pairs, such as [('ws-1', 'crm')]; nothing was stopped",
            reason_class="invalid_input",
            argument="targets",
        )


def target_of(item: object) -> RuntimeRef:
    """Return an item of an input as a target; raise the reason if it is not a target.

    An item that is a `ValueError` becomes the reason and the cause of a
    BctrlConfigError. A listed runtime that could not be parsed raises its own error.
    """
    if isinstance(item, BctrlResponseError):
        raise item
    if isinstance(item, ValueError):
        raise BctrlConfigError(
            f"invalid target {quote(item)}: {item!s:.200}",
            reason_class="invalid_input",
        ) from item
    return _refs.as_target(item)


def best_effort_ref(item: object) -> RuntimeRef:
    """Return the closest reference to an item that is not a valid target."""
    if isinstance(item, BctrlResponseError):
        return RuntimeRef(item.workspace_id or "", item.alias or "")
    match _refs.parts(item):
        case (workspace_id, alias):
            return RuntimeRef(_refs.as_text(workspace_id), _refs.as_text(alias))
    return RuntimeRef("", _refs.as_text(item))
