"""What `train` and `dmlab30` share: common flags, and the launch itself."""

import argparse
import contextlib
import dataclasses
import importlib.util
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping

from impala_jax import config as config_lib
from impala_jax.commands import arguments, capacity, config_file, site_launcher
from impala_jax.distributed.security import keys as run_keys
from impala_jax.environments import registry
from impala_jax.launching import backends, live_view, run_directory, run_name
from impala_jax.launching.backends import backend, foreground, ownership
from impala_jax.runtime import checkpoint_files, lease
from impala_jax.runtime.run_directory import RunDirectory

USAGE = '[flags]'


def add_flags(parser: arguments.Parser) -> None:
  """The flags of every training run."""
  settings = parser.add_argument_group('settings')
  of_config = 'that of the configuration'
  arguments.flag(
    settings,
    'set',
    'section.field=value, of any setting (`impala list settings`); '
    'may be repeated. It wins over all other flags.',
    many=True,
    shown='none',
    metavar='SETTING',
  )
  arguments.flag(settings, 'seed', 'Random seed.', kind=int, shown=of_config)
  arguments.flag(settings, 'num_actors', 'Actor processes.', kind=int, shown=of_config)
  arguments.flag(
    settings,
    'total_frames',
    'Frames to train for, such as 2e6.',
    shown=of_config,
    metavar='N',
  )
  arguments.flag(
    settings,
    'transport',
    'How unrolls travel; local: all in one process.',
    choices=config_lib.TRANSPORTS,
    shown='reverb where it is installed, else tcp',
  )
  arguments.switch(settings, 'check', 'Only check the settings, and print them.')

  run = parser.add_argument_group('the run')
  arguments.flag(
    run,
    'run_dir',
    'Directory of the run.',
    metavar='DIR',
    shown='a new one under runs/',
  )
  arguments.switch(run, 'resume', 'Go on with the run in --run_dir.')
  arguments.switch(
    run,
    'start_anew',
    'With --resume, where no checkpoint is sound: put them aside and begin at 0.',
  )
  arguments.flag(
    run,
    'view',
    'What the terminal shows; auto: live on a terminal, else plain lines.',
    'auto',
    choices=('auto', 'live', 'plain', 'none'),
  )

  where = parser.add_argument_group('where it runs')
  arguments.flag(
    where,
    'launcher',
    f'{site_launcher.FOREGROUND}: this machine, for as long as this '
    'command lasts. The others submit the run and return; `impala manage` looks after '
    'it.',
    choices=backends.LAUNCHERS,
    shown=f"the site's (`impala list launchers`), else {site_launcher.FOREGROUND}",
  )
  arguments.flag(
    where,
    'launcher_set',
    '<launcher>.field=value, see docs/clusters.md; may be repeated.',
    many=True,
    shown="the site's",
    metavar='SETTING',
  )
  arguments.switch(
    where, 'dry_run', 'Only print what would be submitted, or started here.'
  )
  arguments.switch(
    where, 'oversubscribe', 'Start more on this machine than it can hold.'
  )


def run(args: argparse.Namespace, config_name: str, short: Mapping[str, object]) -> int:
  """Configures, launches and shows a run to its end; returns the exit code.

  Args:
    args: of the flags of `add_flags`, and `config`: what the user gave, or None.
    config_name: the configuration's name or file, unless the run is resumed.
    short: settings by name from the command's own flags; None is left out. Those of
      `--set` come last and win.

  Raises:
    arguments.Mistake: what is impossible; nothing was started.
  """
  with contextlib.ExitStack() as stack:
    return _run(args, config_name, _settings(args, short), stack)


