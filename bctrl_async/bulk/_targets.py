"""The input of a bulk stop: any iterable of targets, read one item at a time."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sized,
)
from collections.abc import Set as AbstractSet
from contextlib import suppress
from uuid import UUID

from msgspec.structs import replace

from bctrl_async import _config
from bctrl_async._calls.call import as_failure, is_cancelled
from bctrl_async._http.request import plain_text
from bctrl_async.errors import BctrlConfigError, BctrlResponseError, quote
from bctrl_async.filters import FoundTargets
from bctrl_async.models import Runtime, RuntimeRef
from bctrl_async.outcomes import StopOutcome, StopResult, state_of

Target = RuntimeRef | Runtime | tuple[str | UUID, str]
Targets = Iterable[Target] | AsyncIterable[Target]

_PAIR = 2
_WITHOUT_EFFECT = frozenset({StopResult.REJECTED, StopResult.NOT_SENT})
_MAX_REASON = 200
_EXPECTED = "an iterable or async iterable of (workspace id, alias)"


class Input:
    """An input that any number of workers read.

    Args:
        targets: The targets.

    Attributes:
        is_async: True if the next item may have to be awaited.
        count: The number of items read.
        error: The error that the input raised, or None.
        closed: True once nothing more is read.
        length: The number of items, None if unknown.
        found: What is found in the list, once that is there.

    Raises:
        BctrlConfigError: `targets` cannot be iterated over, or is a single target.
    """

    def __init__(self, targets: Targets) -> None:
        self._awaited: AsyncIterator[object] | None = None
        self._plain: Iterator[object] | None = None
        check_targets(targets)
        if isinstance(targets, AsyncIterable):
            self._awaited = aiter(targets)
        else:
            self._plain = iter(targets)
        self._sized: Sized | None = targets if isinstance(targets, Sized) else None
        self.length: int | None = None if self._sized is None else len(self._sized)
        self.found: FoundTargets | None = targets if isinstance(targets, FoundTargets) else None
        self.is_async: bool = self._awaited is not None
        self.count: int = 0
        self.error: BaseException | None = None
        self.closed: bool = False
        self._at_end = False
        self._only_known = False
        self._lock = asyncio.Lock()

    @property
    def can_drain(self) -> bool:
        """True if the rest can be read without waiting, and has an end."""
        return self._plain is not None and self.length is not None

    @property
    def exhausted(self) -> bool:
        """True once every item was read."""
        if self.length is None or self._sized is None:
            return self._at_end
        # A list may have grown since its length was taken.
        return self.count >= max(self.length, len(self._sized))

    def end(self) -> None:
        """Stop reading, except for the items that a list had when the run started."""
        if self.can_drain:
            # It may grow with each outcome.
            self._only_known = True
        else:
            self.closed = True

    def with_listed(self, outcome: StopOutcome) -> StopOutcome:
        """Return an outcome with the runtime as listed, if no request can have changed it."""
        if self.found is None or outcome.result not in _WITHOUT_EFFECT:
            return outcome
        runtime = self.found.running.get(outcome.target.alias)
        if runtime is None:
            return outcome
        state = state_of(outcome.result, runtime, outcome.error)
        # Another run may have stopped it since.
        return replace(outcome, runtime=runtime, state=state, at=self.found.at)

    async def next(self) -> tuple[int, object] | None:
        """Return the index of the next item and the item, or None at the end."""
        async with self._lock:
            if self.closed or self._awaited is None:
                return None
            try:
                item = await anext(self._awaited)
            except StopAsyncIteration:
                self.closed = self._at_end = True
                return None
            except BaseException as error:  # noqa: BLE001 - the run raises it.
                self._fail_unless_cancelled(error)
                return None
            self.count += 1
            return self.count - 1, item

    def next_nowait(self) -> tuple[int, object] | None:
        """Return the next item, as `next` does, of an input that is not async."""
        if self._only_known and self.length is not None and self.count >= self.length:
            self.closed = True
            # It may have a file open.
            self._plain = iter(())
        if self.closed or self._plain is None:
            return None
        try:
            item = next(self._plain)
        except StopIteration:
            self.closed = self._at_end = True
            return None
        except BaseException as error:  # noqa: BLE001 - the run raises it.
            self._fail(error)
            return None
        self.count += 1
        return self.count - 1, item

    def _fail_unless_cancelled(self, error: BaseException) -> None:
        """Close the input with its error, but raise the cancellation of the reading task."""
        if isinstance(error, GeneratorExit) or (
            isinstance(error, asyncio.CancelledError) and is_cancelled()
        ):
            raise error
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Close the input with its error."""
        if isinstance(error, asyncio.CancelledError):
            error = as_failure(error, "the input")
        self.error = error
        self.closed = True


