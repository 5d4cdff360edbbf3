"""ViZDoom's scenarios as `dm_env.Environment`s. `vizdoom` is imported on use. Linux.

The engine is a program of its own that a step waits for without a deadline: give
every `Doom` a process of its own (`process_pool`, by `doom_suite`).
"""

import contextlib
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import dm_env
import numpy as np
import psutil
from dm_env import specs

from impala_jax.environments import area_average

_SEEDS = 2**31
_SHARED_MEMORY = pathlib.Path('/dev/shm')
# What the engine and its client put there while they meet.
SHARED_PREFIXES = ('ViZDoomSM', 'ViZDoomMQCtr', 'ViZDoomMQDoom')
_STALE = 300.0  # Seconds; an engine starts within a few.
_RESOLUTIONS = ((160, 120), (320, 240), (640, 480))  # Of the engine, all 4:3.
PICTURE_SHAPE = (480, 640, 3)  # Of a `Filmed`.

# Asks the kernel for the engine's end when this process ends, however that happens
# (else a killed client leaves an engine that waits for ever), then becomes the engine.
_GUARD = (
  'import ctypes, os, signal, sys; '
  'ctypes.CDLL(None).prctl(1, signal.SIGKILL); '
  'os.getppid() == int(sys.argv[1]) or sys.exit(1); '
  'os.execv(sys.argv[2], sys.argv[2:])'
)

# The nine actions of DeepMind Lab's default set, in its order, by the engine's names.
ACTIONS: dict[str, tuple[tuple[str, ...], ...]] = {
  'default': (
    ('MOVE_FORWARD',),
    ('MOVE_BACKWARD',),
    ('MOVE_LEFT',),
    ('MOVE_RIGHT',),
    ('TURN_LEFT',),
    ('TURN_RIGHT',),
    ('MOVE_FORWARD', 'TURN_LEFT'),
    ('MOVE_FORWARD', 'TURN_RIGHT'),
    ('ATTACK',),
  )
}


def make(
  level: str, seed: int, *, picture: bool = False, **settings: Any
) -> dm_env.Environment:
  """A `Doom`, or with `picture` a `Filmed`; by a name for `process_pool.EngineSpec`."""
  return (Filmed if picture else Doom)(level, seed, **settings)


def size_problem(width: int, height: int) -> str | None:
  """What a frame must be like where no `Doom` has one of this size, or None."""
  least, *others = _RESOLUTIONS
  if (0 < width <= least[0] and 0 < height <= least[1]) or (width, height) in others:
    return None
  return f'must be at most {least[0]}, {least[1]}, or one of the screens ' + ', '.join(
    f'{w}, {h}' for w, h in others
  )


