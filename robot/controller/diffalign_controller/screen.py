"""What a person sees of a running controller."""

from __future__ import annotations

import queue
import shutil
import threading
from typing import TextIO

_WAITING = 100  # lines; a terminal that takes no more must not stop a robot's loop
_CLEAR = "\r\x1b[K"


class Screen:
    """Lines on a stream, written by a thread: `say` for those that stay, `show` for one that the next replaces.

    Both return at once; lines are dropped while the stream takes none. On what is no terminal every line stays.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: queue.Queue[tuple[str, bool] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._put((line, True))

    def show(self, line: str) -> None:
        """A line that is replaced by the next."""
        self._put((line, False))

    def close(self) -> None:
        """Write what is waiting, for at most a second."""
        self._put(None)
        self._thread.join(timeout=1)

    def _put(self, line: tuple[str, bool] | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            return

    def _run(self) -> None:
        terminal, open_line = self._stream.isatty(), False
        while (found := self._lines.get()) is not None:
            line, stays = found
            start = _CLEAR if open_line else ""
            open_line = terminal and not stays
            shown = line[: shutil.get_terminal_size().columns - 1] if open_line else f"{line}\n"
            self._stream.write(start + shown)
            self._stream.flush()
        if open_line:
            self._stream.write("\n")
            self._stream.flush()
