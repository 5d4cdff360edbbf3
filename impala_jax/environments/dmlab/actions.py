"""Named sets of discrete actions for DeepMind Lab.

The engine takes seven integers for each frame: look left/right and look down/up in
pixels a frame (-512 to 512, right and down are positive), strafe left/right and move
back/forward (-1 to 1), fire, jump, crouch (0 or 1). A set is a table of such rows.

- `default`: the nine of the public release of IMPALA, which DMLab-30 figures of that
  paper and of SEED RL go with.
- `extended`: fifteen, with small and large turns and with looking up and down. It is
  the set that public code gives for the PopArt and R2D2 agents on DMLab-30 (recalled
  from their appendices).
- `extended_large`: `extended` with large steps of looking up and down, seventeen in
  all, as in public code of a later DMLab-30 agent (Brain Agent).
"""

import numpy as np

Row = tuple[int, int, int, int, int, int, int]

_FORWARD: Row = (0, 0, 0, 1, 0, 0, 0)
_BACKWARD: Row = (0, 0, 0, -1, 0, 0, 0)
_STRAFE_LEFT: Row = (0, 0, -1, 0, 0, 0, 0)
_STRAFE_RIGHT: Row = (0, 0, 1, 0, 0, 0, 0)
_FIRE: Row = (0, 0, 0, 0, 1, 0, 0)
_MOVES = (_FORWARD, _BACKWARD, _STRAFE_LEFT, _STRAFE_RIGHT)


def _turn(pixels: int, move: int = 0) -> Row:
  return (pixels, 0, 0, move, 0, 0, 0)


def _tilt(pixels: int) -> Row:
  return (0, pixels, 0, 0, 0, 0, 0)


_TURNS = tuple(_turn(p) for p in (-10, 10, -60, 60))
_FORWARD_TURNS = tuple(_turn(p, 1) for p in (-10, 10, -60, 60))

_SETS: dict[str, tuple[Row, ...]] = {
  'default': (*_MOVES, _turn(-20), _turn(20), _turn(-20, 1), _turn(20, 1), _FIRE),
  'extended': (*_MOVES, *_TURNS, _tilt(10), _tilt(-10), *_FORWARD_TURNS, _FIRE),
  'extended_large': (
    *_MOVES,
    *_TURNS,
    _tilt(10),
    _tilt(-10),
    _tilt(60),
    _tilt(-60),
    *_FORWARD_TURNS,
    _FIRE,
  ),
}


def names() -> tuple[str, ...]:
  """The sets that there are."""
  return tuple(_SETS)


def problem(name: str) -> str | None:
  """Why there is no set of this name, or None where there is one."""
  if name in _SETS:
    return None
  return f'action_set is {name!r}: must be one of {", ".join(_SETS)}'


def table(name: str) -> tuple[np.ndarray, ...]:
  """The rows of a set, each an array as the engine wants it.

  Returns:
    One `np.intc` array [7] for each action, contiguous and read-only. The engine reads
    strided arrays wrongly and without an error, so these are never views.

  Raises:
    ValueError: there is no set of this name.
  """
  wrong = problem(name)
  if wrong:
    raise ValueError(wrong)
  rows = tuple(np.array(row, np.intc) for row in _SETS[name])
  for row in rows:
    row.flags.writeable = False
  return rows
