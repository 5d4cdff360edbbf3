"""Inference servers in this process, and what their clients run on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from impala_jax import types
from impala_jax.acting import device_policy
from impala_jax.distributed.inference import batcher as inference_batcher
from impala_jax.distributed.inference import connection as inference_connection
from impala_jax.distributed.inference import remote as remote_policy
from impala_jax.distributed.inference import server as inference_tcp
from impala_jax.distributed.inference import wire as inference_wire
from impala_jax.distributed.roles import policies

LONG = 120.0  # Seconds that a busy machine may take.
# Deadlines of a batch: in effect none, or at once.
NEVER, AT_ONCE = 3600.0, 0.0


class Served:
  """A server, and what makes clients of it.

  Attributes:
    address: where clients look; None while there is no server.
    policy, batcher, server: of the newest start.
  """

  def __init__(self, agent: Any, spec: types.EnvironmentSpec, params: Any, **settings):
    self._agent, self._spec, self._params = agent, spec, params
    self._settings = settings
    self.wire = policies.wire(agent, spec)
    self.starts = 0
    self.start()

  def start(self) -> None:
    s = {'room': 16, 'max_batch': 8, 'deadline': AT_ONCE, 'seed': 0, 'greedy': False,
         'version': 3, 'keys': None} | self._settings  # fmt: skip
    sizes = s.get('sizes') or inference_batcher.batch_sizes(s['max_batch'])
    self.policy = device_policy.DevicePolicy(
      self._agent, s['room'], sizes, seed=s['seed'], greedy=s['greedy']
    )
    self.policy.set_parameters(s['version'], self._params)
    self.policy.compile(self._spec)
    self.batcher = inference_batcher.Batcher(self.policy, s['room'], s['deadline'])
    self.server = inference_tcp.Server(self.batcher, self.wire, keys=s['keys'])
    self.address: str | None = self.server.address
    self.starts += 1

  def stop(self) -> None:
    """The server and all that it knows are gone."""
    self.address = None
    self.server.close()
    self.batcher.close()

  def connection(self, **settings: Any) -> inference_connection.Connection:
    assert self.address is not None
    return inference_connection.Connection(self.address, self.wire, **settings)

  def server_address(self) -> remote_policy.ServerAddress | None:
    address = self.address
    return (
      None if address is None else remote_policy.ServerAddress(address, self.starts)
    )

  def remote(
    self, client: str, num_envs: int, *others: 'Served'
  ) -> remote_policy.RemotePolicy:
    return remote_policy.RemotePolicy(
      [served.server_address for served in (self, *others)],
      lambda address: inference_connection.Connection(address, self.wire, timeout=LONG),
      client,
      num_envs,
    )


@contextlib.contextmanager
def serving(
  agent: Any, spec: types.EnvironmentSpec, params: Any, **settings: Any
) -> Iterator[Served]:
  served = Served(agent, spec, params, **settings)
  try:
    yield served
  finally:
    served.stop()


def request(
  spec: types.EnvironmentSpec,
  session: int,
  ids: list[int],
  begins: bool = False,
  first: bool = False,
) -> inference_wire.Request:
  """Of observations that hold the environments' ids."""
  k = len(ids)
  kind = types.StepType.FIRST if first else types.StepType.MID
  fill = np.asarray(ids).reshape(k, *[1] * len(spec.observation.shape))
  observation = np.zeros((k, *spec.observation.shape), spec.observation.dtype) + fill
  return inference_wire.Request(
    session,
    np.asarray(ids, np.int32),
    np.full(k, begins),
    np.zeros(k, np.int32),
    types.TimeStep(
      np.full(k, kind, np.uint8),
      np.zeros(k, np.float32),
      np.ones(k, np.float32),
      observation.astype(spec.observation.dtype),
    ),
  )
