"""Trains an IMPALA agent: `python -m launch.run_atari --game=breakout`.

The main job. Any named configuration can be run (`--config`), on one game or, as a
multi-task agent, on several (`--game=pong,breakout`), and every setting changed
(`--set loss.entropy_cost=0.02`).
"""

import sys

from absl import app, flags

from launch import training

_CONFIG = flags.DEFINE_string('config', 'small', 'Named configuration.')
_GAME = flags.DEFINE_list('game', None, 'Game, or games of a multi-task agent.')


def main(argv: list[str]) -> int:
  games = ','.join(_GAME.value) if _GAME.value else None
  return training.main(argv, _CONFIG.value, {'environment.levels': games})


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
