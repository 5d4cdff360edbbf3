"""What learners that update together agree on before each step."""

import contextlib
import enum
from collections.abc import Iterator
from typing import Any


class Verdict(enum.Enum):
  """What all learners do next."""

  GO = 'go'  # Update, each with its share of the batch.
  WAIT = 'wait'  # Somebody has no batch yet.
  STOP = 'stop'


class Agreement:
  """How the learners of a run keep in step.

  As it stands here that of one learner, which waits for nobody; `distributed.gang` has
  that of several.

  Attributes:
    index: of this learner.
    count: learners of the run.
  """

  index = 0
  count = 1

  @property
  def stopped_by(self) -> int | None:
    """The other learner that wanted to stop, if one did and this one follows it."""
    return None

  def decide(self, ready: bool, stop: bool) -> Verdict:
    """What to do now, as all learners agree; takes at most about half a second.

    Args:
      ready: whether this learner has its share of the next batch. Once it has, it
        must say so until the verdict is GO or STOP.
      stop: whether this learner wants to stop.

    Raises:
      RuntimeError: another learner is gone or says nothing.
    """
    if stop:
      return Verdict.STOP
    return Verdict.GO if ready else Verdict.WAIT

  @contextlib.contextmanager
  def updating(self) -> Iterator[None]:
    """Around waits for the device, which waits for the others. Bounded in time."""
    yield

  @contextlib.contextmanager
  def together(self) -> Iterator[None]:
    """What one learner cannot fail at without the others."""
    yield

  def gather(self) -> None:
    """Learner 0 waits here until all others have got here, too."""

  def spread(self, value: Any = None) -> Any:
    """Gives to all what learner 0 says: anything that JSON can hold."""
    return value

  def finish(self) -> None:
    """The last step: nobody leaves before everybody has come so far."""
