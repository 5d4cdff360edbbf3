"""A policy on a device: where it runs, and that sizes and chunks do not show."""

import json

import jax
import numpy as np
import pytest

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.acting import device_policy
from impala_jax.launching import processes
from impala_jax.runtime.run_directory import RunDirectory
from tests import synthetic


def _steps(count, seed=0):
  rng = np.random.default_rng(seed)
  return types.TimeStep(
    np.full(count, types.StepType.MID, np.uint8),
    rng.normal(size=count).astype(np.float32),
    np.ones(count, np.float32),
    rng.normal(size=(count, 3, 2)).astype(np.float32),
  )


def test_auto_leaves_the_choice_to_jax_and_names_take_turns():
  assert device_policy.device_for('auto', 5, 'actor.platform') is None
  devices = jax.local_devices(backend='cpu')
  for index in range(len(devices) + 1):
    found = device_policy.device_for('cpu', index, 'actor.platform')
    assert found == devices[index % len(devices)]


@pytest.mark.parametrize('platform', ['gpu', 'tpu'])
def test_a_device_that_is_not_there_is_refused(platform):
  if jax.default_backend() == platform:
    pytest.skip(f'there is a {platform} here')
  words = f"inference.platform is '{platform}': JAX finds no such device .* it has cpu"
  with pytest.raises(config_lib.ConfigError, match=words):
    device_policy.device_for(platform, 0, 'inference.platform')


@pytest.mark.parametrize('device', [None, 'last'])
def test_rows_are_the_same_in_every_size_and_on_every_device(device):
  if device is not None:
    device = jax.local_devices()[-1]
  agent = synthetic.agent()
  params = agent.init(jax.random.key(0))
  found = []
  for sizes in ([7], [2, 4, 8], [16]):
    policy = device_policy.DevicePolicy(agent, 7, sizes, device=device, greedy=True)
    policy.set_parameters(5, params)
    policy.compile(synthetic.SPEC)
    out = []
    for step in range(3):
      ids = np.array([6, 0, 3, 2], np.int32)[: 4 - step]
      running = policy.start(
        ids, _steps(len(ids), step), np.zeros(len(ids), np.int32), ids > 1
      )
      assert running.version == 5
      (action, log_prob, logits), states = policy.finish(running)
      assert len(action) == len(ids)
      out.append((action, log_prob, logits, states))
      if device is not None:
        assert running.out[0].devices() == {device}
    policy.reset(np.array([6], np.int32))
    running = policy.start(
      np.array([6], np.int32), _steps(1), np.zeros(1, np.int32), np.ones(1, bool)
    )
    states = policy.finish(running)[1]
    assert all(not x.any() for x in jax.tree.leaves(states))
    found.append(out)
  for other in found[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      found[0],
      other,
    )


def test_each_call_draws_anew_and_its_padding_is_nobodys():
  """A key used twice would make all steps of an episode choose alike."""
  agent = synthetic.agent()
  policy = device_policy.DevicePolicy(agent, 64, [64], seed=1)
  policy.set_parameters(0, agent.init(jax.random.key(0)))
  first = _steps(64)._replace(step_type=np.zeros(64, np.uint8))

  def begin_episodes():
    """Actions, and the states before: always the same inputs, so the same after."""
    running = policy.start(
      np.arange(64, dtype=np.int32), first, np.zeros(64, np.int32), np.ones(64, bool)
    )
    (action, _, _), states = policy.finish(running)
    return action, states

  draws, before = zip(*[begin_episodes() for _ in range(3)], strict=True)
  for a, b in ((0, 1), (0, 2), (1, 2)):
    # Of 64 decisions by the same probabilities about a quarter agree.
    assert np.mean(draws[a] == draws[b]) < 0.6
  policy.finish(
    policy.start(
      np.array([5], np.int32), _steps(1, 7), np.zeros(1, np.int32), np.zeros(1, bool)
    )
  )
  _, after = begin_episodes()
  for x, y in zip(jax.tree.leaves(before[-1]), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(np.flatnonzero((x != y).any(axis=1)), [5])


@pytest.mark.parametrize(
  ('role', 'platform', 'jax_platforms', 'one_thread', 'preallocate'),
  [
    ('actor', 'auto', 'cpu', True, None),
    ('actor', 'gpu', 'mine', True, 'false'),
    ('evaluator', 'auto', 'cpu', True, None),
    ('inference', 'auto', 'mine', False, 'false'),
    ('inference', 'cpu', 'cpu', False, None),
    ('learner', 'auto', 'mine', False, None),
  ],
)
def test_what_processes_are_told_of_their_device(
  tmp_path, monkeypatch, role, platform, jax_platforms, one_thread, preallocate
):
  monkeypatch.setenv('JAX_PLATFORMS', 'mine')
  monkeypatch.delenv('NPROC', raising=False)
  config = {'config': {role: {'platform': platform}}}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  environment = processes.environment_of(RunDirectory(tmp_path), role, 0, 0)
  assert environment['JAX_PLATFORMS'] == jax_platforms
  assert ('NPROC' in environment) == one_thread
  assert environment.get('XLA_PYTHON_CLIENT_PREALLOCATE') == preallocate
