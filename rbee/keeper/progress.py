"""One step of a command's narration, and how it looks: pure, so that a terminal is only a width."""

from __future__ import annotations

import attrs

DONE, OPEN = "━", "╌"
BAR, NARROW_BAR = 24, 8  # cells
ROOMY = 60  # columns from which the bar is the long one
QUIET = 0.1  # seconds below which a step's duration is not worth telling
BELOW = frozenset({"worker", "pip"})  # actors that do what another has told
FACTS = frozenset({"ready", "fetched", "skip", "queue"})  # actions that tell what is over or stands


@attrs.define(eq=False)
class Step:
    """What is going on since ``began``.

    Attributes:
        detail: what a component below says that it is at, for this step.
        share: how much is done, 0 … 1; None where nobody knows. It never falls.
        stays: whether a line of it is left at its end.
    """

    actor: str
    action: str
    text: str
    began: float
    share: float | None = None
    detail: str = ""
    stays: bool = True

    @property
    def name(self) -> str:
        return f"{self.actor}: {self.action} {self.text}"

    def take(self, actor: str, action: str, text: str, share: float | None) -> bool:
        """Take a narration that tells more about this step; False: it begins another."""
        if action != self.action or action in FACTS:
            return False
        if actor in BELOW and actor != self.actor:
            self.share = _risen(self.share, share) if text == self.detail else share
            self.detail = text
            return True
        if actor != self.actor or (text != self.text and (share is None or self.share is None)):
            return False
        self.text, self.share = text, _risen(self.share, share)
        return True

    def line(self, now: float, columns: int) -> str:
        """Return what a terminal shows while it runs; never as wide as ``columns``."""
        end = f" {_percent(self.share):>5}" if self.share is not None else ""
        end += f" {now - self.began:.1f} s"
        room = columns - 1 - width(end)
        bar = ""
        if self.share is not None and room > 3 * NARROW_BAR:
            bar = " " + draw_bar(self.share, BAR if columns >= ROOMY else NARROW_BAR)
        told = f"{self.name} · {self.detail}" if self.detail else self.name
        return cut(fit(told, room - width(bar)) + bar + end, columns - 1)

    def told(self) -> str:
        """Return the line that says what is going on, where lines stay."""
        told = f"{self.name} · {self.detail}" if self.detail else self.name
        return told if self.share is None else f"{told} {_percent(self.share)}"

    def over(self, now: float) -> str:
        """Return the line that stays of it."""
        seconds = now - self.began
        return self.name if seconds < QUIET else f"{self.name} … {seconds:.1f} s"


def _risen(before: float | None, share: float | None) -> float | None:
    return share if share is None or before is None else max(before, share)


def _percent(share: float) -> str:
    return f"{int(min(max(share, 0), 1) * 100)} %"


def draw_bar(share: float, cells: int) -> str:
    done = int(min(max(share, 0), 1) * cells)
    return DONE * done + OPEN * (cells - done)


def fit(text: str, columns: int) -> str:
    """Return ``text`` on one line, cut to ``columns``; what moves a cursor is left out."""
    return cut("".join(char for char in " ".join(text.split()) if char.isprintable()), columns)


def cut(text: str, columns: int) -> str:
    if width(text) <= columns:
        return text
    kept, left = "", columns - 1  # for the mark of the cut
    for char in text:
        if (left := left - width(char)) < 0:
            break
        kept += char
    return (kept + "…")[: max(columns, 0)]


def width(text: str) -> int:
    """Return how many columns a terminal gives to ``text``."""
    if text.isascii():
        return len(text)
    import unicodedata

    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
