"""One environment in a process of its own, as `process_pool` has it started.

Time steps go into the environment's slot of the pool's memory; then the process
announces itself and waits for a command to take the action in the slot. After a LAST
step that resets the environment. What the engine prints goes to a file, and an
exception that ends it is left in another: see `engine_link`.
"""

import contextlib
import importlib
import json
import logging
import mmap
import os
import pathlib
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import dm_env
import numpy as np

from impala_jax import types
from impala_jax.environments import specs
from impala_jax.environments.engines import link as engine_link
from impala_jax.runtime import files

NO_SEED = -1  # In the slot of an environment that has no `episode_seed`.
_MOST_WARNINGS = 100  # Of one engine.
_OUTPUT_LIMIT = 1 << 20  # Bytes of stdout and stderr that are kept at most.
_FLOAT32_MAX = float(np.finfo(np.float32).max)


# What an environment may count, by a method `counts` that returns a dict of some.
COUNTS = ('cache_hits', 'cache_misses', 'cache_evictions', 'cache_unwritable')
HEAD = np.dtype(
  [
    ('reward', np.float64),
    ('discount', np.float32),
    ('step_type', np.uint8),
    ('action', np.int32),
    ('pid', np.int32),
    ('episode_seed', np.int64),
    ('counts', np.int64, (len(COUNTS),)),
  ],
  align=True,
)
_HEAD_SIZE = 64  # Bytes, so that observations begin on a cache line.


class Job(NamedTuple):
  """What a process makes and what the pool expects of it."""

  maker: str  # package.module:function
  kwargs: dict[str, Any]
  spec: types.EnvironmentSpec


class BadOutput(Exception):
  """A time step that is none, or that does not fit the spec."""


