"""Agents must learn: Catch to a mean return of 0.95 over the last 100 episodes.

A random player has about -0.6. Both transports, and one's own parts.
"""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import impala_jax
from impala_jax import configs, losses
from impala_jax.agents import networks
from impala_jax.environments import catch
from tests import transports

_THRESHOLD = 0.95
pytestmark = pytest.mark.learning


def test_catch_is_learned_in_one_process():
  result = impala_jax.train(configs.get('catch'))
  assert result.episode_return >= _THRESHOLD
  assert impala_jax.evaluate(result, episodes=256, seed=5).mean() >= _THRESHOLD
  assert result.records[-1]['skipped'] == 0


def test_catch_is_learned_by_processes(tmp_path):
  run_dir = tmp_path / 'run'
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  subprocess.run(
    [
      sys.executable,
      '-m',
      'launch.run_atari',
      '--config=catch',
      '--view=plain',
      f'--transport={transports.BETWEEN_PROCESSES}',
      '--num_actors=2',
      '--set=evaluator.episodes=256',
      f'--run_dir={run_dir}',
    ],
    env=environment,
    check=True,
    timeout=280,
  )
  last = json.loads((run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['episode_return'] >= _THRESHOLD
  assert last['unrolls_lost'] == last['unrolls_corrupted'] == 0
  evaluations = (run_dir / 'evaluations.jsonl').read_text().splitlines()
  assert json.loads(evaluations[-1])['mean'] >= _THRESHOLD


class _OwnTorso(nn.Module):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.tanh(nn.Dense(48)(x.reshape(x.shape[0], -1)))


def test_own_environment_network_and_loss():
  """As the README shows it."""
  config = configs.get('catch')
  impala_loss = losses.make_loss(config.loss)

  def own_loss(output, unroll):
    loss, metrics = impala_loss(output, unroll)
    penalty = 1e-4 * jnp.sum(jnp.square(output.logits))
    return loss + penalty, {**metrics, 'logit_loss': penalty}

  result = impala_jax.train(
    config,
    environment=catch.Catch,
    network=networks.ImpalaNetwork(num_actions=3, torso=_OwnTorso(), lstm=32),
    loss=own_loss,
  )
  assert result.episode_return >= _THRESHOLD
  assert np.isfinite(result.records[-1]['logit_loss'])
