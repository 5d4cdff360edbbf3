"""Recorded episodes of the real engine, played back through the adapter."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest

from impala_jax.environments import instruction_ids
from impala_jax.environments.dmlab import environment as dmlab

FOLDER = pathlib.Path(__file__).parents[3].parent / 'shared' / 'fixtures' / 'dmlab'
FILES = sorted(FOLDER.glob('*.npz'))
pytestmark = pytest.mark.skipif(not FILES, reason='no recorded episodes here')


class Tape:
  """An engine that can only do what was done when the recording was made."""

  def __init__(self, data):
    self.data = data
    self.position = 0
    self.running = False

  def construct(self, level, observations, config, renderer, level_cache):
    assert level == str(self.data['level'])
    assert observations == ['RGB_INTERLEAVED', 'INSTR']
    assert config.items() >= json.loads(str(self.data['config'])).items()
    assert (renderer, level_cache) == ('software', None)
    return self

  def reset(self, seed):
    assert type(seed) is int
    assert self.data['first'][self.position]
    self.running = True

  def is_running(self):
    return self.running

  def observations(self):
    if not self.running:
      raise RuntimeError('Environment in wrong status for call to observations()')
    return {
      'RGB_INTERLEAVED': self.data['frames'][self.position],
      'INSTR': str(self.data['instr'][self.position]),
    }

  def step(self, action, num_steps):
    assert self.running
    assert action.dtype == np.intc
    assert action.flags.c_contiguous
    t = self.position
    np.testing.assert_array_equal(action, self.data['raw_actions'][t])
    assert num_steps == self.data['num_steps']
    self.running = not self.data['terminal'][t]
    self.position += 1
    return float(self.data['rewards'][t])

  def close(self):
    self.running = False


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_playback(path, monkeypatch):
  with np.load(path) as loaded:
    data = {name: loaded[name] for name in loaded.files}
  tape = Tape(data)
  module = types.SimpleNamespace(Lab=tape.construct)
  monkeypatch.setitem(sys.modules, 'deepmind_lab', module)
  environment = dmlab.make(
    path.stem,
    0,
    config=json.loads(str(data['config'])),
    level_cache_gib=0.0,
  )
  step = environment.reset()
  ends = 0
  for t in range(len(data['actions']) - 1):
    assert step.first() == data['first'][t]
    np.testing.assert_array_equal(step.observation['frame'], data['frames'][t])
    np.testing.assert_array_equal(
      step.observation['instruction'],
      instruction_ids.hash_instruction(str(data['instr'][t])),
    )
    before, step = step, environment.step(int(data['actions'][t]))
    assert step.reward == data['rewards'][t]
    assert step.discount == (0.0 if data['terminal'][t] else 1.0)
    if step.last():
      assert data['terminal'][t]
      ends += 1
      for name, value in before.observation.items():
        np.testing.assert_array_equal(step.observation[name], value)
      step = environment.step(0)
  assert ends == data['terminal'].sum() == 1
  assert tape.position == len(data['actions']) - 1
