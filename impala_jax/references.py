"""What is known beforehand of levels: the returns that score 0 and 100."""

from typing import NamedTuple

from impala_jax.environments import dmlab30


class Reference(NamedTuple):
  """Of one level."""

  name: str  # Of the version that the level is tested on.
  random: float | None = None  # Mean return of random play; scores 0.
  full: float | None = None  # The return that scores 100; known where `random` is.
  full_is: str = ''  # Whose return that is.

  def score(self, mean_return: float) -> float | None:
    """100 · (r − random) / (full − random), not capped; None where unknown."""
    if self.random is None or self.full is None:
      return None
    return 100.0 * (mean_return - self.random) / (self.full - self.random)


def find(suite: str, level: str) -> Reference:
  """For a level of a configuration: `environment.suite` and one of its `levels`."""
  if suite == 'dmlab' and (known := dmlab30.find(level)) is not None:
    return Reference(known.test, known.random, known.human, 'human')
  if suite == 'doom':
    from impala_jax.environments import doom_suite

    if (scenario := doom_suite.SCENARIOS.get(level)) is not None:
      return Reference(level, scenario.random, scenario.reference, 'reference')
  return Reference(level)
