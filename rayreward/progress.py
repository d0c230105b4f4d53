"""How a running job shows where it is: a bar on a terminal, plain lines anywhere else.

Knows counts and a clock; does not know what is being counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Literal, TextIO

_LINE_EVERY_S = 10.0
"""Plain lines: often enough to see life, seldom enough not to fill a log."""


class Progress:
    """Shows rows done of rows in all, and the pace."""

    def __init__(
        self,
        total_rows: int,
        done_rows: int = 0,
        *,
        style: Literal["auto", "bar", "lines", "none"] = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total_rows: Rows of the whole job.
            done_rows: Rows that an earlier run had done.
            style: As in `JobConfig.progress`.
            stream: Where to write; standard error by default.
            clock: Seconds, for tests.
        """
        self._stream = stream or sys.stderr
        if style == "auto":
            style = "bar" if self._stream.isatty() else "lines"
        self._style = style
        self._total, self._begun_at, self._rows, self._tokens = total_rows, done_rows, done_rows, 0
        self._clock = clock
        self._start = self._last_line = clock()
        self._bar = self._make_bar() if style == "bar" else None

    def add(self, rows: int, tokens: int) -> None:
        """Notes finished rows."""
        self._rows += rows
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._per_s(self._tokens):,.0f} tokens/s", refresh=False)
            self._bar.update(rows)
        elif self._style == "lines":
            now = self._clock()
            if now - self._last_line >= _LINE_EVERY_S or self._rows >= self._total:
                self._last_line = now
                print(self.line(), file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def line(self) -> str:
        """Where the job is, in one line."""
        rows_per_s = self._per_s(self._rows - self._begun_at)
        percent = 100 * self._rows // self._total if self._total else 100
        left = (self._total - self._rows) / rows_per_s if rows_per_s else None
        return (
            f"{self._rows:,}/{self._total:,} rows ({percent} %), "
            f"{rows_per_s:,.1f} rows/s, {self._per_s(self._tokens):,.0f} tokens/s, "
            f"{'time left unknown' if left is None else _duration(left) + ' left'}"
        )

    def _per_s(self, count: int) -> float:
        elapsed = self._clock() - self._start
        return count / elapsed if elapsed > 0 else 0.0

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(
            total=self._total, initial=self._begun_at, unit=" rows", file=self._stream, smoothing=0
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