def slot_dtype(spec: types.EnvironmentSpec) -> np.dtype:
  """The memory that an engine shares with its pool, whole pages: head, observation."""
  if isinstance(spec.observation, dict):
    fields = [(k, s.dtype, s.shape) for k, s in spec.observation.items()]
    observation = np.dtype(fields, align=True)
  else:
    observation = np.dtype((spec.observation.dtype, spec.observation.shape))
  page = mmap.ALLOCATIONGRANULARITY
  return np.dtype(
    {
      'names': ['head', 'observation'],
      'formats': [HEAD, observation],
      'offsets': [0, _HEAD_SIZE],
      'itemsize': -(-(_HEAD_SIZE + observation.itemsize) // page) * page,
    }
  )


def main(arguments: str) -> None:
  """Runs an engine until its pool closes; never returns if it fails."""
  keeper, directory, fds, env_id, generation, seed, _, prefixes = json.loads(arguments)
  engine_link.die_with(keeper)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  for fd in fds:
    os.set_inheritable(fd, False)  # Not for the engine's own children.
  engine = _Engine(pathlib.Path(directory), fds, env_id, generation, prefixes)
  try:
    engine.run(seed)
  except BaseException as e:  # Engines also raise SystemExit.
    engine.fail(e)


class _Engine:
  def __init__(
    self,
    directory: pathlib.Path,
    fds: list[int],
    env_id: int,
    generation: int,
    prefixes: list[str],
  ):
    self._directory = directory
    self._memory, self._done, self._credits, self._wake, self._commands, warnings = fds
    _pass_warnings_on(warnings, env_id)
    self._env_id = env_id
    self._generation = generation
    self._announcement = engine_link.ANNOUNCEMENT.pack(env_id, generation)
    self._prefixes = prefixes
    self._phase = 'start'
    self._environment: Any = None

  def run(self, seed: int) -> None:
    job: Job = pickle.loads(
      self._directory.with_name(f'{self._env_id}.job').read_bytes()
    )
    dtype = slot_dtype(job.spec)
    memory = mmap.mmap(
      self._memory, dtype.itemsize, offset=self._env_id * dtype.itemsize
    )
    slot = np.frombuffer(memory, dtype)
    head = slot['head']
    head['pid'] = os.getpid()
    action = head['action']
    environment = self._environment = find(job.maker)(seed=seed, **job.kwargs)
    given = specs.environment_spec(environment)
    if given != job.spec:
      raise ValueError(f'{job.maker} made {given}: its pool expects {job.spec}')
    if hasattr(environment, 'on_episode_seed'):
      environment.on_episode_seed = lambda seed: head.__setitem__('episode_seed', seed)
    self._record_shared_memory()
    write = _Writer(slot, job.spec)
    over = True
    first = True
    while True:
      if over:
        self._phase = 'reset'
        head['episode_seed'] = NO_SEED  # Not that of the episode before.
        step = environment.reset()
        head['episode_seed'] = self._episode_seed()
        if hasattr(environment, 'counts'):
          counts = environment.counts()
          head['counts'] = [counts.get(name, 0) for name in COUNTS]
        self._trim_output()
        if first:
          self._record_shared_memory()
          first = False
      else:
        self._phase = 'step'
        step = environment.step(int(action[0]))
      over = write(step, over)
      self._announce()
      if not self._commanded():
        self._phase = 'close'
        environment.close()
        return

  def fail(self, error: BaseException) -> NoReturn:
    """Leaves a report of what ended the engine, and ends the process at once."""
    traceback.print_exc()
    if isinstance(error, BadOutput):
      kind, text = 'output', str(error)
    else:
      # That of a person, who is better told at once than after some attempts.
      mistake = isinstance(error, ValueError | TypeError | ImportError | AttributeError)
      kind = 'mistake' if mistake and self._phase == 'start' else 'exception'
      words = files.explain(error) if isinstance(error, OSError) else error
      text = f'{type(error).__name__}: {words}'
      frames = traceback.extract_tb(error.__traceback__)
      if len(frames) > 2:  # Beyond those of this file.
        text += f' ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})'
    report = {
      'kind': kind,
      'phase': self._phase,
      'text': ' '.join(text.split())[:500],
      'episode_seed': self._episode_seed(),
    }
    with contextlib.suppress(OSError):  # A full disk; the output says it, too.
      (self._directory / 'report').write_text(json.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # Nothing of a broken engine is trusted to end well.

  def _announce(self) -> None:
    os.write(self._done, self._announcement)
    try:
      os.eventfd_read(self._credits)
    except BlockingIOError:
      os.eventfd_write(self._wake, 1)

  def _commanded(self) -> bool:
    """Waits for the next command; False where that is to close."""
    size = engine_link.COMMAND.size
    while data := os.read(self._commands, size):
      (generation,) = engine_link.COMMAND.unpack(data)
      if generation == self._generation:
        return True
      if generation == engine_link.CLOSE:
        return False
    return False  # The pool's process is gone.

  def _episode_seed(self) -> int:
    seed = getattr(self._environment, 'episode_seed', None)
    return NO_SEED if seed is None else int(seed)

  def _record_shared_memory(self) -> None:
    names = engine_link.shared_memory(os.getpid(), self._prefixes)
    if names:
      (self._directory / 'shared_memory').write_text('\n'.join(names))

  def _trim_output(self) -> None:
    if os.fstat(2).st_size > _OUTPUT_LIMIT:
      os.ftruncate(2, 0)  # Written to by appending only.


def _pass_warnings_on(descriptor: int, env_id: int) -> None:
  """Has warnings written to the pool's own stderr, too, each of them once.

  What the engine prints goes with its directory; a level cache that cannot be written,
  for example, is worth more than that.
  """
  said: set[str] = set()

  def is_new(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if text in said or len(said) >= _MOST_WARNINGS:
      return False
    said.add(text)
    return True

  stream = os.fdopen(descriptor, 'w', buffering=1, closefd=False)
  handler = logging.StreamHandler(stream)
  handler.setLevel(logging.WARNING)
  handler.addFilter(is_new)
  handler.setFormatter(
    logging.Formatter(f'%(asctime)s engine {env_id} %(levelname)s %(message)s')
  )
  logging.basicConfig(handlers=[handler, logging.StreamHandler()])


class _Writer:
  """Checks time steps and copies them into a slot."""

  def __init__(self, slot: np.ndarray, spec: types.EnvironmentSpec):
    head, observation = slot['head'], slot['observation']
    given = spec.observation
    # Views [...] of the one row.
    if isinstance(given, dict):
      self._views = [(k, observation[k].reshape(s.shape)) for k, s in given.items()]
    else:
      self._views = [('observation', observation.reshape(given.shape))]
    self._is_dict = isinstance(given, dict)
    self._reward, self._discount = head['reward'], head['discount']
    self._step_type = head['step_type']

  def __call__(self, step: dm_env.TimeStep, after_reset: bool) -> bool:
    """Returns whether the step is LAST.

    Raises:
      BadOutput: it is not one that may come now, or does not fit the spec.
    """
    kind = int(step.step_type)
    if not 0 <= kind <= 2 or (kind == types.StepType.FIRST) != after_reset:
      allowed = 'FIRST' if after_reset else 'MID or LAST'
      raise BadOutput(f'step type is {step.step_type!r}: must be {allowed}')
    self._step_type[0] = kind
    if after_reset:
      self._reward[0], self._discount[0] = 0.0, 1.0
    else:
      self._reward[0] = _number('reward', step.reward, _FLOAT32_MAX)
      self._discount[0] = _number('discount', step.discount, 1.0, 0.0)
    observation = step.observation
    for name, view in self._views:
      if self._is_dict and name not in observation:
        raise BadOutput(f'observation {name!r} is missing')
      value = np.asarray(observation[name] if self._is_dict else observation)
      if value.dtype != view.dtype or value.shape != view.shape:
        _check_array(name, value, view)
      view[...] = value
    return kind == types.StepType.LAST


def _check_array(name: str, value: np.ndarray, view: np.ndarray) -> None:
  fits = np.can_cast(value.dtype, view.dtype, 'same_kind')  # As from 64 bits to 32.
  if value.shape != view.shape or not fits:
    raise BadOutput(
      f'observation {name!r} has shape {list(value.shape)} and dtype {value.dtype}: '
      f'its spec says {list(view.shape)} and {view.dtype}'
    )


def _number(name: str, value: Any, high: float, low: float | None = None) -> float:
  low = -high if low is None else low
  if type(value) is float and low <= value <= high:  # The usual case, quickly.
    return value
  if np.ndim(value) == 0 and not isinstance(value, str):
    with contextlib.suppress(TypeError, ValueError):
      number = float(value)
      if low <= number <= high:
        return number
  raise BadOutput(f'{name} is {value!r}: must be one number in [{low:g}, {high:g}]')


def find(maker: str) -> Callable[..., Any]:
  """The function that `maker`, a package.module:function, names.

  Raises:
    ImportError, AttributeError: there is none.
  """
  module, _, function = maker.partition(':')
  return getattr(importlib.import_module(module), function)


if __name__ == '__main__':
  main(sys.argv[1])
