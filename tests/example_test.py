"""The algorithm on one page: it learns, and its loss is the package's own."""

import jax
import numpy as np
import pytest

from examples import impala_in_one_file as example
from impala_jax import config, losses
from impala_jax.learning import learner
from tests import packed_unrolls


def test_its_loss_is_that_of_the_package():
  output, unroll = packed_unrolls.make_batch(0)
  for b, starts in enumerate(([2, 7], [12])):
    packed_unrolls.cut(output, unroll, b, starts, packed_unrolls.ENDS, -7.0)
  rng = np.random.default_rng(0)
  shape = (packed_unrolls.T + 1, packed_unrolls.B)
  unroll = unroll._replace(
    timestep=unroll.timestep._replace(
      observation=rng.normal(size=(*shape, 10, 5)).astype(np.float32)
    ),
    last_action=np.zeros(packed_unrolls.B, np.int32),
    agent_state=example.AGENT.initial_state(packed_unrolls.B),
  )
  expected = losses.make_loss(
    config.Loss(
      discount=example.DISCOUNT,
      baseline_cost=example.BASELINE_COST,
      entropy_cost=example.ENTROPY_COST,
      reward_clipping='none',
    )
  )
  params = example.AGENT.init(jax.random.key(0))
  (value, _), gradient = jax.jit(jax.value_and_grad(example.loss, has_aux=True))(
    params, unroll
  )
  (want, _), want_gradient = jax.jit(
    jax.value_and_grad(learner.objective(example.AGENT, expected), has_aux=True)
  )(params, unroll)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert min(np.abs(x).max() for x in jax.tree.leaves(want_gradient)) > 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    gradient,
    want_gradient,
  )


@pytest.mark.learning
def test_it_learns(capsys):
  assert example.train(seed=1) >= 0.95
  assert capsys.readouterr().out.count('mean return') == 10
