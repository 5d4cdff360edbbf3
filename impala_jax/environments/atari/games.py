"""Which Atari games there are, and their actions. Loads ale-py on use."""

import functools

import numpy as np

from impala_jax.environments import level_names

# Only for several players: ale-py ends the whole process when it loads them.
_MULTI_PLAYER = frozenset({'combat', 'joust', 'maze_craze', 'warlords'})
_FULL_ACTIONS = 18


def games() -> tuple[str, ...]:
  """Names of all games that can be played, sorted."""
  from ale_py import roms

  return tuple(sorted(set(roms.get_all_rom_ids()) - _MULTI_PLAYER))


def problem(game: str) -> str | None:
  """Why `game` cannot be played, or None where it can."""
  known = games()
  if game in known:
    return None
  if game in _MULTI_PLAYER:
    return f'Atari game {game!r} has no mode for a single player'
  near = level_names.near(game, [*known, *_MULTI_PLAYER])
  if near and near[0] in _MULTI_PLAYER:
    return f'unknown Atari game {game!r}: {near[0]} has no mode for a single player'
  hint = f'did you mean {", ".join(near)}?' if near else f'known are {", ".join(known)}'
  return f'unknown Atari game {game!r}: {hint}'


def num_actions(game: str, full_action_space: bool = False) -> int:
  """Size of the action set: all 18 actions, or those that matter in `game`.

  Raises:
    ValueError: there is no such game.
  """
  return _FULL_ACTIONS if full_action_space else len(_action_set(game, False))


@functools.cache
def _action_set(game: str, full: bool) -> tuple[int, ...]:
  text = problem(game)
  if text:
    raise ValueError(text)
  import ale_py
  from ale_py import roms

  ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
  ale = ale_py.ALEInterface()
  path = roms.get_rom_path(game)
  assert path is not None  # `problem` found nothing.
  ale.loadROM(path)
  actions = ale.getLegalActionSet() if full else ale.getMinimalActionSet()
  return tuple(a.value for a in actions)


def native_actions(game: str, full: bool) -> tuple[np.ndarray, int]:
  """The engine's index of each action, int32 [num_actions], and that of NOOP."""
  native = _action_set(game, full)
  # A few games never read the joystick without FIRE: they have no NOOP.
  noop = native.index(0) if 0 in native else 0
  if not full:
    return np.arange(len(native), dtype=np.int32), noop
  # ale's numbers: 0 NOOP, 1 FIRE, 2 to 9 the directions, 10 to 17 those with FIRE.
  plain = {1: 0} | {a + 8: a for a in range(2, 10)}
  table = [native.index(a if a in native else plain[a]) for a in range(_FULL_ACTIONS)]
  return np.array(table, np.int32), noop
