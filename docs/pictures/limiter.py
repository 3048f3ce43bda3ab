"""Draw the charts of the limiter against simulated servers, for both limiter.md.

`python docs/pictures/limiter.py`
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bctrl_async import BctrlError

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from support import virtual_time
from support.throttling import Run, Server, throttled, token_bucket

_FOLDER = Path(__file__).parent

# Medium brightness, to be readable on white and on black.
_TEXT, _ACCEPTED, _THROTTLED = "#7a7a7a", "#4a8fd8", "#e0752d"
_WIDTH, _HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 26, 34

_Limit = Callable[[float], float]


class _Scene(NamedTuple):
    name: str
    title: str
    serve: Server
    stops: int
    latency: float
    limit: _Limit | None = None
    """The requests per second that the server accepts; None if it has no such limit."""


def _at_random(share: float) -> Server:
    rng = random.Random(share)  # noqa: S311 - a simulation.
    return lambda _: throttled() if rng.random() < share else None


def _outage(start: float, end: float) -> Server:
    return lambda now: throttled() if start <= now < end else None


_SCENES = [
    _Scene(
        "fixed",
        "4,000 stops; the server accepts 200 per second",
        token_bucket(lambda _: 200.0, burst=50),
        4_000,
        0.02,
        lambda _: 200.0,
    ),
    _Scene(
        "random",
        "20,000 stops; 6 % throttled at any rate",
        _at_random(0.06),
        20_000,
        0.1,
    ),
    _Scene(
        "outage",
        "20,000 stops; all throttled from 5 s to 25 s",
        _outage(5.0, 25.0),
        20_000,
        0.1,
    ),
]


class _Chart:
    """A bar for the attempts of each second, and a line for the server's limit."""

    def __init__(self, scene: _Scene) -> None:
        self._scene = scene
        self._accepted: Counter[int] = Counter()
        self._started: Counter[int] = Counter()
        random.seed(1)  # For the jitter.
        self._run = Run(self._serve, latency=lambda _: scene.latency)
        virtual_time.run(self._run.bulk(scene.stops))
        self._seconds = int(self._run.seconds) + 1
        highest = max(self._started.values())
        self._tick = _round_step(highest, 4)
        self._top = self._tick * -(-highest // self._tick)

    def _serve(self, now: float) -> BctrlError | None:
        answer = self._scene.serve(now)
        self._accepted[int(now)] += answer is None
        self._started[int(now)] += 1
        return answer

    def _x(self, second: float) -> float:
        return round(_LEFT + second / self._seconds * (_WIDTH - _LEFT - _RIGHT), 1)

    def _y(self, count: float) -> float:
        return round(
            _HEIGHT - _BOTTOM - count / self._top * (_HEIGHT - _TOP - _BOTTOM), 1
        )

    def draw(self) -> str:
        """Return the chart as SVG."""
        start_tag = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
            ' font-family="system-ui, sans-serif" font-size="12" role="img">'
        )
        run = self._run
        throttled = f"{run.throttled:,} of {run.requests:,} requests throttled"
        title = f"<title>{self._scene.title}: {throttled}, {run.seconds:.1f} s</title>"
        parts = [
            start_tag,
            title,
            *self._legend(),
            *self._axes(),
            *self._bars(),
            *self._limit(),
        ]
        return "\n".join([*parts, "</svg>", ""])

    def _legend(self) -> Iterator[str]:
        accepted = f'<tspan fill="{_ACCEPTED}">accepted</tspan>'
        throttled = f'<tspan fill="{_THROTTLED}">throttled</tspan>'
        yield _text(_LEFT, 14, f"requests per second: {accepted}, {throttled}")
        if self._scene.limit is not None:
            yield _text(_WIDTH - _RIGHT, 14, "- - limit", "end")

    def _axes(self) -> Iterator[str]:
        for count in range(0, self._top + 1, self._tick):
            y = self._y(count)
            yield (
                f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="{_TEXT}"'
                f' stroke-opacity="{0.25 if count else 0.9}"/>'
            )
            yield _text(_LEFT - 5, y + 4, f"{count:,}", "end")
        for second in range(0, self._seconds, _round_step(self._seconds, 6)):
            yield _text(self._x(second), _HEIGHT - _BOTTOM + 16, str(second), "middle")
        yield _text(_WIDTH - _RIGHT, _HEIGHT - 3, "seconds", "end")

    def _bars(self) -> Iterator[str]:
        for second in range(self._seconds):
            accepted, started = self._accepted[second], self._started[second]
            yield from self._bar(second, 0, accepted, _ACCEPTED)
            yield from self._bar(second, accepted, started, _THROTTLED)

    def _bar(self, second: int, low: int, high: int, colour: str) -> Iterator[str]:
        if high > low:
            left, right = self._x(second + 0.08), self._x(second + 0.92)
            yield (
                f'<rect x="{left}" y="{self._y(high)}" width="{right - left:.1f}"'
                f' height="{self._y(low) - self._y(high):.1f}" fill="{colour}"/>'
            )

    def _limit(self) -> Iterator[str]:
        limit = self._scene.limit
        if limit is not None:
            steps = [
                f"{self._x(second)} {self._y(limit(second))}H{self._x(second + 1)}"
                for second in range(self._seconds)
            ]
            yield (
                f'<path d="M{"L".join(steps)}" fill="none" stroke="{_TEXT}"'
                ' stroke-width="1.5" stroke-dasharray="4 3"/>'
            )


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    position = f'x="{x}" y="{y:.1f}"'
    return f'<text {position} text-anchor="{anchor}" fill="{_TEXT}">{words}</text>'


def _round_step(highest: int, parts: int) -> int:
    """Return the smallest round step that reaches `highest` in `parts` steps."""
    sizes = (factor * int(10**power) for power in range(5) for factor in (1, 2, 5))
    return next(size for size in sizes if size * parts >= highest)


if __name__ == "__main__":
    for scene in _SCENES:
        _FOLDER.joinpath(f"limiter-{scene.name}.svg").write_text(
            _Chart(scene).draw(), "utf-8"
        )