class Doom(dm_env.Environment):
  """One scenario.

  Observation: `frame`, uint8 [height, width, 3], the screen, reduced by area averaging.
  Health, and ammunition where there is a weapon, stand at its lower edge as large
  digits, for a bar with all of a game's figures would be too small to read. The engine
  shows nothing once an episode is over, so a LAST step repeats the frame before it. An
  episode is decided by its seed and actions.

  An action presses those of its buttons that the scenario has: the rest do nothing.

  Death and reaching the goal end an episode with discount 0. All time limits are ones
  that the agent does not see: they end it with discount 1. A step that the end cuts
  short is still one step, and its reward counts.

  Args:
    level: name of a scenario that comes with the engine.
    seed: of the seeds of episodes.
    action_set: a name in `ACTIONS`.
    action_repeat: game tics per step; 35 are a second of game time.
    time_limit: tics; a shorter limit of the scenario holds. 0 for the scenario's.
    width: pixels, at most 160, or 320 or 640.
    height: pixels, at most 120, or 240 or 480.
    reward_scale: the rewards of the scenario are multiplied by it.

  Attributes:
    level: as given.
    episode_seed: of the episode that runs, set before the engine begins it; -1 before
      the first.
    on_episode_seed: called with that seed when it is set.

  Raises:
    ImportError: there is no `vizdoom`.
    ValueError: a setting is impossible.
    RuntimeError: the engine does not start.
  """

  def __init__(
    self,
    level: str,
    seed: int,
    *,
    action_set: str = 'default',
    action_repeat: int = 4,
    time_limit: int = 0,
    width: int = 96,
    height: int = 72,
    reward_scale: float = 1.0,
  ):
    if action_set not in ACTIONS:
      allowed = ', '.join(ACTIONS)
      raise ValueError(f'action_set is {action_set!r}: must be one of {allowed}')
    problem = size_problem(width, height)
    if problem:
      raise ValueError(f'width, height are {width}, {height}: {problem}')
    self.level = level
    self.episode_seed = -1
    self.on_episode_seed: Callable[[int], None] = lambda seed: None
    self._rng = np.random.default_rng(seed)
    self._repeat = action_repeat
    self._scale = reward_scale
    self._shape = (height, width, 3)
    columns, rows = next(r for r in _RESOLUTIONS if width <= r[0] and height <= r[1])
    self._average = area_average.AreaAverage((rows, columns), (height, width))
    self._over = True
    self._frame = np.zeros(self._shape, np.uint8)
    sweep_shared_memory()
    self._directory = tempfile.mkdtemp(prefix='impala_doom_')
    try:
      self._game = _start(level, self._directory, (columns, rows), time_limit)
    except BaseException:
      self._remove_directory()
      raise
    # Of its start time, too: the number may be another's when it is gone.
    self._engine = psutil.Process(int(pathlib.Path(self._directory, 'pid').read_text()))
    self._buttons = _presses(self._game.get_available_buttons(), ACTIONS[action_set])

  def reset(self) -> dm_env.TimeStep:
    self.episode_seed = int(self._rng.integers(_SEEDS))
    self.on_episode_seed(self.episode_seed)
    self._game.set_seed(self.episode_seed)
    self._game.new_episode()
    self._over = False
    return dm_env.restart(self._observation())

  def step(self, action: int) -> dm_env.TimeStep:
    if self._over:
      return self.reset()
    if not 0 <= int(action) < len(self._buttons):
      raise ValueError(f'action is {action}: must be in [0, {len(self._buttons)})')
    game = self._game
    reward = self._scale * game.make_action(self._buttons[int(action)], self._repeat)
    if not game.is_episode_finished():
      return dm_env.transition(reward, self._observation())
    self._over = True
    observation = {'frame': self._frame.copy()}
    if game.is_episode_timeout_reached() and not game.is_player_dead():
      return dm_env.truncation(reward, observation)
    return dm_env.termination(reward, observation)

  def observation_spec(self) -> dict[str, specs.BoundedArray]:
    return {'frame': specs.BoundedArray(self._shape, np.uint8, 0, 255, 'frame')}

  def action_spec(self) -> specs.DiscreteArray:
    return specs.DiscreteArray(len(self._buttons), np.int32, 'action')

  def close(self) -> None:
    """Ends the engine, also one that hangs. Idempotent."""
    with contextlib.suppress(psutil.NoSuchProcess):
      self._engine.kill()  # It has nothing to save, and `close` would wait for it.
    self._game.close()
    self._remove_directory()

  def _observation(self) -> dict[str, np.ndarray]:
    self._frame = self._average(self._game.get_state().screen_buffer)
    return {'frame': self._frame}

  def _remove_directory(self) -> None:
    shutil.rmtree(self._directory, ignore_errors=True)


class Filmed(dm_env.Environment):
  """A `Doom` with a large picture of the same scene, for videos.

  A second engine with a large screen plays along, by the same seeds and actions, so
  that the agent's frames are those of training.

  Observations: those of `Doom`, and `picture`, uint8 [480, 640, 3].

  Raises:
    RuntimeError: the two engines came apart; else see `Doom`.
  """

  def __init__(self, level: str, seed: int, **settings: Any):
    height, width, _ = PICTURE_SHAPE
    self._played = Doom(level, seed, **settings)
    try:
      self._film = Doom(level, seed, **{**settings, 'width': width, 'height': height})
    except BaseException:
      self._played.close()
      raise

  def reset(self) -> dm_env.TimeStep:
    return self._joined(self._played.reset(), self._film.reset())

  def step(self, action: int) -> dm_env.TimeStep:
    return self._joined(self._played.step(action), self._film.step(action))

  def observation_spec(self) -> dict[str, specs.BoundedArray]:
    picture = self._film.observation_spec()['frame'].replace(name='picture')
    return {**self._played.observation_spec(), 'picture': picture}

  def action_spec(self) -> specs.DiscreteArray:
    return self._played.action_spec()

  def close(self) -> None:
    self._played.close()
    self._film.close()

  def _joined(self, step: dm_env.TimeStep, film: dm_env.TimeStep) -> dm_env.TimeStep:
    if step[:3] != film[:3]:
      raise RuntimeError(
        f'the filmed game left the played one: {film[:3]}, expected {step[:3]}'
      )
    picture = film.observation['frame']
    return step._replace(observation={**step.observation, 'picture': picture})


