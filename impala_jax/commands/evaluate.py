"""Plays and scores a run's agent.

  impala evaluate --run_dir=runs/... --episodes=100 --processes=4 --videos

It plays each level's test version for a fixed number of whole episodes and writes
`evaluation.json` (returns, confidence intervals, scores), `evaluation.png` (a bar for
each level) and, with --videos, a film of each level.

Ctrl-C ends it early; what is there is written and marked as incomplete. Exit codes: 0
all was played, 1 a level failed, 2 a mistake in the command, 130 stopped early.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.util
import pathlib
import signal
import sys
import time
import warnings
from typing import Any, NamedTuple

from absl import logging

from impala_jax import components
from impala_jax import config as config_lib
from impala_jax.commands import arguments
from impala_jax.environments import registry
from impala_jax.evaluation import evaluator, films, playing
from impala_jax.evaluation import report as evaluation_report
from impala_jax.launching import evaluation_progress
from impala_jax.learning import checkpointing
from impala_jax.reporting import bar_charts
from impala_jax.runtime import compile_cache, files
from impala_jax.runtime.run_directory import RunDirectory

USAGE = '--run_dir=DIR [flags]'


def add_flags(parser: arguments.Parser) -> None:
  what = parser.add_argument_group('which agent')
  arguments.flag(
    what,
    'run_dir',
    'Run directory; its newest checkpoint is played.',
    '',
    shown='none',
    metavar='DIR',
  )
  arguments.flag(
    what,
    'checkpoint',
    'Number of updates, or path of a file (then without --run_dir).',
    '',
    shown='the newest',
    metavar='FILE',
  )
  arguments.flag(
    what,
    'set',
    'section.field=value, to change the settings of the run (paths of '
    'data sets, say); may be repeated.',
    many=True,
    shown='none',
    metavar='SETTING',
  )
  how = parser.add_argument_group('what it plays')
  arguments.flag(
    how, 'levels', "Some of the run's levels.", kind=arguments.names, shown='all'
  )
  arguments.flag(
    how,
    'episodes',
    'Whole episodes of each level.',
    100,
    kind=int,
    least=1,
    most=1_000_000,
  )
  arguments.flag(
    how,
    'processes',
    'Environments at a time; in dmlab and doom so many processes. '
    'Those of other suites cost little: 16 or more there.',
    4,
    kind=int,
    least=1,
    most=4096,
  )
  arguments.switch(how, 'greedy', 'Likeliest action instead of sampling.')
  arguments.flag(
    how, 'seed', 'Random seed of the evaluation.', 0, kind=int, least=0, most=2**31 - 1
  )
  output = parser.add_argument_group('what it leaves')
  arguments.switch(output, 'videos', 'Film one episode of each level.')
  arguments.flag(
    output,
    'output',
    'Directory of the results.',
    '',
    metavar='DIR',
    shown='RUN_DIR/evaluations/...',
  )


class _Plan(NamedTuple):
  parts: components.Components
  policy: evaluator.SavedPolicy
  tasks: list[int]
  output: pathlib.Path


class _Signals:
  """The first Ctrl-C or SIGTERM is remembered, one more a second later is deadly.

  A second at once is the same: `timeout` signals the process and then its group.
  """

  def __init__(self) -> None:
    self._first = 0.0
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._remember)

  @property
  def stopped(self) -> bool:
    return self._first > 0.0

  def _remember(self, number: int, _: Any) -> None:
    if not self._first:
      self._first = time.monotonic()
    elif time.monotonic() > self._first + 1.0:
      signal.signal(number, signal.SIG_DFL)
      signal.raise_signal(number)


def _check_flags(args: argparse.Namespace) -> None:
  if args.videos and importlib.util.find_spec('imageio_ffmpeg') is None:
    raise arguments.Mistake('--videos needs imageio-ffmpeg: pip install imageio-ffmpeg')


def _find_policy(args: argparse.Namespace) -> evaluator.SavedPolicy:
  if args.checkpoint and not args.checkpoint.isdecimal():
    return evaluator.read_policy(pathlib.Path(args.checkpoint))
  run_dir = pathlib.Path(args.run_dir)
  if not args.run_dir:
    raise arguments.Mistake('--run_dir is missing: the directory of a run')
  if not RunDirectory(run_dir).config.exists():
    raise arguments.Mistake(f'--run_dir={run_dir}: there is no run (no config.json)')
  directory = RunDirectory(run_dir).checkpoints
  found = checkpointing.paths(directory)
  if args.checkpoint:
    updates = int(args.checkpoint)
    chosen = [p for p in found if int(p.stem.rpartition('_')[2]) == updates]
    if not chosen:
      known = ', '.join(str(int(p.stem.rpartition('_')[2])) for p in found)
      raise arguments.Mistake(f'--checkpoint={updates}: there are {known or "none"}')
    return evaluator.read_policy(chosen[0])
  policy = evaluator.newest_policy(directory)
  if policy is None:
    damaged = f'; {len(found)} damaged' if found else ''
    raise arguments.Mistake(f'--run_dir={run_dir}: holds no sound checkpoint{damaged}')
  return policy


def _find_tasks(
  config: config_lib.Config, asked: list[str] | None
) -> tuple[config_lib.Config, list[int]]:
  """The configuration as it can be run here, and which of its levels are played."""
  suite, levels = config.environment.suite, config.environment.levels
  # A level is known by the name of its training and of its test version.
  by_name = {registry.reference(suite, x).name: x for x in levels} | {
    x: x for x in levels
  }
  asked = asked or list(levels)
  unknown = [name for name in asked if name not in by_name]
  if unknown:
    raise arguments.Mistake(
      f'--levels={",".join(unknown)}: the levels of this run are {", ".join(levels)}'
    )
  chosen = tuple(dict.fromkeys(by_name[name] for name in asked))
  # Levels that are not played need not be there; the number of levels stays, for some
  # suites derive the number of actions from it.
  settings = dataclasses.replace(config.environment, levels=chosen)
  resolved = registry.resolve(dataclasses.replace(config, environment=settings))
  tasks = [levels.index(x) for x in resolved.environment.levels]
  settings = dataclasses.replace(resolved.environment, levels=levels)
  return dataclasses.replace(config, environment=settings), tasks


def _make_output(
  args: argparse.Namespace, policy: evaluator.SavedPolicy
) -> pathlib.Path:
  if args.output:
    output = pathlib.Path(args.output)
    if (output / 'evaluation.json').exists():
      raise arguments.Mistake(f'--output={output}: holds an evaluation already')
  else:
    beside = policy.path.parent
    root = beside.parent if beside.name == 'checkpoints' else beside
    stamp = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
    output = root / 'evaluations' / f'{policy.metadata["updates"]}-{stamp}'
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise arguments.Mistake(f'cannot write {output}: {e.strerror}') from e
  return output


def _plan(args: argparse.Namespace) -> _Plan:
  _check_flags(args)
  policy = _find_policy(args)
  config = config_lib.from_dict(policy.metadata['config'])
  config = config_lib.override(config, args.set)
  config_lib.validate(config)
  config, tasks = _find_tasks(config, args.levels)
  parts = components.build(config)
  evaluator.check_policy(parts.agent, policy)
  return _Plan(parts, policy, tasks, _make_output(args, policy))


def _play(args: argparse.Namespace, plan: _Plan) -> int:
  signals = _Signals()
  config, levels = plan.parts.config, plan.parts.config.environment.levels
  start = time.monotonic()
  results: list[playing.LevelResult] = []

  def name(task_id: int) -> str:
    return registry.reference(config.environment.suite, levels[task_id]).name

  def write(found: list[playing.LevelResult]) -> dict[str, Any]:
    report = evaluation_report.make(
      config,
      plan.policy,
      found,
      episodes=args.episodes,
      seed=args.seed,
      greedy=args.greedy,
      processes=args.processes,
      seconds=round(time.monotonic() - start, 1),
    )
    # Until the last level is done there is more to come.
    report['complete'] &= len(found) == len(plan.tasks)
    files.write_json(plan.output / 'evaluation.json', report)
    return report

  with evaluation_progress.make(len(plan.tasks), args.episodes) as progress:

    def level_ended(result: playing.LevelResult) -> None:
      results.append(result)
      report = write(results)  # So that a power cut does not cost what is there.
      played = name(result.task_id)
      progress.end(played, _words(played, report['levels'][played]))

    progress.say(
      f'{config.name}: {args.episodes} episodes of each of {len(plan.tasks)} '
      f'level(s), with {plan.policy.path}'
    )
    found = playing.play_levels(
      plan.parts,
      plan.policy.params,
      plan.tasks,
      args.episodes,
      processes=args.processes,
      seed=args.seed,
      greedy=args.greedy,
      should_stop=lambda: signals.stopped,
      on_begin=lambda task_id: progress.begin(name(task_id)),
      on_episode=lambda episode: progress.episode(name(episode.task_id)),
      on_level=level_ended,
    )
    report = write(found)
    _draw(report, plan.output)
    failed = [levels[r.task_id] for r in found if r.error]
    if args.videos:
      playable = [r.task_id for r in found if not r.error]
      failed += _film(args, plan, playable, signals, progress)
  for figure, score in report['scores'].items():
    value = round(score['value'], 2)
    print(f'{figure.replace("_", " ")}: {value:g}{_interval(score["ci95"])}')
  print(f'In {plan.output}: {", ".join(sorted(p.name for p in plan.output.iterdir()))}')
  if signals.stopped:
    all_played = all(result.complete for result in found)
    what = 'films are missing' if all_played else 'the evaluation is incomplete'
    print(f'Stopped early: {what}.', file=sys.stderr)
    return 130
  return 1 if failed else 0


def _film(
  args: argparse.Namespace,
  plan: _Plan,
  tasks: list[int],
  signals: _Signals,
  progress: evaluation_progress.Progress,
) -> list[str]:
  """Films the levels, several at a time; returns those that could not be filmed."""
  failed = []

  def film(task_id: int) -> None:
    if signals.stopped:
      return
    config = plan.parts.config
    level = config.environment.levels[task_id]
    name = registry.reference(config.environment.suite, level).name
    try:
      path = films.film(
        plan.parts,
        plan.policy.params,
        level,
        plan.output,
        seed=args.seed,
        greedy=args.greedy,
        should_stop=lambda: signals.stopped,
      )
      progress.say(f'{name}: ' + (f'film {path.name}' if path else 'has no pictures'))
    except Exception as e:  # The figures are written; the other films can be.
      progress.say(f'{name}: could not be filmed: {type(e).__name__}: {e}')
      failed.append(level)

  with concurrent.futures.ThreadPoolExecutor(args.processes) as threads:
    list(threads.map(film, tasks))
  return failed


def _draw(report: dict[str, Any], output: pathlib.Path) -> None:
  try:
    bar_charts.draw(report, output / 'evaluation.png')
  except ImportError:
    print('no chart: matplotlib is not installed', file=sys.stderr)


def _words(name: str, level: dict[str, Any]) -> str:
  """One line of what came out for a level."""
  line = f'{name:<38}'
  if level['mean'] is not None:
    line += f' {level["mean"]:9.2f}{_interval(level["ci95"])}'
  if level['score'] is not None:
    line += f'  score {level["score"]:.1f} ({level["reference_is"]}: 100)'
  if not level['complete']:
    line += f'  only {level["episodes"]} of {level["planned_episodes"]} episodes'
  if level['engine_failures']:
    line += f'  {len(level["engine_failures"])} engines replaced'
  if level['error']:
    line += f'  FAILED: {level["error"]}'
  return line


def _interval(interval: list[float] | None) -> str:
  if interval is None or interval[0] == interval[1]:
    return ''
  return ' [{:.2f}, {:.2f}]'.format(*interval)


def run(args: argparse.Namespace) -> int:
  compile_cache.enable()
  logging.set_verbosity(logging.WARNING)
  # JAX warns of forks; engines and the film's encoder are executed at once.
  warnings.filterwarnings('ignore', r'os\.fork', RuntimeWarning)
  try:
    plan = _plan(args)
  # Networks and environments that do not fit each other are ValueErrors, too.
  except (ValueError, checkpointing.CheckpointError) as e:
    raise arguments.Mistake(str(e)) from e
  return _play(args, plan)
