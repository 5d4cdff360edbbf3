"""Says what this machine has for a run, and what each missing thing costs.

impala doctor                        # for yourself, or to paste into an issue
impala doctor dmlab                  # plays one level of a suite: does it, how fast?
impala doctor dmlab --level=rooms_watermaze
impala doctor my_package.my_module:suite

Ends with 1 where no run, or not that suite, is possible here.
"""

import argparse
import importlib.metadata
import importlib.util
import locale
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import psutil

import impala_jax
from impala_jax import config as config_lib
from impala_jax import suites
from impala_jax.commands import arguments, capacity, site_launcher
from impala_jax.environments import registry
from impala_jax.launching import backends

USAGE = '[SUITE] [flags]'

_FINE, _LACKS, _BROKEN = 'ok', '--', 'NO'
_JAX = """
import jax, jaxlib
devices = jax.devices()
print(f'JAX {jax.__version__} on', ', '.join(sorted({d.device_kind for d in devices})),
      f'({len(devices)} {devices[0].platform})')
"""
_SLOW = 120.0  # Seconds for JAX to come up, with all it finds, or for a level.
_STEPS = 200
_PROXIES = ('http_proxy', 'https_proxy', 'all_proxy', 'grpc_proxy', 'no_proxy')


class Finding(NamedTuple):
  """One line: how it is (`_FINE` ...), of what, and what there is or what it costs."""

  mark: str
  of: str
  words: str


def add_flags(parser: arguments.Parser) -> None:
  parser.add_argument(
    'suite', nargs='?', default='', metavar='SUITE', help=', '.join(suites.names())
  )
  arguments.flag(
    parser, 'level', 'Of the suite, the one to play.', '', shown='the first'
  )


def run(args: argparse.Namespace) -> int:
  if args.level and not args.suite:
    raise arguments.Mistake('--level needs a SUITE')
  findings = _suite(args.suite, args.level) if args.suite else _machine()
  broken = False
  for mark, of, words in findings:
    print(f'{mark:2}  {of:<14} {words}', flush=True)
    broken = broken or mark == _BROKEN
  return int(broken)


def _machine() -> Iterator[Finding]:
  yield Finding(
    _FINE,
    'impala_jax',
    f'{impala_jax.__version__} on Python {platform.python_version()}, '
    f'{platform.system()} {platform.release()} {platform.machine()}',
  )
  yield _jax()
  yield from _resources()
  yield from _network()
  yield from _transports()
  yield from _launchers()
  yield _package('oneDNN', 'onednn-cpu-gomp', 'convolutions on CPU take twice as long')
  yield _package('plots', 'matplotlib', 'no learning_curve.png')
  yield _package('films', 'imageio-ffmpeg', 'no evaluation_*.mp4')
  for suite in suites.names():
    lacks = registry.missing(suite)
    words = f'suite {suite}: ' + (lacks.splitlines()[0] if lacks else 'installed')
    yield Finding(_LACKS if lacks else _FINE, 'environments', words)


def _jax() -> Finding:
  # In a process of its own: an accelerator that is in use, or broken, may hang it.
  try:
    done = subprocess.run(
      [sys.executable, '-c', _JAX],
      capture_output=True,
      text=True,
      errors='replace',
      timeout=_SLOW,
    )
  except subprocess.TimeoutExpired:
    words = f'JAX did not come up within {_SLOW:.0f} s: is its accelerator in use?'
    return Finding(_BROKEN, 'JAX', words)
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
    return Finding(_BROKEN, 'JAX', f'cannot compute: {lines[-1]}')
  return Finding(_FINE, 'JAX', done.stdout.strip().removeprefix('JAX '))


def _resources() -> Iterator[Finding]:
  machine = capacity.this_machine()
  # An actor, a learner and an evaluator of Atari.
  enough = machine.gib >= 2
  yield Finding(
    _FINE if enough else _LACKS,
    'cores, memory',
    f'{machine.cores} cores, {machine.gib:.1f} GiB for this user and container, '
    f'{psutil.virtual_memory().available / 2**30:.1f} GiB free'
    + ('' if enough else '; a run on Atari takes about 2 GiB'),
  )
  for of, folder, least, costs in (
    ('disk', os.getcwd(), 1.0, 'runs, their checkpoints and films go there'),
    ('temporary', tempfile.gettempdir(), 0.2, 'sockets, locks and compiled code do'),
    ('shared memory', '/dev/shm', 0.1, 'engines hand their frames over there'),
  ):
    try:
      free = shutil.disk_usage(folder).free / 2**30
    except OSError as e:
      yield Finding(_LACKS, of, f'{folder}: {e.strerror}; {costs}')
      continue
    mark, words = (_FINE, '') if free >= least else (_LACKS, f': too little, {costs}')
    yield Finding(mark, of, f'{folder}: {free:.1f} GiB free{words}')
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  words = f'{soft:,} (at most {hard:,})'
  if soft < 1024:
    yield Finding(_LACKS, 'open files', f'{words}: a learner takes 2 for each actor')
  else:
    yield Finding(_FINE, 'open files', words)
  encoding = locale.getencoding()
  plain = encoding.lower().replace('-', '') == 'utf8'
  words = encoding if plain else f'{encoding}: what it cannot show is replaced'
  yield Finding(_FINE if plain else _LACKS, 'letters', words)


