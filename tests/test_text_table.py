"""Tables for a terminal."""

import sys

import pytest

from stepfuse.data.text_table import terminal_width, text_table

ROWS = [("name", "what it is"), ("a", "one two three four five"), ("bc", "–")]


def test_columns_are_aligned():
    assert text_table(ROWS).splitlines() == ["name  what it is", "a     one two three four five", "bc    –"]


def test_the_widest_column_is_wrapped():
    narrow = text_table(ROWS, width=20).splitlines()
    assert narrow == ["name  what it is", "a     one two three", "      four five", "bc    –"]
    assert text_table(ROWS, width=29) == text_table(ROWS)


def test_a_word_longer_than_its_column_is_broken():
    assert text_table([("x", "a" * 30)], width=18).splitlines() == ["x  " + "a" * 15, "   " + "a" * 15]


def test_no_column_becomes_narrower_than_twelve_characters():
    assert max(map(len, text_table([("b" * 20, "c" * 20)], width=10).splitlines())) == 12 + 2 + 12


@pytest.mark.parametrize(("terminal", "width"), [(True, 57), (False, None)])
def test_only_a_terminal_has_a_width(monkeypatch, terminal, width):
    monkeypatch.setenv("COLUMNS", "57")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert terminal_width() == width
