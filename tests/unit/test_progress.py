"""progress: a bar on a terminal, plain lines elsewhere, nothing where told."""

from __future__ import annotations

import io

import pytest

from rayreward.progress import Progress


def _clock() -> tuple[list[float], Progress, io.StringIO]:
    """A progress of 1,000 rows in lines, with the hands of its clock and its stream."""
    now, stream = [0.0], io.StringIO()
    return now, Progress(1_000, style="lines", stream=stream, clock=lambda: now[0]), stream


def test_progress_prints_a_line_with_pace_and_time_left() -> None:
    now, progress, stream = _clock()
    now[0] = 20.0
    progress.add(250, 5_000)
    assert stream.getvalue() == ("250/1,000 rows (25 %), 12.5 rows/s, 250 tokens/s, 1:00 left\n")


def test_progress_prints_a_line_every_ten_seconds_at_most() -> None:
    now, progress, stream = _clock()
    printed_at = []
    for second in range(1, 26):
        now[0] = float(second)
        before = len(stream.getvalue())
        progress.add(1, 1)
        if len(stream.getvalue()) > before:
            printed_at.append(second)
    assert printed_at == [10, 20]


def test_progress_prints_the_last_line_at_once() -> None:
    now, progress, stream = _clock()
    now[0] = 1.0
    progress.add(999, 0)
    assert stream.getvalue() == ""
    progress.add(1, 0)
    assert stream.getvalue().startswith("1,000/1,000 rows (100 %), ")
    assert stream.getvalue().endswith(" 0:00 left\n")


def test_progress_does_not_count_an_earlier_run_into_the_pace() -> None:
    now = [100.0]
    progress = Progress(1_000, 600, style="none", clock=lambda: now[0])
    now[0] = 110.0
    progress.add(100, 2_000)
    assert progress.line() == ("700/1,000 rows (70 %), 10.0 rows/s, 200 tokens/s, 0:30 left")


@pytest.mark.parametrize("elapsed_s", [0.0, 5.0])
def test_progress_does_not_guess_before_there_is_a_pace(elapsed_s: float) -> None:
    now, progress, _ = _clock()
    now[0] = elapsed_s
    assert progress.line() == ("0/1,000 rows (0 %), 0.0 rows/s, 0 tokens/s, time left unknown")


@pytest.mark.parametrize(
    ("elapsed_s", "left"),
    [(1.0, "0:09"), (60.0, "9:00"), (399.6, "59:56"), (400.0, "1:00:00"), (6_000.0, "15:00:00")],
)
def test_progress_shows_the_time_left_as_a_clock_does(elapsed_s: float, left: str) -> None:
    now = [0.0]
    progress = Progress(10, style="none", clock=lambda: now[0])
    now[0] = elapsed_s
    progress.add(1, 1)
    assert progress.line().endswith(f", {left} left")


def test_progress_none_writes_nothing() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(10, style="none", stream=stream, clock=lambda: now[0])
    now[0] = 60.0
    progress.add(10, 100)
    progress.close()
    assert stream.getvalue() == ""


def test_progress_bar_shows_rows_and_tokens() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(10, 3, style="bar", stream=stream, clock=lambda: now[0])
    now[0] = 2.0
    progress.add(4, 3_000)
    progress.close()
    last = stream.getvalue().rsplit("\r", 1)[1]
    assert "7/10" in last
    assert "1,500 tokens/s" in last
    assert last.endswith("\n")


def test_progress_auto_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    progress = Progress(10, stream=stream)
    progress.add(10, 10)
    progress.close()
    assert "\r" in stream.getvalue()


def test_progress_auto_is_lines_elsewhere() -> None:
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.add(10, 10)
    progress.close()
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_progress_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(10, style="lines")
    progress.add(10, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("10/10 rows")
