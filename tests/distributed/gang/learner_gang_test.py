"""Two learner processes update as one process with as many devices does."""

import contextlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from impala_jax import components
from impala_jax import config as config_lib
from impala_jax.learning import learner as learner_lib
from tests import network_namespaces, strange_machine, synthetic

UPDATES = 3


def start(run_dir, devices: int, index: int, machine, host=None):
  """One of two learners; on a host of a network, or all on this machine."""
  here = {'IMPALA_COUNT': '2', 'IMPALA_INDEX': str(index)}
  if host is not None:
    here['IMPALA_HOST'] = host.address
  return (host.popen if host is not None else subprocess.Popen)(
    [
      *machine.enter,
      sys.executable,
      '-m',
      'tests.gang_process',
      str(run_dir),
      str(devices),
      str(UPDATES),
    ],
    env={**machine.environment, **here},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.parametrize(
  ('devices', 'strange', 'hosts'), [(1, True, 1), (2, False, 1), (1, True, 2)]
)
def test_two_processes_give_the_update_of_one_with_all_devices(
  tmp_path, devices, strange, hosts
):
  machine = strange_machine.Machine(strange)
  with contextlib.ExitStack() as stack:
    places = [None, None]
    if hosts == 2:
      network_namespaces.require()
      network = stack.enter_context(network_namespaces.Network(['first', 'second']))
      places = list(network.hosts.values())
    processes = [start(tmp_path, devices, i, machine, places[i]) for i in (0, 1)]
    for process in processes:
      stack.callback(process.wait)
      stack.callback(process.kill)
    for process in processes:
      output, _ = process.communicate(timeout=240)
      assert process.returncode == 0, output
      assert 'proxy' not in output
  learner = synthetic.make_learner(synthetic.config(), 2 * devices)
  state = learner.init(0)
  first = jax.tree.leaves(learner_lib.to_host(learner.snapshot(state)))
  for i in range(UPDATES):
    state, _, _ = learner.update(state, learner.put(synthetic.rows(i)))
  expected = jax.tree.leaves(learner_lib.to_host(state))
  assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(first, expected, strict=True))
  for index in (0, 1):
    found = list(np.load(tmp_path / f'state-{index}.npz').values())
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_the_batch_must_divide_over_all_devices_of_all_learners():
  config = config_lib.override(synthetic.config(), ['learner.batch_size=36'])
  config_lib.validate(config, 4, learners=3)
  with pytest.raises(
    config_lib.ConfigError,
    match=r'learner.batch_size is 36: must be a multiple of the number of devices '
    r'\(2 learners x 4\): 36 = 4 x 8 \+ 4',
  ):
    config_lib.validate(config, 4, learners=2)


def test_all_learners_must_use_equally_many_devices(monkeypatch):
  config = synthetic.config(learner__batch_size='8')
  parts = components.Components(config, None, None, None, components.Custom())
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  devices = jax.devices()
  monkeypatch.setattr(
    jax, 'local_devices', lambda process_index: devices[: 2 - process_index]
  )
  with pytest.raises(
    config_lib.ConfigError,
    match=r'num_devices is 0 \(all\): the learners have 2, 1 devices.*at most 1',
  ):
    parts.make_learner()


def test_a_configuration_becomes_parts_without_touching_a_device(tmp_path):
  # Else it would be too late for several learners to join.
  code = (
    'from impala_jax import components, configs; import jax;'
    "components.build(configs.get('catch'));"
    "jax.config.update('jax_platforms', 'nowhere');"
    'print(jax.devices())'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  # Had a device been in use, that late change would have had no effect.
  assert done.returncode == 1
  assert 'nowhere' in done.stderr
