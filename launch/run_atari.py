"""Trains an IMPALA agent: `python -m launch.run_atari --game=breakout`.

The main job. Any named configuration can be run (`--config`), on one game or, as a
multi-task agent, on several (`--game=pong,breakout`), and every setting changed
(`--set loss.entropy_cost=0.02`).
"""

import dataclasses
import importlib.util
import sys

from absl import app, flags

from experiments import configs
from impala_jax import config as config_lib
from impala_jax import config_validation
from impala_jax.environments import registry
from launch import live_view, local, run_directory

_CONFIG = flags.DEFINE_string('config', 'small', 'Named configuration.')
_GAME = flags.DEFINE_list('game', None, 'Game, or games of a multi-task agent.')
_SET = flags.DEFINE_multi_string('set', [], 'section.field=value; may be repeated.')
_RUN_DIR = flags.DEFINE_string('run_dir', '', 'Run directory; default under runs/.')
_RESUME = flags.DEFINE_bool('resume', False, 'Go on with the run in --run_dir.')
_SEED = flags.DEFINE_integer('seed', None, 'Random seed.')
_NUM_ACTORS = flags.DEFINE_integer('num_actors', None, 'Actor processes.')
_FRAMES = flags.DEFINE_string('total_frames', None, 'Frames to train for, e.g. 2e6.')
_TRANSPORT = flags.DEFINE_enum(
    'transport', None, config_lib.TRANSPORTS,
    'How unrolls travel; reverb where it is installed, else local (one process).',
)  # fmt: skip
_VIEW = flags.DEFINE_enum(
    'view', 'auto', ('auto', 'live', 'plain', 'none'),
    'What the terminal shows; auto: live on a terminal, else plain lines.',
)  # fmt: skip
_CHECK = flags.DEFINE_bool('check', False, 'Only check the settings, and print them.')


def _settings() -> list[str]:
  """The short flags as settings; --set comes last and wins."""
  short = {
    'environment.levels': ','.join(_GAME.value) if _GAME.value else None,
    'seed': _SEED.value,
    'actor.num_actors': _NUM_ACTORS.value,
    'learner.total_frames': _FRAMES.value,
    'transport.kind': _TRANSPORT.value,
  }
  return [f'{k}={v}' for k, v in short.items() if v is not None] + _SET.value


def _configure() -> config_lib.Config:
  config = config_lib.override(configs.get(_CONFIG.value), _settings())
  have_reverb = importlib.util.find_spec('reverb') is not None
  if config.transport.kind == 'reverb' and not have_reverb:
    chosen = any(s.startswith('transport.kind') for s in _settings())
    if chosen:
      raise config_lib.ConfigError(
        "transport.kind is 'reverb': dm-reverb is not installed here (see "
        'requirements/cluster.txt); use --transport=local'
      )
    print('dm-reverb is not installed: one process with the local transport.')
    config = dataclasses.replace(
      config, transport=dataclasses.replace(config.transport, kind='local')
    )
  return config


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    print(f'unknown arguments {argv[1:]}: flags begin with --', file=sys.stderr)
    return 2
  try:
    if _RESUME.value:
      run_dir, config = run_directory.open_existing(_RUN_DIR.value)
      config = config_lib.override(config, _settings())
    else:
      config = _configure()
    config_validation.validate(config)
    registry.check_levels(config)
    if _CHECK.value:
      # Late: it loads JAX, which this process can do without.
      from impala_jax import components

      components.build(config)
      live_view.print_config(config)
      return 0
    if not _RESUME.value:
      run_dir = run_directory.create(config, _RUN_DIR.value)
    launches = run_directory.begin(run_dir, config)
  except (config_lib.ConfigError, run_directory.RunDirectoryError) as e:
    print(f'impala_jax: {e}', file=sys.stderr)
    return 2
  with live_view.make(_VIEW.value, config, run_dir) as show:
    code = local.run(config, run_dir, launches, show)
  live_view.print_ending(run_dir, code)
  return code


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
