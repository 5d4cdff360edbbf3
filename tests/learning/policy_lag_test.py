"""The limit of lag: what trains is never older than it allows."""

import threading

import numpy as np

import impala_jax
from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import prefetcher


class _Reader:
  """Notes the limit under which each batch was read."""

  def __init__(self):
    self.limit = self.newest = None
    self.limits = []
    self.enough = threading.Event()

  def refuse_older(self, version):
    self.limit = version

  def refuse_newer(self, version):
    self.newest = version

  def read(self, timeout):
    if len(self.limits) == 5:
      self.enough.set()
      raise transport.Closed
    self.limits.append((self.limit, self.newest))
    return transport.Batch(np.zeros((1, 1), np.uint8))


def _limits(**kwargs):
  reader = _Reader()
  batches = prefetcher.Prefetcher(reader, lambda rows: rows, **kwargs)
  for _ in range(5):
    assert batches.get(timeout=30.0) is not None
  assert reader.enough.wait(30.0)
  batches.close()
  return reader.limits


def test_each_batch_is_read_for_the_update_that_it_is_for():
  newest = range(10, 15)
  assert _limits(update=10, max_lag=4) == [(n - 4, n) for n in newest]
  assert _limits(update=10) == [(None, n) for n in newest]
  # Actors may still have what a learner that is gone gave out.
  assert _limits(update=10, given_out=12) == [(None, max(n, 12)) for n in newest]


def test_a_run_keeps_its_limit_and_goes_on():
  config = config_lib.override(
    configs.get('catch'),
    [
      'actor.envs_per_actor=64',
      'learner.batch_size=8',
      'learner.max_policy_lag=8',
      'learner.metrics_interval=0.2',
      'learner.total_frames=40_000',
    ],
  )
  records = impala_jax.train(config).records
  assert records[-1]['frames'] >= 40_000
  assert max(r['policy_lag_max'] for r in records) <= 8
  # 64 environments make 8 updates in the time of one unroll, and a queue waits, too.
  assert records[-1]['unrolls_stale'] > 0
  assert records[-1]['unrolls_lost'] == records[-1]['unrolls_duplicated'] == 0
