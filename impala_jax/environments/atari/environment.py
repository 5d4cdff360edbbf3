"""Atari 2600 games in the native threads of ale-py.

What the agent sees are single frames: 84x84 grey uint8 [84, 84, 1], the maximum of
the last two of the `action_repeat` frames that an action lasts. Frames are stacked
by the agent, so that each travels once.

FIRE is not pressed for the agent, neither at the start of a game (unless
`fire_on_reset`) nor after a lost life: training and evaluation then begin each life
alike, and an agent that was trained on lives can play whole games.
"""

from typing import Any

import numpy as np

from impala_jax import types
from impala_jax.environments import base
from impala_jax.environments.atari import games as atari_games

# What the engine does with the next action of an environment.
_RUN = 0  # Plays it.
_RESET = 1  # Ignores it and begins a game: the result is FIRST.
_REVIVE = 2  # Plays NOOP in its place, in a game that goes on: the result is FIRST.
_DEAD = 3  # Begins a game, but the agent has only seen FIRST and is owed a LAST.


def spec(
  game: str,
  full_action_space: bool = False,
  frame_shape: tuple[int, int, int] = (84, 84, 1),
) -> types.EnvironmentSpec:
  """What `AtariVector` of this game has as its `spec`; takes milliseconds."""
  return types.EnvironmentSpec(
    types.ArraySpec(tuple(frame_shape), np.dtype(np.uint8)),
    atari_games.num_actions(game, full_action_space),
  )


