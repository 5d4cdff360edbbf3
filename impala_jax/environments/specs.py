"""What a network must know of an environment, from `dm_env` specs."""

from collections.abc import Sequence
from typing import Any

import dm_env
import numpy as np
from dm_env import specs

from impala_jax import types

# What neither JAX without 64 bits nor the binary unroll holds.
_NARROWER = {'f8': 'f4', 'i8': 'i4', 'u8': 'u4', 'b1': 'u1'}


def environment_spec(environment: dm_env.Environment) -> types.EnvironmentSpec:
  """What a network must know of a `dm_env` environment.

  64-bit dtypes become 32-bit ones and bool becomes uint8; `vector.SequentialVector`
  converts the observations alike.

  Raises:
    ValueError: actions are not discrete from 0, or an observation is neither an
      array of numbers nor a dict of such; the text names it.
  """
  action = environment.action_spec()
  if not isinstance(action, specs.DiscreteArray):
    raise ValueError(
      f'action spec is {action}: must be dm_env.specs.DiscreteArray '
      '(one action, numbered from 0)'
    )
  given = environment.observation_spec()
  if isinstance(given, dict):
    observation: Any = {k: _array_spec(v, k) for k, v in given.items()}
  else:
    observation = _array_spec(given, 'observation')
  return types.EnvironmentSpec(observation, int(action.num_values))


def _array_spec(spec: Any, name: str) -> types.ArraySpec:
  if not isinstance(spec, specs.Array) or spec.dtype.kind not in 'fiub':
    raise ValueError(
      f'observation {name!r} is {spec}: must be a dm_env.specs.Array of numbers, or a '
      'dict of such (flatten nested ones; encode text as numbers)'
    )
  code = spec.dtype.str[1:]
  return types.ArraySpec(tuple(spec.shape), np.dtype(_NARROWER.get(code, code)))


def common_spec(given: Sequence[types.EnvironmentSpec]) -> types.EnvironmentSpec:
  """The one spec that all have; ValueError where they differ."""
  for i, s in enumerate(given):
    if s != given[0]:
      raise ValueError(
        f'environments must agree in observations and actions: environment {i} has '
        f'{s}, environment 0 has {given[0]}'
      )
  return given[0]
