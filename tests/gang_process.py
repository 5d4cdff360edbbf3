"""One learner of a gang, for `learner_gang_test`: some updates, then state to a file.

Arguments: run directory, devices of this process, updates. The rest comes by
environment variables, as from a launcher.
"""

import dataclasses
import os
import pathlib
import sys


def main(run_dir: pathlib.Path, devices: int, updates: int) -> None:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
  import jax
  import numpy as np

  from impala_jax import losses, optimizers
  from impala_jax.distributed.gang import start as gang_start
  from impala_jax.learning import agreement
  from impala_jax.learning import learner as learner_lib
  from impala_jax.runtime import role_environment
  from tests import synthetic

  here = role_environment.RoleEnvironment.read()
  gang = gang_start.join(dataclasses.replace(here, run_dir=run_dir), lambda: False)
  assert gang is not None
  config = synthetic.config()
  learner = learner_lib.Learner(
    synthetic.agent(),
    losses.make_loss(config.loss),
    optimizers.make_optimizer(config),
    synthetic.layout(),
    jax.devices(),
  )
  assert learner.num_devices == gang.count * devices
  share = 4 // gang.count
  own = slice(gang.index * share, (gang.index + 1) * share)
  state = learner.init(0)
  for i in range(updates):
    while (verdict := gang.decide(True, False)) is agreement.Verdict.WAIT:
      pass
    assert verdict is agreement.Verdict.GO
    rows = np.ascontiguousarray(synthetic.rows(i)[own])
    with gang.updating():
      state, params, _ = learner.update(state, learner.put(rows))
  copy = learner_lib.to_host(learner.snapshot(state))
  jax.tree.map(np.testing.assert_array_equal, copy.params, learner_lib.to_host(params))
  np.savez(run_dir / f'state-{gang.index}.npz', *jax.tree.leaves(copy))
  gang.finish()
  sys.stdout.flush()
  os._exit(0)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
