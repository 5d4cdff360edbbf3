"""Compiles maps of DeepMind Lab ahead of a run, so that episodes start at once.

  python -m launch.fill_level_cache --levels=dmlab30 --seeds=100 --processes=8 \
    --level_cache=/shared/maps

For each level the episodes with seeds 0 to seeds - 1 are begun, once each. A run finds
their maps if it draws its episodes from the same seeds: `dmlab.episode_seeds`. A
run that draws from all 2^31 seeds hardly ever meets one again. Evaluations have maps of
their own, and language levels also ask for maps in mid-episode: neither is made here.

What is there already is left alone, so the command may be stopped and repeated.
"""

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
from absl import app, flags

from impala_jax import config as config_lib
from impala_jax.environments import base
from impala_jax.environments.dmlab import (
  level_cache,
  level_cache_filler,
)
from impala_jax.environments.dmlab import suite as dmlab_suite

_LEVELS = flags.DEFINE_list('levels', ['dmlab30'], 'Levels; dmlab30 is all thirty.')
_SEEDS = flags.DEFINE_integer('seeds', 10, 'Episodes per level.', lower_bound=1)
_PROCESSES = flags.DEFINE_integer(
    'processes', os.cpu_count() or 1, 'Engines at a time.', lower_bound=1,
  )  # fmt: skip
_CACHE = flags.DEFINE_string('level_cache', '', "Directory; '' for the user's cache.")
_GIB = flags.DEFINE_float('level_cache_gib', 10.0, 'Its bound in GiB.')
_PICTURES = flags.DEFINE_string('dataset_path', '', 'Pictures of two psychlab levels.')
_SKIP = flags.DEFINE_bool(
  'skip_unavailable_levels', False, 'Leave out levels that lack their pictures.'
)
_TIMEOUT = flags.DEFINE_float('timeout', 300.0, 'Seconds for the start of an episode.')
_REPORT = flags.DEFINE_string('report', '', 'Also write the report as JSON, here.')

_LINE_INTERVAL = 30.0  # Seconds between lines in a log.


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


def _configure() -> config_lib.Config:
  if _GIB.value <= 0:
    raise config_lib.ConfigError(f'--level_cache_gib={_GIB.value}: must be above 0')
  if _TIMEOUT.value <= 0:
    raise config_lib.ConfigError(f'--timeout={_TIMEOUT.value}: must be above 0')
  settings = dmlab_suite.Settings(
    level_cache=_CACHE.value or str(level_cache.default_directory()),
    level_cache_gib=_GIB.value,
    dataset_path=_PICTURES.value,
    skip_unavailable_levels=_SKIP.value,
    reset_timeout=_TIMEOUT.value,
  )
  environment = config_lib.Environment(suite='dmlab', levels=tuple(_LEVELS.value))
  config = dmlab_suite.resolve(
    config_lib.Config(environment=environment, suite_settings=settings)
  )
  wrong = [dmlab_suite.problem(x) for x in config.environment.levels]
  if any(wrong):
    raise config_lib.ConfigError('\n'.join(x for x in wrong if x))
  for level in config.environment.levels:
    dmlab_suite.played(level, evaluation=False)  # Raises where it may not be.
  return config


def _terminate(*_: Any) -> NoReturn:
  raise KeyboardInterrupt  # As for Ctrl-C: engines are ended and the report written.


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    print(f'unknown arguments {argv[1:]}: flags begin with --', file=sys.stderr)
    return 2
  console = rich.console.Console()
  try:
    config = _configure()
    directory = pathlib.Path(config.of_suite(dmlab_suite.Settings).level_cache)
    _check_directory(directory)
  except config_lib.ConfigError as e:
    print(f'impala_jax: {e}', file=sys.stderr)
    return 2
  signal.signal(signal.SIGTERM, _terminate)
  start = time.monotonic()
  reports: level_cache_filler.Reports = {}
  stopped = ''
  jobs = len(config.environment.levels) * _SEEDS.value
  try:
    with _progress(jobs, console) as show:

      def on_job(now: level_cache_filler.Reports) -> None:
        reports.update(now)
        show(now)

      level_cache_filler.fill(
        config,
        seeds=_SEEDS.value,
        processes=_PROCESSES.value,
        on_job=on_job,
      )
  except KeyboardInterrupt:
    stopped = 'stopped before the end; the same command goes on from here'
  except base.EngineError as e:
    stopped = str(e)
  summary = summarise(reports, directory, time.monotonic() - start)
  print_report(summary, console)
  if _REPORT.value:
    pathlib.Path(_REPORT.value).write_text(json.dumps(summary, indent=1) + '\n')
  if stopped:
    print(f'impala_jax: {stopped}', file=sys.stderr)
    return 1
  return exit_code(summary)


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
