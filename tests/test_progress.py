"""Progress of a long job: lines at regular times, also in JSON, a bar on a terminal, and the two lines of an error."""

import io
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
    return fake


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr()
    assert not shown.out
    return shown.err.splitlines()


def test_a_line_has_count_rate_and_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Bar("tokenize", 1000, "images") as bar:
        bar.write_line("progress")
        bar.resume_at(200)
        clock.now += 20
        bar.advance(100, "a note")
        bar.write_line("progress")
        clock.now += 20
        bar.advance(700)
    assert lines(capsys) == [
        "tokenize: 0/1000 images, 0.0/s, 0 s",
        "tokenize: 300/1000 images, 5.0/s, 20 s, 140 s left  a note",
        "tokenize: 1000/1000 images, 20.0/s, 40 s  a note",
    ]


def test_lines_come_while_nothing_is_finished_and_quiet_silences_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    for quiet in (False, True):
        monkeypatch.setattr(progress, "quiet", quiet)
        with progress.Bar("tokenize", 10, "images"):
            time.sleep(0.5)
        assert len(lines(capsys)) > 2 or quiet
    progress.say("nothing")
    progress.warn("something")
    assert lines(capsys) == ["warning: something"]


def test_lines_of_json_have_the_same_numbers(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "as_json", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # on a terminal too
    with progress.Bar("tokenize", 1000, "images") as bar:
        clock.now += 40
        bar.write_line("progress")
        bar.advance(100, "a note")
    progress.warn("a warning")
    progress.error("wrong file", "copy it again", 3, "Traceback ...\n")
    waiting, last, warning, error = map(json.loads, lines(capsys))
    assert (waiting["kind"], waiting["rate"], waiting["seconds_left"]) == ("progress", 0, None)
    values = {"kind": "finished", "job": "tokenize", "done": 100, "total": 1000, "unit": "images", "before": 0}
    assert last == {**last, **values, "seconds": 40, "rate": 2.5, "seconds_left": 360, "note": "a note"}
    assert (warning["kind"], warning["message"]) == ("warning", "a warning")
    values = {"message": "wrong file", "hint": "copy it again", "exit_code": 3, "trace": "Traceback ...\n"}
    assert error == {**error, **values, "kind": "error"}


def test_a_terminal_sees_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.Bar("tokenize", 100, "images") as bar:
        bar.advance(40)
    assert "tokenize: 40/100 images" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def test_an_error_has_a_message_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    progress.error("wrong file", "copy it again", 3, "Traceback ...\n")
    assert lines(capsys) == ["Traceback ...", "rdpm: error: wrong file", "hint: copy it again"]
