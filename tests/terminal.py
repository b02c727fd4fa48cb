"""A terminal for tests: a pty that is read all the time, and what it would show."""

from __future__ import annotations

import os
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fcntl import ioctl


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows after ``text``, without colours."""
    lines, column = [""], 0
    while text:
        if text.startswith("\x1b["):
            end = next(i for i, char in enumerate(text) if char.isalpha())
            if text[end] == "K":
                lines[-1] = lines[-1][:column]
            text = text[end + 1 :]
            continue
        char, text = text[0], text[1:]
        if char == "\r":
            column = 0
        elif char == "\n":
            lines.append("")
        else:
            lines[-1] = lines[-1][:column] + char + lines[-1][column + 1 :]
            column += 1
    return lines


class Terminal:
    """Attributes: ``fd``, for a program's output, and after the block ``text``, all of it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.text = ""


@contextmanager
def open_terminal(columns: int = 100) -> Iterator[Terminal]:
    ours, theirs = os.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    shown = bytearray()
    reader = threading.Thread(target=_drain, args=(ours, shown))
    reader.start()
    terminal = Terminal(theirs)
    try:
        yield terminal
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
        terminal.text = shown.decode()


def _drain(fd: int, shown: bytearray) -> None:
    try:
        while data := os.read(fd, 65536):
            shown += data
    except OSError:  # nobody has the other end any more
        pass
