"""What `run_atari` and `run_dmlab30` share: common flags, and the launch itself."""

import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Mapping

from absl import flags

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.distributed.security import keys as run_keys
from impala_jax.environments import registry
from impala_jax.launching import backends, live_view, run_directory
from impala_jax.launching.backends import backend, foreground

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
_LAUNCHER = flags.DEFINE_enum(
    'launcher', None, backends.LAUNCHERS,
    'Submit the run and return; `python -m launch.manage` does the rest. Without it '
    'the run is on this machine and lasts as long as this command.',
)  # fmt: skip
_LAUNCHER_SET = flags.DEFINE_multi_string(
  'launcher_set', [], '<launcher>.field=value, see docs/clusters.md; may be repeated.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'With --launcher: only print what would be submitted.'
)
_CHECK = flags.DEFINE_bool('check', False, 'Only check the settings, and print them.')


def main(argv: list[str], config_name: str, short: Mapping[str, object]) -> int:
  """Configures, launches and shows a run to its end; returns the exit code.

  Args:
    argv: what absl left; more than the program's name is a mistake.
    config_name: the named configuration, unless the run is resumed.
    short: settings by name from the program's own flags; None is left out. Those of
      `--set` come last and win.
  """
  if len(argv) > 1:
    print(f'unknown arguments {argv[1:]}: flags begin with --', file=sys.stderr)
    return 2
  settings = _settings(short)
  try:
    if _RESUME.value:
      run_dir, config = run_directory.open_existing(_RUN_DIR.value)
      config = config_lib.override(config, settings)
    else:
      config = _with_transport(
        config_lib.override(configs.get(config_name), settings), settings
      )
    config = registry.resolve(config)
    config_lib.validate(config)
    if _CHECK.value:
      # Late: it loads JAX, which this process can do without.
      from impala_jax import components

      components.build(config)
      live_view.print_config(config)
      return 0
    engine = _engine()
    # Also where it is not shown: an impossible one must not leave a directory.
    folder = pathlib.Path(_RUN_DIR.value or 'runs/dry_run')
    program = engine.program(config, folder, 0)
    if _DRY_RUN.value:
      print(engine.describe(program))
      return 0
    if not _RESUME.value:
      run_dir = run_directory.create(config, _RUN_DIR.value)
    launches = run_directory.begin(run_dir, config)
    if (keys := run_keys.folder_of(config, run_dir)) is not None:
      run_keys.ensure(keys)
    program = engine.program(config, run_dir, launches)
    if not isinstance(engine, foreground.Foreground):
      engine.submit(program)
      print(f'submitted; look with: python -m launch.manage status {run_dir}')
      return 0
  except (
    config_lib.ConfigError,
    run_directory.RunDirectoryError,
    run_keys.KeysError,
    backend.BackendError,
  ) as e:
    print(f'impala_jax: {e}', file=sys.stderr)
    return 2
  with live_view.make(_VIEW.value, config, run_dir) as show:
    code, failures = engine.run(program, show)
  for line in failures:
    print(f'impala_jax: {line}', file=sys.stderr)
  live_view.print_ending(run_dir, code)
  return code


def _engine() -> backend.Backend:
  if _LAUNCHER.value:
    return backends.get(_LAUNCHER.value, _LAUNCHER_SET.value)
  for name, value in (
    ('launcher_set', _LAUNCHER_SET.value),
    ('dry_run', _DRY_RUN.value),
  ):
    if value:
      raise config_lib.ConfigError(
        f'--{name} is {value!r}: needs --launcher, one of '
        + ', '.join(backends.LAUNCHERS)
      )
  return backends.get('foreground')


def _settings(short: Mapping[str, object]) -> list[str]:
  given = {
    **short,
    'seed': _SEED.value,
    'actor.num_actors': _NUM_ACTORS.value,
    'learner.total_frames': _FRAMES.value,
    'transport.kind': _TRANSPORT.value,
  }
  return [f'{k}={v}' for k, v in given.items() if v is not None] + _SET.value


def _with_transport(
  config: config_lib.Config, settings: list[str]
) -> config_lib.Config:
  """Falls back to the local transport where nobody asked for Reverb by name."""
  if (
    config.transport.kind != 'reverb' or importlib.util.find_spec('reverb') is not None
  ):
    return config
  if any(s.startswith('transport.kind') for s in settings):
    raise config_lib.ConfigError(
      "transport.kind is 'reverb': dm-reverb is not installed here (see "
      'requirements/cluster.txt); use --transport=local'
    )
  print('dm-reverb is not installed: one process with the local transport.')
  return dataclasses.replace(
    config, transport=dataclasses.replace(config.transport, kind='local')
  )