def sweep_shared_memory(stale: float = _STALE) -> None:
  """Removes this user's names in shared memory that broken starts left behind.

  A `Doom` removes its own as soon as its engine has started, so only processes that
  died in mid-start leave any. The memory of whoever uses it stays as it is.

  Args:
    stale: seconds since the last change of what is removed.
  """
  before = time.time() - stale
  for prefix in SHARED_PREFIXES:
    for path in _SHARED_MEMORY.glob(prefix + '*'):
      try:
        status = path.lstat()
        if status.st_uid == os.getuid() and status.st_mtime < before:
          path.unlink()
      except FileNotFoundError:
        pass  # Another process was faster.


def _start(
  level: str, directory: str, resolution: tuple[int, int], time_limit: int
) -> Any:
  """A running engine; all that it writes lies in `directory`, nothing in /dev/shm."""
  import vizdoom

  scenario = pathlib.Path(vizdoom.scenarios_path, level + '.cfg')
  if not scenario.is_file():
    raise ValueError(f'level is {level!r}: vizdoom has no scenario of this name')
  game = vizdoom.DoomGame()
  game.load_config(str(scenario))
  limits = [x for x in (game.get_episode_timeout(), time_limit) if x]
  game.set_episode_timeout(min(limits, default=0))
  name = 'RES_{}X{}'.format(*resolution)
  game.set_screen_resolution(getattr(vizdoom.ScreenResolution, name))
  game.set_screen_format(vizdoom.ScreenFormat.RGBA32)
  game.set_mode(vizdoom.Mode.PLAYER)
  # Scenarios hide the figures from the screen and offer them as numbers instead.
  # Without them nobody can tell how long an episode of `health_gathering` will last.
  game.set_render_hud(True)
  game.set_render_minimal_hud(True)
  game.set_window_visible(False)
  game.set_sound_enabled(False)
  # All paths are given: else it takes files of these names from the working directory.
  game.set_vizdoom_path(_launcher(directory, vizdoom.exe_path))
  game.set_doom_game_path(str(pathlib.Path(vizdoom.install_path, 'freedoom2.wad')))
  game.set_doom_config_path(str(pathlib.Path(directory, 'engine.ini')))
  try:
    game.init()
  except Exception as e:
    raise RuntimeError(f'the engine of {level!r} does not start: {e}') from e
  # Both sides have mapped it by now: without names there is nothing to leak.
  for prefix in SHARED_PREFIXES:
    (_SHARED_MEMORY / (prefix + game.get_instance_id())).unlink(missing_ok=True)
  return game


def _launcher(directory: str, engine: str) -> str:
  """A program that becomes the engine: in `directory`, and ended with this process."""
  path = pathlib.Path(directory, 'launch')
  words = [sys.executable, '-IS', '-c', _GUARD, str(os.getpid()), engine]
  path.write_text(
    f'#!/bin/sh\ncd {shlex.quote(directory)} && echo $$ >pid && '
    f'exec {shlex.join(words)} "$@"\n'
  )
  path.chmod(0o700)
  if not os.access(path, os.X_OK):
    raise RuntimeError(f'{path} must not be run (mounted noexec?): set TMPDIR')
  return str(path)


def _presses(
  available: Sequence[Any], actions: Sequence[Sequence[str]]
) -> list[list[int]]:
  """For each action, which of the scenario's buttons it presses."""
  names = [button.name for button in available]
  return [[int(name in pressed) for name in names] for pressed in actions]
