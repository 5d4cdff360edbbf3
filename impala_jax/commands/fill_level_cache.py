"""Compiles maps of DeepMind Lab ahead of a run, so that episodes start at once.

  impala fill_level_cache --levels=dmlab30 --seeds=100 --processes=8 \
    --level_cache=/shared/maps

For each level the episodes with seeds 0 to seeds - 1 are begun, once each. A run finds
their maps if it draws its episodes from the same seeds: `dmlab.episode_seeds`. A
run that draws from all 2^31 seeds hardly ever meets one again. Evaluations have maps of
their own, and language levels also ask for maps in mid-episode: neither is made here.

What is there already is left alone, so the command may be stopped and repeated.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import rich.console
import rich.progress
import rich.table

from impala_jax import config as config_lib
from impala_jax.commands import arguments
from impala_jax.environments import base, registry
from impala_jax.environments.dmlab import (
  level_cache,
  level_cache_filler,
)
from impala_jax.environments.dmlab import suite as dmlab_suite

USAGE = '[flags]'
_LINE_INTERVAL = 30.0  # Seconds between lines in a log.


def add_flags(parser: arguments.Parser) -> None:
  what = parser.add_argument_group('what to compile')
  arguments.flag(
    what, 'levels', 'Levels; dmlab30 is all thirty.', ['dmlab30'], kind=arguments.names
  )
  arguments.flag(
    what, 'seeds', 'Episodes per level.', 10, kind=int, least=1, most=100_000
  )
  arguments.flag(
    what,
    'dataset_path',
    'Pictures of two psychlab levels.',
    '',
    shown='none',
    metavar='DIR',
  )
  arguments.switch(
    what, 'skip_unavailable_levels', 'Leave out levels that lack their pictures.'
  )
  where = parser.add_argument_group('where to')
  arguments.flag(
    where,
    'level_cache',
    'Directory of the cache.',
    '',
    shown="the user's cache",
    metavar='DIR',
  )
  arguments.flag(where, 'level_cache_gib', 'Its bound in GiB.', 10.0, kind=float)
  arguments.flag(
    where,
    'report',
    'Also write the report as JSON, here.',
    '',
    shown='nowhere',
    metavar='FILE',
  )
  how = parser.add_argument_group('how')
  arguments.flag(
    how,
    'processes',
    'Engines at a time.',
    os.cpu_count() or 1,
    kind=int,
    least=1,
    most=4096,
  )
  arguments.flag(
    how, 'timeout', 'Seconds for the start of an episode.', 300.0, kind=float
  )


def summarise(
  reports: level_cache_filler.Reports, directory: pathlib.Path, seconds: float
) -> dict[str, Any]:
  """The report as it is written as JSON."""
  total = level_cache_filler.LevelReport()
  for report in reports.values():
    total.episodes += report.episodes
    total.skipped += report.skipped
    total.seconds += report.seconds
    total.failures += report.failures
    total.stats.add(report.stats)
  return {
    'level_cache': str(directory),
    'wall_seconds': seconds,
    'total': _as_dict(total),
    'levels': {name: _as_dict(report) for name, report in reports.items()},
  }


def _as_dict(report: level_cache_filler.LevelReport) -> dict[str, Any]:
  return {
    'episodes': report.episodes,
    'skipped': report.skipped,
    'maps_compiled': report.stats.misses,
    'maps_kept': report.stats.writes,
    'hits': report.stats.hits,
    'hit_rate': report.stats.hit_rate,
    'evictions': report.stats.evictions,
    'engine_seconds': report.seconds,
    'failures': report.failures,
  }


def print_report(summary: dict[str, Any], console: rich.console.Console) -> None:
  """For people."""
  table = rich.table.Table(box=None, header_style='bold')
  table.add_column('level', overflow='fold')
  for name in ('compiled', 'there', 'failed', 'engine s'):
    table.add_column(name, justify='right')
  rows = {**summary['levels'], 'total': summary['total']}
  for name, row in rows.items():
    compiled = str(row['maps_compiled'])
    if row['episodes'] and not row['maps_compiled'] + row['hits']:
      compiled = 'no maps'
    counts = (compiled, str(row['hits']), str(len(row['failures'])))
    table.add_row(name, *counts, f'{row["engine_seconds"]:.1f}')
  console.print(table)
  failures = summary['total']['failures']
  for text in failures[:10]:
    console.print(f'failed: {text}', markup=False, highlight=False, soft_wrap=True)
  if len(failures) > 10:
    console.print(f'and {len(failures) - 10} more failures')
  total = summary['total']
  if total['evictions']:
    console.print(
      f'The cache is too small for all: {total["evictions"]} maps were removed again. '
      'Raise --level_cache_gib.',
      soft_wrap=True,
    )
  if total['maps_kept'] < total['maps_compiled']:
    lost = total['maps_compiled'] - total['maps_kept']
    console.print(f'{lost} maps could not be kept in the cache.')
  console.print(
    f'{total["maps_compiled"]} maps compiled, {total["hits"]} were there, in '
    f'{summary["wall_seconds"]:.0f} s; cache: {summary["level_cache"]}',
    soft_wrap=True,
  )


def exit_code(summary: dict[str, Any]) -> int:
  """1 where nothing could be filled: all failed, or nothing could be kept."""
  total = summary['total']
  filled = total['maps_kept'] + total['hits']
  nothing_to_do = not total['maps_compiled'] and not total['failures']
  return 0 if filled or nothing_to_do else 1


@contextlib.contextmanager
def _progress(
  total: int, console: rich.console.Console
) -> Iterator[Callable[[level_cache_filler.Reports], None]]:
  columns = (
    rich.progress.TextColumn('{task.description}'),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
  )
  with rich.progress.Progress(*columns, console=console) as progress:
    task = progress.add_task('episodes begun', total=total)
    next_line = time.monotonic() + _LINE_INTERVAL

    def show(reports: level_cache_filler.Reports) -> None:
      done = sum(r.done for r in reports.values())
      compiled = sum(r.stats.misses for r in reports.values())
      failed = sum(len(r.failures) for r in reports.values())
      words = f'{compiled} maps compiled, {failed} failed'
      progress.update(task, completed=done, description=words)
      # A log has no use for a bar, which appears there at the end alone.
      nonlocal next_line
      if not console.is_terminal and time.monotonic() >= next_line:
        next_line = time.monotonic() + _LINE_INTERVAL
        print(f'{done} of {total} episodes begun: {words}', flush=True)

    yield show


def _check_directory(directory: pathlib.Path) -> None:
  probe = directory / f'.probe-{os.getpid()}'
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.touch()
    probe.unlink()
  except OSError as e:
    raise config_lib.ConfigError(
      f'--level_cache={directory}: cannot be written: {e.strerror}'
    ) from e


def _configure(args: argparse.Namespace) -> config_lib.Config:
  if args.level_cache_gib <= 0:
    raise config_lib.ConfigError(
      f'--level_cache_gib={args.level_cache_gib}: must be above 0'
    )
  if args.timeout <= 0:
    raise config_lib.ConfigError(f'--timeout={args.timeout}: must be above 0')
  settings = dmlab_suite.Settings(
    level_cache=args.level_cache or str(level_cache.default_directory()),
    level_cache_gib=args.level_cache_gib,
    dataset_path=args.dataset_path,
    skip_unavailable_levels=args.skip_unavailable_levels,
    reset_timeout=args.timeout,
  )
  environment = config_lib.Environment(suite='dmlab', levels=tuple(args.levels))
  return registry.resolve(
    config_lib.Config(environment=environment, suite_settings=settings)
  )


def _terminate(*_: Any) -> NoReturn:
  raise KeyboardInterrupt  # As for Ctrl-C: engines are ended and the report written.


def run(args: argparse.Namespace) -> int:
  console = rich.console.Console()
  try:
    config = _configure(args)
    directory = pathlib.Path(config.of_suite(dmlab_suite.Settings).level_cache)
    _check_directory(directory)
    if args.report:  # Hours later would be too late to find out.
      pathlib.Path(args.report).touch()
  except config_lib.ConfigError as e:
    raise arguments.Mistake(str(e)) from e
  signal.signal(signal.SIGTERM, _terminate)
  start = time.monotonic()
  reports: level_cache_filler.Reports = {}
  stopped = ''
  jobs = len(config.environment.levels) * args.seeds
  try:
    with _progress(jobs, console) as show:

      def on_job(now: level_cache_filler.Reports) -> None:
        reports.update(now)
        show(now)

      level_cache_filler.fill(
        config,
        seeds=args.seeds,
        processes=args.processes,
        on_job=on_job,
      )
  except KeyboardInterrupt:
    stopped = 'stopped before the end; the same command goes on from here'
  except base.EngineError as e:
    stopped = str(e)
  summary = summarise(reports, directory, time.monotonic() - start)
  print_report(summary, console)
  if args.report:
    pathlib.Path(args.report).write_text(json.dumps(summary, indent=1) + '\n')
  if stopped:
    print(f'impala_jax: {stopped}', file=sys.stderr)
    return 1
  return exit_code(summary)