class Listing(Input):
    """An input that is fetched as a list when its first item is read."""

    def __init__(self, fetch: Callable[[], Awaitable[FoundTargets]]) -> None:
        super().__init__(())
        self.length = None
        self.is_async = True
        self._fetch = fetch

    @property
    def can_drain(self) -> bool:
        """True once the list is fetched."""
        return not self.is_async

    async def next(self) -> tuple[int, object] | None:
        """Return the index of the next item and the item, or None at the end."""
        async with self._lock:
            if not self.is_async or self.closed:
                return self.next_nowait()
            try:
                items = await self._fetch()
            except BaseException as error:  # noqa: BLE001 - the run raises it.
                self._fail_unless_cancelled(error)
                return None
            self.is_async, self._plain, self.length = False, iter(items), len(items)
            self._sized = items
            self.found = items
            return self.next_nowait()


def check_targets(targets: object) -> None:
    """Check that these are targets, as far as it can be seen without reading one.

    Raises:
        BctrlConfigError: They cannot be iterated over, or are a single target or text, which can.
    """
    # A list of two names may as well be a list whose items are no targets.
    if isinstance(targets, RuntimeRef | Runtime) or (
        isinstance(targets, tuple) and _is_pair(targets)
    ):
        raise BctrlConfigError(
            f"invalid targets: expected {_EXPECTED}, not a single target",
            advice="Pass a list, such as [('ws-1', 'crm')]",
            argument="targets",
        )
    # Of a sequence, `iter` needs no more than its items.
    can_iterate = isinstance(targets, Iterable | AsyncIterable) or hasattr(targets, "__getitem__")
    if not can_iterate or isinstance(targets, str | bytes | Mapping):
        raise _config.invalid_type("targets", targets, _EXPECTED)


def check_first(item: object) -> None:
    """Check that the first item of an input is a target, or stands for an invalid one.

    Raises:
        BctrlConfigError: It is of another type, as all others may be.
    """
    if not isinstance(item, Runtime | Exception) and len(_parts(item)) != _PAIR:
        raise BctrlConfigError(
            f"invalid targets: expected {_EXPECTED}; the first item is {quote(item)}",
            advice="Pass pairs, such as [('ws-1', 'crm')]; nothing was stopped",
            reason_class="invalid_input",
            argument="targets",
        )


def _is_pair(values: tuple[object, ...]) -> bool:
    return len(values) == _PAIR and all(isinstance(value, str | UUID) for value in values)


def as_target(item: object) -> RuntimeRef:
    """Return an item as a target.

    Any pair is a target, such as a row of a CSV file or of a database.

    Raises:
        BctrlConfigError: The item is not a pair of strings. If it is a `ValueError`, its text is
            the reason, and it is the cause.
        BctrlResponseError: The item is a listed runtime that could not be parsed.
    """
    # Most items are RuntimeRefs or tuples; this check costs a third of the general one.
    if (type(item) is RuntimeRef or type(item) is tuple) and len(item) == _PAIR:
        workspace_id, alias = item
        if type(workspace_id) is str and type(alias) is str:
            return item if type(item) is RuntimeRef else RuntimeRef(workspace_id, alias)
    match item:
        case Runtime():
            return RuntimeRef(str(item.workspace_id), item.alias)
        case BctrlResponseError():
            raise item
        case ValueError():
            raise BctrlConfigError(
                f"invalid target {quote(item)}: {str(item)[:_MAX_REASON]}",
                reason_class="invalid_input",
            ) from item
    match _parts(item):
        case (str() | UUID() as workspace_id, str() as alias):
            return RuntimeRef(plain_text(workspace_id), plain_text(alias))
    raise BctrlConfigError(
        f"invalid target {quote(item)}: expected (workspace id, alias)",
        reason_class="invalid_input",
    )


def best_effort_ref(item: object) -> RuntimeRef:
    """Return the closest reference to an item that is not a valid target."""
    if isinstance(item, BctrlResponseError):
        return RuntimeRef(item.workspace_id or "", item.alias or "")
    match _parts(item):
        case (workspace_id, alias):
            return RuntimeRef(_as_text(workspace_id), _as_text(alias))
    return RuntimeRef("", _as_text(item))


def _parts(item: object) -> tuple[object, ...]:
    # A lazily loaded row may raise on access; treat it as invalid.
    with suppress(Exception, asyncio.CancelledError):
        if isinstance(item, str | bytes | Mapping | AbstractSet):
            return ()
        if isinstance(item, Collection) and len(item) == _PAIR:
            return tuple(item)
    return ()


def _as_text(value: object) -> str:
    return plain_text(value) if isinstance(value, str | UUID) else quote(value)