def _run(
  args: argparse.Namespace,
  config_name: str,
  settings: list[str],
  stack: contextlib.ExitStack,
) -> int:
  """See `run`; what must be undone at its end is put on `stack`."""
  standing = before = None
  manage = args.commands['manage']
  try:
    if args.run_dir == '':
      raise run_directory.RunDirectoryError(
        '--run_dir is empty: name a directory, or leave the flag out for a new one'
      )
    if args.resume:
      run_dir, saved = run_directory.open_existing(args.run_dir)
      _check_resumed(saved, args.config)
      if not (args.check or args.dry_run):
        before = ownership.last_owner(RunDirectory(run_dir), manage)
      config = config_lib.override(saved, settings)
    elif args.start_anew:
      raise run_directory.RunDirectoryError('--start_anew needs --resume')
    else:
      config = _with_transport(
        config_lib.override(config_file.load(config_name), settings), settings
      )
    engine = _engine(args)
    config = _resolve(config, args, engine)
    if args.resume:
      standing = run_directory.judge(
        run_dir, saved, config, args.start_anew, engine.keeps_elsewhere
      )
      print(f'{run_dir}: {standing.describe(config)}', file=sys.stderr)
    if args.check:
      if not args.resume:
        run_directory.check(args.run_dir or '')
      # Late: it loads JAX, which this process can do without.
      from impala_jax import components

      components.build(config)
      live_view.print_config(config)
      return 0
    # Also where it is not shown: an impossible one must not leave a directory.
    place = pathlib.Path(args.run_dir or f'runs/{config.name}')
    program = engine.program(config, place, 0)
    engine.render(program)
    if args.dry_run:
      print(engine.describe(program))
      return 0
    if not args.resume:
      run_dir = run_directory.create(config, args.run_dir or '')
    directory = RunDirectory(run_dir)
    launch = ownership.claim(directory, engine.name, before, manage)
    stack.callback(lease.release, directory, launch)
    run_directory.begin(run_dir, config, launch)
    for path, why in standing.unsound if args.start_anew and standing else ():
      checkpoint_files.put_aside(path, why)
    if (keys := run_keys.folder_of(config, run_dir)) is not None:
      run_keys.ensure(keys)
    program = engine.program(config, run_dir, launch)
    if not isinstance(engine, foreground.Foreground):
      engine.submit(program)
      stack.pop_all()  # It is its processes' now.
      print(f'submitted; look with: {manage} status {shlex.quote(str(run_dir))}')
      return 0
  except (
    config_lib.ConfigError,
    run_directory.RunDirectoryError,
    run_name.RunNameError,
    run_keys.KeysError,
    backend.BackendError,
  ) as e:
    raise arguments.Mistake(str(e)) from e
  start = time.time()
  with live_view.make(args.view, config, run_dir) as show:
    code, failures = engine.run(program, show)
  for line in failures:
    print(f'impala_jax: {line}', file=sys.stderr)
  live_view.print_ending(run_dir, code, start)
  return code


def _resolve(
  config: config_lib.Config, args: argparse.Namespace, engine: backend.Backend
) -> config_lib.Config:
  """The configuration as it can be run; ConfigError says all that is in the way."""
  problems = []
  here = engine.name in (site_launcher.FOREGROUND, 'local')
  if here and not args.check and not args.oversubscribe:
    problems += capacity.problems(config, f'{args.commands[args.name]} {args.typed}')
  suite = config.environment.suite
  try:
    config = registry.resolve(config, elsewhere=not here)
    if not here and registry.missing(suite):
      print(
        f'suite {suite} is not installed here: the machines of the run need it',
        file=sys.stderr,
      )
    config_lib.validate(config)
  except config_lib.ConfigError as e:
    problems.append(str(e))
  if problems:
    raise config_lib.ConfigError('\n'.join(problems))
  return config


def _engine(args: argparse.Namespace) -> backend.Backend:
  """Where the run goes."""
  if args.check and not (args.launcher or args.launcher_set):
    return backends.get(site_launcher.FOREGROUND)
  choice = site_launcher.choose(args.launcher)
  if not args.launcher and choice.launcher != site_launcher.FOREGROUND:
    print(
      f'launcher {choice.launcher}: {choice.reason}; --launcher='
      f'{site_launcher.FOREGROUND} is this machine',
      file=sys.stderr,
    )
  return backends.get(choice.launcher, [*choice.settings, *args.launcher_set])


def _settings(args: argparse.Namespace, short: Mapping[str, object]) -> list[str]:
  given = {
    **short,
    'seed': args.seed,
    'actor.num_actors': args.num_actors,
    'learner.total_frames': args.total_frames,
    'transport.kind': args.transport,
  }
  return [f'{k}={v}' for k, v in given.items() if v is not None] + list(args.set)


def _check_resumed(config: config_lib.Config, given: str | None) -> None:
  """A run goes on with its own settings: another configuration is no way to go on."""
  if given not in (None, config.name):
    raise config_lib.ConfigError(
      f'--config={given} with --resume: the run has the settings of {config.name!r}; '
      'change them by --set'
    )


def _with_transport(
  config: config_lib.Config, settings: list[str]
) -> config_lib.Config:
  """Unrolls travel by TCP where Reverb is not installed and nobody asked for it."""
  if (
    config.transport.kind != 'reverb' or importlib.util.find_spec('reverb') is not None
  ):
    return config
  if any(s.startswith('transport.kind') for s in settings):
    raise config_lib.ConfigError(
      "transport.kind is 'reverb': dm-reverb is not installed here (see "
      'requirements/cluster.txt); use --transport=tcp'
    )
  print('dm-reverb is not installed: unrolls travel by TCP (--transport=tcp).')
  return dataclasses.replace(
    config, transport=dataclasses.replace(config.transport, kind='tcp')
  )