class AtariVector:
  """`num_envs` environments of one game; a `base.VectorEnvironment`.

  With `episodic_life` a lost life ends the agent's episode: the step is LAST with
  discount 0, the game goes on with one NOOP, and its result is FIRST. Only the end
  of the game makes an `EpisodeEnd`, which counts every reward of the game, that of
  the NOOP step included, although no delivered time step carries it.
  A game that ends in that very NOOP step is delivered as FIRST, then LAST with the
  same observation and reward 0; one NOOP begins the next game.

  Args:
    game: name as `atari_games.games` lists it.
    num_envs: how many.
    task_id: goes into `task_ids`.
    frame_shape: height, width and 1 for grey or 3 for RGB.
    action_repeat: frames that an action lasts.
    noop_max: a game begins with 0 to so many frames without action, drawn at random.
    fire_on_reset: press FIRE as the first of those frames.
    sticky_actions: probability in each frame that the last action is repeated.
    max_episode_frames: the time limit of a game. At the limit the step is LAST with
      discount 1; the last frame's pixels are one step old (as ale-py delivers them).
    episodic_life: see above; for training.
    full_action_space: all 18 actions. In the few games that take only 9, those with
      FIRE act as those without.
    env_threads: native threads, 0 for one a core.
    inference_batch: `recv` returns this many environments, those that are ready
      first; 0 for all.

  Raises:
    ValueError: a setting is impossible; the text names it.
  """

  def __init__(
    self,
    game: str,
    num_envs: int,
    *,
    task_id: int = 0,
    frame_shape: tuple[int, int, int] = (84, 84, 1),
    action_repeat: int = 4,
    noop_max: int = 30,
    fire_on_reset: bool = False,
    sticky_actions: float = 0.0,
    max_episode_frames: int = 108_000,
    episodic_life: bool = False,
    full_action_space: bool = False,
    env_threads: int = 1,
    inference_batch: int = 0,
  ):
    self._batch = inference_batch or num_envs
    for name, value, ok, allowed in (
      ('num_envs', num_envs, num_envs >= 1, 'at least 1'),
      (
        'frame_shape',
        frame_shape,
        len(frame_shape) == 3 and min(frame_shape) >= 1 and frame_shape[2] in (1, 3),
        '(height, width, 1 or 3)',
      ),
      ('action_repeat', action_repeat, action_repeat >= 1, 'at least 1'),
      ('noop_max', noop_max, noop_max >= 0, 'at least 0'),
      ('sticky_actions', sticky_actions, 0 <= sticky_actions < 1, 'in [0, 1)'),
      (
        'max_episode_frames',
        max_episode_frames,
        max_episode_frames >= action_repeat,
        f'at least {action_repeat} frames',
      ),
      ('env_threads', env_threads, env_threads >= 0, 'at least 0'),
      (
        'inference_batch',
        inference_batch,
        0 <= inference_batch <= num_envs,
        f'in [0, num_envs = {num_envs}]',
      ),
    ):
      if not ok:
        raise ValueError(f'{name} is {value!r}: must be {allowed}')
    self.num_envs = num_envs
    self.spec = spec(game, full_action_space, frame_shape)
    self.task_ids = np.full(num_envs, task_id, np.int32)
    self._episodic_life = episodic_life
    self._settings: dict[str, Any] = {
      'game': game,
      'num_envs': num_envs,
      'batch_size': self._batch,
      'num_threads': env_threads,
      'max_num_frames_per_episode': max_episode_frames,
      'repeat_action_probability': sticky_actions,
      'full_action_space': full_action_space,
      'autoreset_mode': 'NextStep',
      'img_height': frame_shape[0],
      'img_width': frame_shape[1],
      'grayscale': frame_shape[2] == 1,
      'stack_num': 1,
      'frameskip': action_repeat,
      'noop_max': noop_max + 1,  # The engine draws from [0, noop_max).
      # Its own `episodic_life` begins a new game at each lost life.
      'episodic_life': False,
      'reward_clipping': False,
      'use_fire_reset': fire_on_reset,
    }
    self._native_action, self._noop = atari_games.native_actions(
      game, full_action_space
    )
    self._engine: Any = None
    self._closed = False
    self._in_flight = 0
    # Arrays over environments.
    self._mode = np.full(num_envs, _RESET, np.int8)
    self._lives = np.zeros(num_envs, np.int32)
    self._return = np.zeros(num_envs, np.float64)
    self._length = np.zeros(num_envs, np.int64)
    self._actions = np.zeros(num_envs, np.int32)
    self._waiting = np.zeros(num_envs, np.bool_)  # Delivered, not yet answered.
    self._delivered = np.zeros(0, np.int32)  # The engine's last batch, in its order.
    # Observation and discount of the LAST step owed to each _DEAD environment.
    self._owed: dict[int, tuple[np.ndarray, float]] = {}
    self._first: tuple | None = None

  def reset(self, seed: int) -> None:
    """Begins the first games. The same seed and actions give the same games."""
    self._check_open()
    self._drain()
    if self._engine is None or self._in_flight:
      # Results that do not fill a batch cannot be fetched from the engine.
      from ale_py import vector_env

      self._engine = vector_env.AtariVectorEnv(**self._settings)
    # Not 0 and not negative: those would make the engine draw a seed by itself.
    draws = np.random.SeedSequence(seed).generate_state(self.num_envs)
    frames, info = self._engine.reset(seed=(draws % (2**31 - 1) + 1).astype(np.int64))
    none = np.zeros(self._batch, np.bool_)
    self._first = (frames, none.astype(np.int32), none, none, info)
    self._in_flight = self.num_envs - self._batch
    self._mode[:] = _RESET
    self._return[:] = 0
    self._length[:] = 0
    self._waiting[:] = False
    self._owed.clear()

  def send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    """Takes int32 `actions` [K]; the engine starts when all delivered have one.

    Raises:
      ValueError: an action is out of range, or an environment waits for none.
    """
    self._check_open()
    env_ids, actions = np.asarray(env_ids), np.asarray(actions)
    self._check_send(env_ids, actions)
    self._actions[env_ids] = self._native_action[actions]
    self._waiting[env_ids] = False
    if not self._waiting[self._delivered].any():
      ids = self._delivered
      revive = self._mode[ids] == _REVIVE
      self._engine.send(np.where(revive, self._noop, self._actions[ids]))
      self._in_flight += len(ids)

  def recv(self, timeout: float) -> base.Ready:
    """Returns `inference_batch` environments, waiting for native steps alone.

    The engine cannot be interrupted, but each of its steps takes milliseconds: so
    `timeout` is not needed, and where no result can come the error is immediate.

    Raises:
      TimeoutError: too few actions were sent for a result.
    """
    self._check_open()
    if self._first is not None:
      batch, self._first = self._first, None
      return self._deliver(*batch)
    if self._waiting.any() or self._in_flight < self._batch:
      raise TimeoutError(
        f'{np.count_nonzero(self._waiting)} environments wait for actions and '
        f'{self._in_flight} are busy: no batch of {self._batch} can come'
      )
    batch = self._engine.recv()
    self._in_flight -= self._batch
    return self._deliver(*batch)

  def close(self) -> None:
    """Ends the native threads. Idempotent."""
    if not self._closed:
      self._drain()
      self._engine = None
      self._closed = True

  def _deliver(
    self,
    frames: np.ndarray,
    rewards: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    info: dict[str, np.ndarray],
  ) -> base.Ready:
    ids, lives = info['env_id'], info['lives']
    mode = self._mode[ids]
    over = terminated | truncated
    running, dead = mode == _RUN, mode == _DEAD
    first = ~(running | dead)
    ended = running & over
    lost = np.zeros_like(over)
    if self._episodic_life:
      # Some games show 0 lives for a while before they are over.
      lost = running & ~over & (lives < self._lives[ids]) & (lives > 0)
    last = ended | lost | dead

    step_type = np.full(len(ids), types.StepType.MID, np.uint8)
    step_type[first] = types.StepType.FIRST
    step_type[last] = types.StepType.LAST
    discount = np.ones(len(ids), np.float32)
    discount[(running & terminated) | lost] = 0
    # [K, 1, H, W] or [K, 1, H, W, 3], allocated by the engine for this call alone.
    frames = frames.reshape(len(ids), *self.spec.observation.shape)

    self._return[ids] += rewards
    self._length[ids] += running | (mode == _REVIVE)
    self._lives[ids] = lives
    next_mode = np.full(len(ids), _RUN, np.int8)
    next_mode[ended] = _RESET
    next_mode[lost | dead] = _REVIVE
    next_mode[first & over] = _DEAD
    self._mode[ids] = next_mode
    self._waiting[ids] = True
    self._delivered = ids

    for i in np.flatnonzero(dead):
      frames[i], discount[i] = self._owed.pop(int(ids[i]))
    for i in np.flatnonzero(first & over):
      self._owed[int(ids[i])] = frames[i].copy(), float(truncated[i])
    episodes = [self._finish(ids[i], discount[i]) for i in np.flatnonzero(ended | dead)]
    reward = np.where(running, rewards, 0).astype(np.float32)
    timestep = types.TimeStep(step_type, reward, discount, frames)
    return base.Ready(ids.copy(), timestep, episodes)

  def _finish(self, env_id: int, discount: float) -> base.EpisodeEnd:
    end = base.EpisodeEnd(
      task_id=int(self.task_ids[env_id]),
      episode_return=float(self._return[env_id]),
      length=int(self._length[env_id]),
      truncated=bool(discount),
      env_id=int(env_id),
    )
    self._return[env_id] = 0
    self._length[env_id] = 0
    return end

  def _check_send(self, env_ids: np.ndarray, actions: np.ndarray) -> None:
    # An action that the engine refuses would leave `recv` waiting for ever.
    n = self.spec.num_actions
    if actions.shape != env_ids.shape or actions.ndim != 1 or actions.dtype.kind != 'i':
      raise ValueError(
        f'actions are {actions.dtype}{list(actions.shape)}: must be int32'
        f'{list(env_ids.shape)}, one for each of env_ids'
      )
    if actions.size and not 0 <= actions.min() <= actions.max() < n:
      raise ValueError(f'actions are {actions.tolist()}: must lie in [0, {n})')
    wanted = np.zeros(self.num_envs, np.bool_)
    if env_ids.size and 0 <= env_ids.min() <= env_ids.max() < self.num_envs:
      wanted[env_ids] = True
    wanted &= self._waiting
    if np.count_nonzero(wanted) != len(env_ids):
      raise ValueError(
        f'env_ids are {env_ids.tolist()}: must be distinct and among those that wait '
        f'for an action, {np.flatnonzero(self._waiting).tolist()}'
      )

  def _drain(self) -> None:
    while self._in_flight >= self._batch:
      self._engine.recv()
      self._in_flight -= self._batch

  def _check_open(self) -> None:
    if self._closed:
      raise RuntimeError('this AtariVector was closed')
