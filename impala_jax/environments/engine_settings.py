"""Settings of suites whose engines run in processes of their own."""

import dataclasses

from impala_jax.settings import NOT_NEGATIVE, POSITIVE, at_most, setting


@dataclasses.dataclass(frozen=True)
class EngineSettings:
  """What a `pool.ProcessPool` bears of its engines; suites inherit it."""

  step_timeout: float = setting(
    60.0,
    'An engine that takes more seconds for a step is replaced. One that computes all '
    'the while, a map for example, has the time of a reset.',
    POSITIVE,
  )
  reset_timeout: float = setting(
    300.0,
    'An engine that takes more seconds to start, or to begin an episode, is replaced.',
    POSITIVE,
  )
  engine_restarts: int = setting(
    5,
    'The engine of one environment is replaced so often within ten minutes. Then the '
    "environment plays another of the run's levels, or is given up.",
    NOT_NEGATIVE,
    at_most(1_000_000),
  )
