"""How an inference server follows its learner: parameters, reports, patience, ends."""

import dataclasses
import types as simple

import numpy as np
import pytest

from impala_jax import components, configs
from impala_jax import config as config_lib
from impala_jax.distributed.inference import batcher as inference_batcher
from impala_jax.distributed.roles import inference as inference_role
from impala_jax.distributed.transport import protocol as transport
from impala_jax.runtime.role_environment import RoleEnvironment

_LENGTH, _ENVS = 9, 4


class _Link:
  """A learner with a newer version at every call, or one that is away."""

  def __init__(self):
    self.asked = []
    self.reports = []
    self.away = self.ended = False

  def fetch(self, have_version):
    if self.away:
      raise transport.TransportError('learner at nowhere: unavailable')
    self.asked.append(have_version)
    return len(self.asked), {'w': np.zeros(1)}

  def report(self, report):
    self.reports.append(report)
    return not self.ended


class _Batcher:
  """Serves so many rows with each look at its counts."""

  def __init__(self, link, step, looks):
    self._link, self._step, self._left = link, step, looks
    self._totals = inference_batcher.Totals()
    self.error = None

  def totals(self):
    self._left -= 1
    self._link.ended = self._left <= 0
    self._totals.rows += self._step
    return dataclasses.replace(self._totals)

  def environments(self):
    return _ENVS

  def clients(self):
    return 1


@pytest.fixture
def link(monkeypatch):
  monkeypatch.setattr(inference_role, '_TICK', 0.0)
  return _Link()


def _following(link, *settings):
  config = config_lib.override(
    configs.get('catch'), [f'actor.unroll_length={_LENGTH}', *settings]
  )
  policy = simple.SimpleNamespace(version=-1)

  def take(version, params):
    policy.version = version

  policy.set_parameters = take
  here = RoleEnvironment(index=2, incarnation=5)
  made = inference_role._Following(
    components.build(config), policy, link, here, lambda: False
  )
  made._reporter._interval = 0.0
  return made, policy


def test_parameters_are_fetched_once_in_the_time_of_an_unroll(link):
  following, policy = _following(link)
  assert following.renew(first=True)
  # Every look and every report finds one row more.
  following.follow(_Batcher(link, 1, looks=400))
  unrolls = 400 // (_LENGTH * _ENVS)
  assert unrolls - 2 <= len(link.asked) <= unrolls + 1
  # Each asks for what is newer than the one before.
  assert link.asked == [-1, *range(1, len(link.asked))]
  assert policy.version == len(link.asked)
  last = link.reports[-1]
  assert (last.role, last.index, last.incarnation) == ('inference', 2, 5)
  assert last.gauges['version'] == policy.version
  assert not last.left
  following.say_goodbye()
  assert link.reports[-1].left


def test_with_a_limit_of_lag_the_learner_is_asked_more_often(link):
  following, _ = _following(link, 'learner.max_policy_lag=40')
  following.renew(first=True)
  following.follow(_Batcher(link, 1, looks=50))
  tolerant = [have for have in link.asked[1:] if have >= 10]
  assert len(tolerant) > 10


def test_it_goes_on_without_the_learner_and_gives_up_in_the_end(link):
  following, policy = _following(link)
  following.renew(first=True)
  link.away = True
  assert not following.renew()
  assert policy.version == 1
  following._patience = -1.0
  with pytest.raises(transport.TransportError, match=r'server 2 .*nowhere'):
    following.renew()


def test_an_error_of_the_batcher_ends_it(link):
  following, _ = _following(link)
  batcher = _Batcher(link, 1, looks=400)
  batcher.error = RuntimeError('out of memory')
  with pytest.raises(RuntimeError, match='out of memory'):
    following.follow(batcher)
