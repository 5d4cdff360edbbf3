"""Training from Python: `impala_jax.train`, `impala_jax.evaluate`.

One process, actors as threads; the same learner, actors and configuration as a run
on many machines.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import dm_env
import jax
import numpy as np
import numpy.typing as npt

from impala_jax import components, losses, types
from impala_jax import config as config_lib
from impala_jax.agents import agent as agent_lib
from impala_jax.distributed.roles import all_in_one
from impala_jax.environments import specs
from impala_jax.evaluation import playing
from impala_jax.learning import learner
from impala_jax.reporting import record as record_lib
from impala_jax.runtime.run_directory import RunDirectory


class TrainResult(NamedTuple):
  """A trained agent and how it got there."""

  agent: agent_lib.Agent
  params: types.Nest  # NumPy leaves.
  records: list[dict[str, Any]]  # Over time, as in `metrics.jsonl`.
  config: config_lib.Config
  parts: components.Components

  @property
  def episode_return(self) -> float:
    """Mean return of the last 100 training episodes; NaN before the first."""
    found = [r['episode_return'] for r in self.records if 'episode_return' in r]
    return found[-1] if found else float('nan')


def train(
  config: config_lib.Config | None = None,
  *,
  environment: Callable[..., dm_env.Environment] | None = None,
  network: Any = None,
  loss: losses.LossFn | None = None,
  total_frames: int | None = None,
  run_dir: str | pathlib.Path | None = None,
  on_record: Callable[[dict[str, Any]], None] | None = None,
  should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
  """Trains in this process.

  Args:
    config: the whole configuration; by default one that suits `environment`. Its
      transport is taken as `local`.
    environment: makes one `dm_env.Environment`; called with `seed=` if it has such
      a parameter. By default what `config.environment` says.
    network: a flax module as `agents.agent.make_agent` takes it; by default what
      `config.network` says.
    loss: `(outputs [T + 1, B], unroll [T + 1, B]) -> (loss, metrics)`; by default
      what `config.loss` says.
    total_frames: instead of the configured number.
    run_dir: keeps metrics, checkpoints and evaluations there, and goes on from a
      checkpoint found there. By default nothing is kept.
    on_record: called with each record, see `docs/metrics.md`.
    should_stop: asked at least twice a second; ends the training early.

  Raises:
    config.ConfigError: lists all impossible settings.
    ValueError: environment, network and each other do not fit; says how; or `run_dir`
      is empty.
    launching.backends.backend.BackendError: something runs in `run_dir` already.
    learning.checkpointing.CheckpointError: `run_dir` has checkpoints, and none is sound
      and of a run whose network and optimiser are these.
  """
  if run_dir is not None and not str(run_dir):
    raise ValueError("run_dir is '': must name a directory, or be None to keep nothing")
  if config is None:
    if environment is None:
      raise config_lib.ConfigError(
        'train() needs a config or an environment: give one of them'
      )
    config = _default_config(environment)
  changes: dict[str, Any] = {
    'transport': dataclasses.replace(config.transport, kind='local')
  }
  if total_frames is not None:
    changes['learner'] = dataclasses.replace(config.learner, total_frames=total_frames)
  config = dataclasses.replace(config, **changes)
  parts = components.build(config, components.Custom(environment, network, loss))
  records: list[dict[str, Any]] = []

  def record(status: record_lib.Status) -> None:
    records.append({**status.record.flat(), 'bottleneck': status.bottleneck})
    if on_record is not None:
      on_record(records[-1])

  if run_dir is None:
    loop = all_in_one.run(parts, None, should_stop, record)
  else:
    # Late: what launches runs is for those alone who keep one.
    from impala_jax.launching.backends import ownership

    path = pathlib.Path(run_dir)
    with ownership.held(RunDirectory(path.absolute())) as check:
      loop = all_in_one.run(parts, path, should_stop, record, check)
  params = jax.tree.map(np.copy, learner.to_host(loop.state.params))
  return TrainResult(parts.agent, params, records, config, parts)


def evaluate(
  result: TrainResult,
  episodes: int = 20,
  *,
  level: str | None = None,
  greedy: bool = False,
  seed: int = 0,
) -> npt.NDArray[np.float64]:
  """Returns of whole episodes played with the trained agent.

  Args:
    result: of `train`.
    episodes: how many, played side by side.
    level: one of the configured levels; by default the first.
    greedy: take the likeliest action instead of sampling one.
    seed: of environments and sampling.

  Returns:
    float64 [episodes], raw returns.
  """
  chosen = level or result.config.environment.levels[0]
  vector = result.parts.make_evaluation(chosen, episodes)
  try:
    played = playing.play(result.agent, result.params, vector, seed=seed, greedy=greedy)
  finally:
    vector.close()
  return np.array([e.episode_return for e in played])


def _default_config(
  environment: Callable[..., dm_env.Environment],
) -> config_lib.Config:
  """A small network of the right kind for one's own environment."""
  probe = environment()
  observation = specs.environment_spec(probe).observation
  probe.close()
  frame = observation.get('frame') if isinstance(observation, dict) else observation
  image = frame is not None and len(frame.shape) == 3 and frame.dtype == np.uint8
  return config_lib.Config(
    environment=config_lib.Environment(suite='custom', levels=('custom',)),
    network=config_lib.Network(
      torso='shallow' if image else 'mlp', hidden=256 if image else 64, frame_stack=1
    ),
    optimizer=config_lib.Optimizer(name='adam', learning_rate=1e-3, epsilon=1e-8),
    actor=config_lib.Actor(envs_per_actor=16),
    learner=config_lib.Learner(batch_size=16, total_frames=500_000),
  )
