"""Specifications and random inputs for the agent's tests."""

import jax
import numpy as np

from impala_jax import types


def spec(shape=(24, 20, 1), dtype=np.uint8, num_actions=5, instruction=0):
  observation = types.ArraySpec(tuple(shape), np.dtype(dtype))
  if instruction:
    words = types.ArraySpec((instruction,), np.dtype(np.int32))
    observation = {'frame': observation, 'instruction': words}
  return types.EnvironmentSpec(observation, num_actions)


def inputs(spec, steps, batch, seed=0, first=None):
  """Random time steps [T, B, ...] and last actions [T, B].

  `first` is bool [T, B]; on those steps reward and last action are garbage.
  """
  rng = np.random.default_rng(seed)
  if first is None:
    first = rng.random((steps, batch)) < 0.25
  first = np.asarray(first, bool)

  def observe(s):
    shape = (steps, batch, *s.shape)
    if s.dtype == np.uint8:
      return rng.integers(0, 256, shape, np.uint8)
    if s.dtype == np.int32:
      return rng.integers(0, 3, shape, np.int32)
    return rng.normal(size=shape).astype(s.dtype)

  timestep = types.TimeStep(
    step_type=np.where(first, types.StepType.FIRST, types.StepType.MID).astype(
      np.uint8
    ),
    reward=np.where(first, np.nan, rng.normal(size=(steps, batch))).astype(np.float32),
    discount=np.where(first, np.nan, 1.0).astype(np.float32),
    observation=jax.tree.map(
      observe, spec.observation, is_leaf=lambda x: isinstance(x, types.ArraySpec)
    ),
  )
  last_action = rng.integers(0, spec.num_actions, (steps, batch))
  last_action = np.where(first, 2**31 - 1, last_action).astype(np.int32)
  return timestep, last_action


def at(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


def assert_close(got, want, tolerance=1e-5):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def garbage_like(tree):
  """The worst that memory may hold: NaN, or 255."""
  return jax.tree.map(
    lambda x: np.full(x.shape, np.nan if x.dtype.kind == 'f' else 255, x.dtype), tree
  )