def _network() -> Iterator[Finding]:
  try:
    with socket.create_server(('127.0.0.1', 0)) as server:
      port = server.getsockname()[1]
      socket.create_connection(('127.0.0.1', port), 5.0).close()
    yield Finding(
      _FINE, 'loopback', f'127.0.0.1 answers, ports such as {port} are free'
    )
  except OSError as e:
    words = f'127.0.0.1: {e.strerror or e}: only --transport=local works'
    yield Finding(_BROKEN, 'loopback', words)
  set_ = [
    name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.upper())
  ]
  words = f'{", ".join(set_)}: no role talks to another through it' if set_ else 'none'
  yield Finding(_FINE, 'proxy', words)


def _transports() -> Iterator[Finding]:
  if importlib.util.find_spec('reverb') is None:
    words = 'not installed (Python 3.11 alone has it): unrolls travel by TCP'
    yield Finding(_LACKS, 'Reverb', words)
  else:
    words = importlib.metadata.version('dm-reverb')
    try:
      from impala_jax.distributed.transport import reverb_native

      reverb_native.client_module()
      yield Finding(_FINE, 'Reverb', words)
    except (ImportError, OSError) as e:
      yield Finding(_BROKEN, 'Reverb', f'{words}: cannot be loaded: {e}')
  yield _package('TLS', 'cryptography', 'no keys: transport.tls is impossible')
  if importlib.util.find_spec('reverb') is not None:
    stunnel = shutil.which('stunnel') or shutil.which('stunnel4')
    yield Finding(
      _FINE if stunnel else _LACKS,
      'stunnel',
      stunnel or 'not installed: transport.tls with Reverb is impossible, by TCP not',
    )


def _launchers() -> Iterator[Finding]:
  for name in backends.LAUNCHERS:
    lacks = site_launcher.missing(name)
    yield Finding(_LACKS if lacks else _FINE, 'launcher', f'{name}: {lacks or "here"}')
  try:
    choice = site_launcher.choose()
    words = f'without --launcher: {choice.launcher}, {choice.reason}'
    yield Finding(_FINE, 'launcher', words)
  except config_lib.ConfigError as e:
    yield Finding(_BROKEN, 'launcher', str(e))


def _package(of: str, name: str, costs: str) -> Finding:
  try:
    return Finding(_FINE, of, f'{name} {importlib.metadata.version(name)}')
  except importlib.metadata.PackageNotFoundError:
    return Finding(_LACKS, of, f'{name} is not installed: {costs}')


def _suite(name: str, level: str) -> Iterator[Finding]:
  """Whether one level can be played, and how fast."""
  try:
    suite = registry.find(name)
    lacks = registry.missing(name)
  except config_lib.ConfigError as e:
    raise arguments.Mistake(str(e)) from e
  if lacks:
    yield Finding(_BROKEN, name, lacks.replace('\n', ' '))
    return
  known = registry.levels(name)
  groups = [x for x in known if suite.problem is not None and suite.problem(x)]
  levels = [x for x in known if x not in groups]
  yield Finding(_FINE, name, f'installed, {len(levels) or "any"} levels')
  if not (level or levels):
    yield Finding(_LACKS, 'level', 'it takes any name: give one by --level')
    return
  lacking = []
  for each in levels:
    try:
      registry.resolve(_config(name, each))
    except config_lib.ConfigError as e:
      lacking.append(each)
      yield Finding(_LACKS, 'level', f'{each}: {str(e).splitlines()[-1].strip()}')
  level = level or next(x for x in levels if x not in lacking)
  try:
    config = registry.resolve(_config(name, level))
    yield from _play(config, level)
  except config_lib.ConfigError as e:
    yield Finding(_BROKEN, 'level', f'{level}: {e}'.replace('\n', ' '))
  except Exception as e:  # Whatever an engine throws is an answer here.
    yield Finding(_BROKEN, 'level', f'{level}: {type(e).__name__}: {e}')


def _config(suite: str, level: str) -> config_lib.Config:
  return config_lib.override(
    config_lib.Config(),
    [f'environment.suite={suite}', f'environment.levels={level}'],
  )


def _play(config: config_lib.Config, level: str) -> Iterator[Finding]:
  begin = time.perf_counter()
  environment = registry.make_vector(config, num_envs=1)
  try:
    environment.reset(0)
    ready = environment.recv(_SLOW)
    spec = environment.spec
    took = time.perf_counter() - begin
    yield Finding(
      _FINE, 'begins', f'{level} in {took:.1f} s; {spec.num_actions} actions'
    )
    yield from _pictures(ready.timestep.observation)
    rng = np.random.default_rng(0)
    begin, ended = time.perf_counter(), 0
    for _ in range(_STEPS):
      environment.send(
        ready.env_ids, rng.integers(0, spec.num_actions, len(ready.env_ids))
      )
      ready = environment.recv(_SLOW)
      ended += int((ready.timestep.step_type == 2).sum())
    ms = 1e3 * (time.perf_counter() - begin) / _STEPS
    yield Finding(
      _FINE,
      'steps',
      f'{ms:.2f} ms for each of {_STEPS} random ones, {ended} episodes ended',
    )
  finally:
    environment.close()


def _pictures(observation: object) -> Iterator[Finding]:
  parts = observation if isinstance(observation, dict) else {'observation': observation}
  for name, part in parts.items():
    values = np.asarray(part)[0]
    flat = values.size > 1 and values.min() == values.max()
    words = f'{values.dtype}{list(values.shape)}, {values.min()} to {values.max()}'
    if flat and values.ndim >= 2:
      yield Finding(_LACKS, name, f'{words}: of one colour; does the renderer work?')
    else:
      yield Finding(_FINE, name, words)
