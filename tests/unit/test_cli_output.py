"""What the command line writes, and where."""

from __future__ import annotations

import json

import pytest

from promptmill.cli.app import run
from promptmill.cli.output import EventPrinter, printable, show_error, table
from promptmill.contract import Cancelled, Done, Error, Progress, Restart, Token
from promptmill.errors import BadRequest

Captured = pytest.CaptureFixture[str]


def test_tokens_joined_are_all_that_goes_to_standard_output(capsys: Captured) -> None:
    printer = EventPrinter("j", as_json=False)
    for event in (Progress(phase="queued"), Token(text="a"), Token(text="b\n"), Done(text="ab\n")):
        printer.show(event)
    assert capsys.readouterr() == ("ab\n", "")
    assert printer.exit_code == 0


def test_a_restart_is_told_and_the_answer_begins_on_a_new_line(capsys: Captured) -> None:
    printer = EventPrinter("j", as_json=False)
    for event in (Token(text="void"), Restart(reason="the worker died"), Token(text="good"), Done(text="good")):
        printer.show(event)
    assert capsys.readouterr() == ("void\ngood\n", "(the answer begins anew: the worker died)\n")


def test_an_error_in_the_middle_of_a_line_has_its_own_line_and_exit_code(capsys: Captured) -> None:
    printer = EventPrinter("j", as_json=False)
    printer.show(Token(text="half"))
    printer.show(Error(code="cut", message="the stream was cut"))
    assert capsys.readouterr() == ("half\n", "error [cut]: the stream was cut\n")
    assert printer.exit_code == 1


def test_as_json_every_event_is_a_line_with_job_and_id(capsys: Captured) -> None:
    printer = EventPrinter("j", as_json=True)
    printer.show(Token(text="a\nb\u2028", id="7-1"))
    printer.show(Cancelled(reason="enough", id="8-1"))
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.split("\n")[:-1]] == [
        {"job_id": "j", "id": "7-1", "type": "token", "text": "a\nb\u2028"},
        {"job_id": "j", "id": "8-1", "type": "cancelled", "reason": "enough"},
    ]
    assert printer.exit_code == 4


def test_a_model_cannot_send_control_sequences_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\x1b]0;owned\x07 a\tb\n\x9b2J"
    assert printable(text) == text  # a file or a pipe gets it as it is
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert printable(text) == "\ufffd]0;owned\ufffd a\tb\n\ufffd2J"


def test_errors_are_one_line_or_one_json_object(capsys: Captured) -> None:
    error = BadRequest("too many", field="messages", limit=5)
    show_error(error, as_json=False)
    show_error(error, as_json=True)
    plain, as_json = capsys.readouterr().err.splitlines()
    assert plain == "error [bad_request]: too many"
    assert json.loads(as_json) == {
        "error": {"code": "bad_request", "message": "too many", "retryable": False, "field": "messages", "limit": 5}
    }


def test_a_table_is_aligned() -> None:
    assert table([("ID", "STATE"), ("abc", "x"), ("d", "yy")]) == "ID   STATE\nabc  x\nd    yy"


def test_a_defect_is_told_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("promptmill.cli.job.client_settings", broken)
    assert run(["job", "show", "x", "--json"]) == 9
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "internal"
    assert "ZeroDivisionError: by zero" in error["message"]
