"""Progress lines of a long job: rare enough to read, frequent enough to trust."""

import io
import itertools
import json
import re
import sys
import time

import pytest

from rdpm_cli import progress


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "clock", fake)
    monkeypatch.setattr(progress, "TICK", 3600.0)  # the test calls tick() instead of the thread
    monkeypatch.setattr(progress, "quiet", False)
    return fake


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr()
    assert not shown.out
    return shown.err.splitlines()


@pytest.mark.parametrize("pause", [0.1, 1.0, 4.0, 9.0, 13.0, 40.0, 300.0])
def test_plain_lines_come_at_most_every_5_and_at_least_every_30_seconds(
    pause: float, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """pause: seconds between two calls of advance()."""
    written = [clock.now]
    with progress.Bar("tokenize", 10**6, "images") as bar:
        following = clock.now + pause
        for _ in range(6000):  # ten minutes in tenths of a second; the thread ticks every 5 s
            clock.now += 0.1
            if clock.now >= following:
                bar.advance(8)
                following += pause
            if round(clock.now * 10) % 50 == 0:
                bar.tick()
            written += [clock.now] * len(lines(capsys))
    gaps = [b - a for a, b in itertools.pairwise(written)]
    assert len(gaps) >= 20
    assert min(gaps) >= 5
    assert max(gaps) <= 30


def test_a_line_has_count_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar("tokenize", 1000, "images") as bar:
        bar.resume_at(200)
        clock.now += 20
        bar.advance(100, "a note")
        clock.now += 20
        bar.advance(700)
    first, *_, last = lines(capsys)
    assert first == "tokenize: 300/1000 images, 5.0/s, 20 s, 140 s left  a note"
    assert last == "tokenize: 1000 images (200 of them earlier) in 40.0 s, 20.0/s"


def test_there_is_no_rate_before_anything_is_done(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar("tokenize", 10, "images") as bar:
        clock.now += 25
        bar.tick()
        assert lines(capsys) == ["tokenize: 0/10 images, 0.0/s, 25 s, no rate yet"]
        bar.advance(10)


def test_the_thread_ticks_while_nothing_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "TICK", 0.01)
    monkeypatch.setattr(progress, "SILENCE", 0.05)
    with progress.Bar("tokenize", 10, "images"):
        time.sleep(0.3)
    assert len(lines(capsys)) >= 3


def test_lines_of_json_have_the_same_numbers(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "as_json", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # on a terminal too
    with progress.Bar("tokenize", 1000, "images") as bar:
        clock.now += 25
        bar.tick()
        clock.now += 15
        bar.advance(100, "a note")
    progress.warn("a warning")
    waiting, line, last, warning = map(json.loads, lines(capsys))
    assert waiting["seconds_left"] is None
    counts = {"job": "tokenize", "done": 100, "total": 1000, "unit": "images"}
    assert {name: line[name] for name in counts} == counts
    assert (line["kind"], line["rate"], line["seconds"], line["seconds_left"]) == ("progress", 2.5, 40, 360)
    assert line["note"] == "a note"
    assert last == {**last, **counts, "kind": "finished", "before": 0, "seconds": 40}
    assert (warning["kind"], warning["message"]) == ("warning", "a warning")


def test_quiet_writes_nothing(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "quiet", True)
    with progress.Bar("tokenize", 10, "images") as bar:
        clock.now += 100
        bar.advance(10)
    assert lines(capsys) == []


def test_a_terminal_sees_a_bar_with_rate_and_time_left(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Bar("tokenize", 100, "images") as bar:
        clock.now += 4
        bar.advance(40)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "40/100 images 10.0/s" in plain
    assert "left" in plain


@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_has_a_message_and_a_hint(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "as_json", as_json)
    progress.error("wrong file", "copy it again", 3, "Traceback ...\n")
    shown = lines(capsys)
    if as_json:
        document = json.loads(shown[0])
        assert (document["message"], document["hint"], document["exit_code"]) == ("wrong file", "copy it again", 3)
        assert document["trace"].startswith("Traceback")
    else:
        assert shown == ["Traceback ...", "rdpm: error: wrong file", "hint: copy it again"]
