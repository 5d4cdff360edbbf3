"""What the terminal shows of an evaluation: a bar, or plain lines in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

import rich.console
import rich.progress

_PLAIN_INTERVAL = 10.0  # Seconds between plain lines.


class Progress(Protocol):
  """Told what happens; names are those of levels."""

  def begin(self, name: str) -> None:
    """A level is begun."""

  def episode(self, name: str) -> None:
    """One of its episodes has ended."""

  def end(self, name: str, words: str) -> None:
    """Nothing more of it will be played; `words` say what came out."""

  def say(self, words: str) -> None:
    """Anything else."""


@contextlib.contextmanager
def make(levels: int, episodes: int) -> Iterator[Progress]:
  """For `levels` levels with `episodes` episodes each."""
  if not sys.stdout.isatty():
    yield _Plain(levels * episodes)
    return
  console = rich.console.Console()
  columns = (
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TextColumn('left'),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=console) as bars:
    yield _Bars(bars, levels, episodes)


class _Bars:
  """A bar for all episodes, and one for each level that is being played."""

  def __init__(self, bars: rich.progress.Progress, levels: int, episodes: int):
    self._bars = bars
    self._episodes = episodes
    self._all = bars.add_task('all episodes', total=levels * episodes)
    self._playing: dict[str, rich.progress.TaskID] = {}

  def begin(self, name: str) -> None:
    self._playing[name] = self._bars.add_task(name, total=self._episodes)

  def episode(self, name: str) -> None:
    self._bars.advance(self._playing[name])
    self._bars.advance(self._all)

  def end(self, name: str, words: str) -> None:
    self._bars.remove_task(self._playing.pop(name))
    self.say(words)

  def say(self, words: str) -> None:
    self._bars.console.print(words, markup=False, highlight=False, soft_wrap=True)


class _Plain:
  """A line for each level that is done, and now and then one in between."""

  def __init__(self, total: int):
    self._total = total
    self._done = 0
    self._playing: list[str] = []
    self._start = time.monotonic()
    self._next = self._start + _PLAIN_INTERVAL

  def begin(self, name: str) -> None:
    self._playing.append(name)

  def episode(self, name: str) -> None:
    self._done += 1
    now = time.monotonic()
    if now >= self._next:
      self._next = now + _PLAIN_INTERVAL
      left = (now - self._start) * (self._total / self._done - 1)
      self.say(
        f'{self._done} of {self._total} episodes, about {left / 60:.0f} min to go; '
        f'playing {", ".join(self._playing)}'
      )

  def end(self, name: str, words: str) -> None:
    self._playing.remove(name)
    self.say(words)

  def say(self, words: str) -> None:
    print(words, flush=True)
