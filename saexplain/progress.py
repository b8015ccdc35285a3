"""What does the terminal show while a run works? A live line for each stage, and a line that stays.

    with safe_output(), live_line("SAE"):
        for batch in progress_bar(batches, "steps", 1875):  # moves the live line
            ...
        print("printed above the live line")

In a terminal and in a notebook (tqdm.auto) the live line moves; elsewhere only the lines that stay
are printed. Nothing here raises an error because a character or a line cannot be written. It
imports nothing of this project.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from shutil import get_terminal_size

with warnings.catch_warnings():  # in a notebook without ipywidgets it warns, and draws no bars
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

WIDTH = 100  # characters of a line, at most
DRAWN_EVERY = 0.1  # seconds
STAGES = {  # names of stages in summary.json -> their titles
    "target": "number active",
    "sae": "SAE",
    "bank": "strongest images",
    "patterns": "pixel patterns",
    "effects": "effects on classes",
    "maps": "places in images",
    "propose and freeze": "hypotheses",
    "frozen decoder, waited for": "frozen decoder",
    "fidelity": "SAE spliced in",
    "test": "tests",
    "baselines, waited for": "baselines",
    "pictures, waited for": "pictures",
}


def stage_words(stage: str, seconds: float, number: str = "") -> str:
    """The line about a stage: its title, its seconds, and the number that says most about it."""
    number = "".join(c for c in number if c.isprintable())
    line = f"{STAGES.get(stage, stage):<18}{seconds:7.1f} s  {number}".rstrip()
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."


def is_notebook() -> bool:
    """Whether bars are the widgets of a notebook."""
    return any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)


class SafeStream(io.TextIOBase):
    """A text stream that writes what it can: characters that `stream` cannot encode become escapes
    like \\u05d0; once nothing can be written, as to a closed pipe or a full disk, nothing is. What
    cannot be written at one moment, as to a pipe that is full, is left out."""

    def __init__(self, stream):
        self.stream, self.is_open = stream, True

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def flush(self) -> None:
        self.put("")

    def put(self, text: str) -> None:
        """Write now."""
        try:
            if self.is_open:
                self.stream.write(encodable(text, self.encoding))
                if text[-1:] in "\n\r":  # at the end of a line, or of nothing
                    self.stream.flush()
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, ValueError):  # ValueError: it was closed here
            self.is_open = False

    def write(self, text: str) -> int:
        self.put(text)
        return len(text)


def encodable(text: str, encoding: str) -> str:
    """The text with escapes in place of what the encoding lacks."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Output(SafeStream):
    """A `SafeStream` whose lines appear above the live line, if there is one."""

    rest = ""  # of a line that is not complete

    def write(self, text: str) -> int:
        whole, end, self.rest = (self.rest + text).rpartition("\n")
        if not _lines:
            self.put(whole + end + self.rest)
            self.rest = ""
        elif end:
            _lines[-1].print_above(whole + end, self)
        return len(text)


@contextmanager
def safe_output() -> Iterator[None]:
    """Inside, `sys.stdout` is an `Output`."""
    if sys.stdout is None or isinstance(sys.stdout, Output):
        yield
        return
    with redirect_stdout(Output(sys.stdout)):
        yield


@contextmanager
def script_output() -> Iterator[None]:
    """`safe_output` for a whole process: without warnings of libraries, which a user cannot act on,
    as this project prints its own; and Python ends in peace where stdout is closed."""
    stdout = sys.stdout
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while _lines:
        _lines.pop().close()
    try:
        with safe_output(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    finally:
        try:
            if stdout is not None:
                stdout.flush()
        except (OSError, ValueError):  # its last flush at the end would fail as well
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


class LiveLine:
    """A line with seconds and, inside of a `progress_bar`, a bar; a thread draws it."""

    def __init__(self, title: str):
        self.title = stage_words(title, 0).removesuffix("    0.0 s")
        self.n, self.total, self.what, self.loop_started = 0, None, "", 0.0
        file = SafeStream(getattr(sys.stdout, "stream", sys.stdout))
        given = {"file": file, "leave": False, "bar_format": self._format()}
        self.bar = tqdm(desc=self.title, ncols=self._width(), **given)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._draw, daemon=True)
        self.thread.start()

    def _width(self) -> int | None:
        return None if is_notebook() else get_terminal_size().columns - 1

    def _format(self) -> str:
        shown = "{desc}{elapsed_s:7.1f} s"
        if not self.total:
            return shown
        words = f"{self.what} {self.n:,} of {self.total:,}"
        if self.n:
            left = (time.monotonic() - self.loop_started) * (self.total / self.n - 1)
            words += f", {left:.0f} s left"
        return f"{shown}  {{percentage:3.0f}}% |{{bar}}| {words.replace('{', '').replace('}', '')}"

    def _draw(self) -> None:
        while not self.ended.wait(DRAWN_EVERY):
            self.refresh()

    def refresh(self) -> None:
        """Draw the line as it is now."""
        with self.bar.get_lock():
            bar, started = self.bar, self.bar.start_t
            if bar.total != self.total:
                if is_notebook():
                    bar.reset(self.total)  # its widget needs it
                bar.total, bar.start_t = self.total, started
            bar.n, bar.bar_format = self.n, self._format()
            if not is_notebook():
                bar.ncols = self._width()
            bar.refresh(nolock=True)

    def print_above(self, text: str, output: SafeStream) -> None:
        """Write whole lines where the line is, and draw it below."""
        with self.bar.get_lock():
            self.bar.clear(nolock=True)
            output.put(text)
            self.bar.refresh(nolock=True)

    def close(self) -> None:
        """Remove the line."""
        self.ended.set()
        self.thread.join()
        self.bar.total = None  # incomplete bars of a notebook would turn red
        self.bar.close()


_lines: list[LiveLine] = []  # the live line, if there is one


def show_loading() -> None:
    """Show a live line until `script_output` begins; of several ranks, the first does. Until then
    Ctrl-C ends the process without a traceback through PyTorch."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it is not
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stdout is not None and sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
        _lines.append(LiveLine("loading PyTorch"))


@contextmanager
def live_line(title: str) -> Iterator[None]:
    """A live line of a stage, in a terminal or a notebook, and where there is none yet."""
    can_move = sys.stdout is not None and not sys.stdout.closed
    if _lines or not can_move or not (sys.stdout.isatty() or is_notebook()):
        yield
        return
    _lines.append(LiveLine(title))
    try:
        yield
    finally:
        _lines.pop().close()
        if isinstance(sys.stdout, Output):
            sys.stdout.write("")  # the rest


def progress_bar(plan: Iterable, what: str, steps: int | None) -> Iterator:
    """The items of `plan`, of which there are `steps`; the live line shows how many have been
    taken, and inside of another progress_bar this one takes the line over until it ends. Without
    a live line it is a bar of tqdm."""
    if not _lines:  # None: only in terminals and notebooks, and so not where a worker prints
        yield from tqdm(plan, what, steps, leave=False, disable=None, file=sys.stdout)
        return
    line = _lines[-1]
    before = line.n, line.total, line.what, line.loop_started
    line.n, line.total, line.what, line.loop_started = 0, steps, what, time.monotonic()
    try:
        for item in plan:
            yield item
            line.n += 1  # its thread draws it
    finally:
        line.n, line.total, line.what, line.loop_started = before
