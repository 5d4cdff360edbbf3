"""The learner host of `fleet_benchmark`: all but the update itself."""

import argparse
import contextlib
import functools
import threading
import time

import jax
import numpy as np

from impala_jax import config as config_lib
from impala_jax import types
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.control import protocol as control_lib
from impala_jax.distributed.transport import protocol as transport
from impala_jax.learning import learner as learner_lib


class Learner:
  """Reads batches in a thread, counts what is in them and publishes versions."""

  def __init__(
    self,
    reader: transport.Reader,
    control: control_lib.Control,
    params: types.Nest,
    args: argparse.Namespace,
  ):
    self._reader = reader
    self._control = control
    self._pause = args.update_ms / 1e3
    self.publishes = True
    self.updates = self.version = 0
    self.accepted = np.zeros(args.clients, np.int64)
    self.lag: list[np.ndarray] = []
    self.failure: Exception | None = None
    self._stop = threading.Event()
    self._copy = functools.partial(learner_lib.to_host, params)
    control.publish(0, self._copy)
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def close(self) -> None:
    self._stop.set()
    self._thread.join(10.0)

  def _run(self) -> None:
    try:
      while not self._stop.is_set():
        with contextlib.suppress(TimeoutError):
          self._update(self._reader.read(0.5))
    except Exception as e:
      self.failure = e

  def _update(self, batch: transport.Batch) -> None:
    header = self._reader.layout.header(batch.rows)
    self.lag.append(self.version - header['version'])
    self.accepted += np.bincount(header['actor_id'], minlength=len(self.accepted))
    time.sleep(self._pause)
    batch.release()
    self.updates += 1
    if self.publishes:
      self.version += 1
      self._control.publish(self.version, self._copy)


def parameters() -> types.Nest:
  """Those of the shallow network on DeepMind Lab, as a learner holds them."""
  spec = types.EnvironmentSpec(
    types.ArraySpec((72, 96, 3), np.dtype(np.uint8)), num_actions=9
  )
  network = config_lib.Network(
    torso='shallow', hidden=256, lstm=256, frame_stack=1, last_action_reward=True
  )
  params = agent_lib.from_config(network, spec).init(jax.random.key(0))
  return jax.tree.map(lambda x: jax.device_put(x[None]), params)
