"""The input of a bulk stop: any iterable of targets, read one at a time."""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from collections.abc import Set as AbstractSet
from contextlib import suppress
from uuid import UUID

from bctrl_async._calls.cancellation import as_failure, is_cancelled
from bctrl_async.errors import BctrlConfigError, BctrlResponseError
from bctrl_async.models import RuntimeRef

Target = RuntimeRef | tuple[str | UUID, str]
Targets = Iterable[Target] | AsyncIterable[Target]

_PAIR = 2


class Input:
    """Reads targets one by one, for any number of readers.

    Args:
        targets: What is read.

    Attributes:
        count: How many were read.
        error: What the input raised, if it did; nothing is read after it.
        closed: Whether nothing more is read.
        length: How many there are, None where the input has no length.

    Raises:
        BctrlConfigError: It cannot be iterated over, or is itself a target.
    """

    def __init__(self, targets: Targets) -> None:
        self._awaited: AsyncIterator[object] | None = None
        self._plain: Iterator[object] | None = None
        if isinstance(targets, str | bytes | Mapping | RuntimeRef):
            raise BctrlConfigError(
                f"targets is a {type(targets).__name__}",
                advice="Pass an iterable of (workspace id, alias), also for one",
            )
        if isinstance(targets, AsyncIterable):
            self._awaited = aiter(targets)
        else:
            try:
                self._plain = iter(targets)
            except TypeError:
                raise BctrlConfigError(
                    f"targets is a {type(targets).__name__}, which cannot be iterated over",
                    advice="Pass an iterable or async iterable of (workspace id, alias)",
                ) from None
        self.length: int | None = len(targets) if isinstance(targets, Sized) else None
        self.count: int = 0
        self.error: BaseException | None = None
        self.closed: bool = False
        self._turn = asyncio.Lock()

    @property
    def can_drain(self) -> bool:
        """Whether its rest can be read, for the account, without end or delay."""
        return self._plain is not None and self.length is not None

    @property
    def exhausted(self) -> bool:
        """Whether every target was read."""
        return self.closed if self.length is None else self.count >= self.length

    @property
    def is_async(self) -> bool:
        """Whether a target may have to be waited for."""
        return self._awaited is not None

    async def next(self) -> tuple[int, object] | None:
        """Wait for the next item; return it and its index, None at the end."""
        async with self._turn:
            if self.closed or self._awaited is None:
                return None
            try:
                item = await anext(self._awaited)
            except StopAsyncIteration:
                self.closed = True
                return None
            except BaseException as error:  # noqa: BLE001 - the run raises it.
                self._fail_unless_cancelled(error)
                return None
            return self._counted(item)

    def next_nowait(self) -> tuple[int, object] | None:
        """Do the same with an input that need not be waited for."""
        if self.closed or self._plain is None:
            return None
        try:
            item = next(self._plain)
        except StopIteration:
            self.closed = True
            return None
        except BaseException as error:  # noqa: BLE001 - the run raises it.
            self._fail(error)
            return None
        return self._counted(item)

    def _counted(self, item: object) -> tuple[int, object]:
        self.count += 1
        return self.count - 1, item

    def _fail_unless_cancelled(self, error: BaseException) -> None:
        """Fail with an error, but raise it if it ends the reading task."""
        if isinstance(error, GeneratorExit) or (
            isinstance(error, asyncio.CancelledError) and is_cancelled()
        ):
            raise error
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Close the input with the error that it raised."""
        if isinstance(error, asyncio.CancelledError):
            error = as_failure(error, "the input")
        self.error = error
        self.closed = True


class Listing(Input):
    """An input that is a list, but has to be asked for first; its reading can be interrupted.

    Args:
        ask: Called once, when the first target is to be read.
    """

    def __init__(self, ask: Callable[[], Awaitable[Sequence[object]]]) -> None:
        super().__init__(())
        self.length = None
        self._ask: Callable[[], Awaitable[Sequence[object]]] | None = ask

    @property
    def can_drain(self) -> bool:
        """Whether it is there."""
        return not self.is_async

    @property
    def is_async(self) -> bool:
        """Whether it has to be waited for."""
        return self._ask is not None

    async def next(self) -> tuple[int, object] | None:
        """Wait for the list; return its next item and its index, None at the end."""
        async with self._turn:
            if self._ask is None or self.closed:
                return self.next_nowait()
            try:
                items = await self._ask()
            except BaseException as error:  # noqa: BLE001 - the run raises it.
                self._fail_unless_cancelled(error)
                return None
            self._ask, self._plain, self.length = None, iter(items), len(items)
            return self.next_nowait()


def as_target(item: object) -> RuntimeRef:
    """Return the target that an item is.

    Any pair will do, so that the rows of a CSV file or of a database are targets.

    Raises:
        BctrlConfigError: It is not a pair of texts.
    """
    if type(item) is RuntimeRef or type(item) is tuple:
        # What nearly every item is, found at a third of the cost.
        match item:
            case (workspace_id, alias) if type(workspace_id) is str and type(alias) is str:
                return RuntimeRef(workspace_id, alias)
    match _parts(item):
        case (str() | UUID() as workspace_id, str() as alias):
            return RuntimeRef(_plain(workspace_id), _plain(alias))
    if type(item) is BctrlResponseError:
        raise item
    raise BctrlConfigError(
        f"{_shown(item)} is no target",
        advice="Give a pair of texts: (workspace id, alias)",
        reason_class="invalid_input",
    )


def best_effort_ref(item: object) -> RuntimeRef:
    """Return what comes closest to a target, for the account of an item that is none."""
    if type(item) is BctrlResponseError:
        return RuntimeRef(item.workspace_id or "", item.alias or "")
    match _parts(item):
        case (workspace_id, alias):
            return RuntimeRef(_as_text(workspace_id), _as_text(alias))
    return RuntimeRef("", _as_text(item))


def _parts(item: object) -> tuple[object, ...]:
    # A row that is read late may raise anything when it is looked at, and is no target then.
    with suppress(Exception):
        if isinstance(item, str | bytes | Mapping | AbstractSet):
            return ()
        if isinstance(item, Collection) and len(item) == _PAIR:
            return tuple(item)
    return ()


def _as_text(value: object) -> str:
    return _plain(value) if issubclass(type(value), str | UUID) else _shown(value)


def _plain(value: object) -> str:
    # As plain text, which msgspec can write, and not by str(): of an enum's member that is its
    # name in the program.
    return str.__str__(value) if isinstance(value, str) else str(value)


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except Exception:  # noqa: BLE001 - a proxy of something lost raises what it likes.
        return f"<{type(value).__name__}>"
