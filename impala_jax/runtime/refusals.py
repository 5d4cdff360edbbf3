"""What one door of this process refused: counted by sender, told once a minute.

A door is where bytes of others come in. Neither the log nor the memory of who stands
behind it may grow at the speed of a sender.
"""

import logging
import threading
import time

_PAUSE = 60.0  # Seconds, at least, between two lines of the log.
_MOST_SENDERS = 1000  # Counted each; those after them together.
_OTHERS = 'others'
_LONGEST = 300  # Letters of one reason.


class Refusals:
  """Safe for threads.

  Args:
    what: is refused, in the plural: 'unrolls'.
  """

  def __init__(self, what: str):
    self.what = what
    self._lock = threading.Lock()
    self._counts: dict[str, int] = {}
    self._next = 0.0

  @property
  def total(self) -> int:
    with self._lock:
      return sum(self._counts.values())

  def by_sender(self) -> dict[str, int]:
    """How many of each sender, most first."""
    with self._lock:
      return dict(sorted(self._counts.items(), key=lambda kv: -kv[1]))

  def add(self, sender: str, why: object) -> None:
    """Counts one.

    Args:
      sender: whose it was, as far as is known; strangers may have chosen the words.
      why: it was refused; made text of only where it is told.
    """
    sender, now = _plain(sender, 80), time.monotonic()
    with self._lock:
      known = sender in self._counts or len(self._counts) < _MOST_SENDERS
      name = sender if known else _OTHERS
      self._counts[name] = self._counts.get(name, 0) + 1
      if now < self._next:
        return
      self._next = now + _PAUSE
    logging.warning(
      'refused %d %s so far (%s); the last one, of %s: %s',
      self.total,
      self.what,
      self.in_words(),
      sender,
      _plain(str(why), _LONGEST),
    )

  def in_words(self, most: int = 3) -> str:
    """The senders of most, with their numbers."""
    counts = self.by_sender()
    words = [f'{sender}: {count}' for sender, count in list(counts.items())[:most]]
    left = sum(counts.values()) - sum(list(counts.values())[:most])
    return ', '.join([*words, *([f'all others: {left}'] if left else [])])


def _plain(text: str, longest: int) -> str:
  """One line that a terminal can show, of letters that do nothing to it."""
  cut = text if len(text) <= longest else f'{text[:longest]}…'
  return ''.join(c if c.isprintable() else '?' for c in cut)
