"""Looks after a launched run.

status RUN_DIR                  who is up, restarts, speed; --json for programs
logs RUN_DIR [ROLE [INDEX]]     the last --lines of a role's log; default: learner
scale RUN_DIR actors N          adds or removes actors while the run goes on
stop RUN_DIR                    learner first, with a checkpoint; bounded in time
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from impala_jax.commands import arguments
from impala_jax.launching import backends
from impala_jax.launching.backends import backend, kubernetes, ownership
from impala_jax.reporting import engine_figures, inference_figures
from impala_jax.runtime import files, lease
from impala_jax.runtime.run_directory import process_name

USAGE = 'COMMAND DIR [ARGUMENT ...] [flags]'
_STATES = ('running', 'pending', 'done', 'failed')
_SHOWN = 20  # Replicas told about one by one.
_STALE = 60.0  # Seconds without a word from the learner that are worth a remark.


def status(run_dir: pathlib.Path) -> dict[str, Any]:
  """What is known of a run: engine, supervisors and learner joined.

  Returns:
    `run`, `launcher`, `training` (the learner's last status, empty before the first;
    `age` in seconds), `ended` (reason and cause, empty while it runs), and `tasks`,
    a list with role, index, state, where, detail, restarts, incarnation.

  Raises:
    backend.BackendError: nothing was launched there, or the engine does not answer.
  """
  launch = backend.read_launch(run_dir)
  run = launch.run
  engine = backends.of_launch(launch)
  tasks = []
  for task in engine.status(launch):
    record = files.read_json(run.supervised(task.role, task.index))
    words = record.get('words', '')
    detail = task.detail
    if words and record.get('state') in ('failed', 'restarting'):
      detail += f': {words}'
    tasks.append(
      {
        **dataclasses.asdict(task),
        'detail': detail,
        'restarts': record.get('restarts', 0),
        'incarnation': record.get('incarnation', -1),
      }
    )
  return {
    'run': launch.program.name,
    'launcher': launch.launcher,
    'training': _training(launch, engine),
    'ended': run.how_ended(),
    'tasks': tasks,
  }


def describe(report: dict[str, Any]) -> str:
  """`status` for people."""
  lines = [f'{report["run"]} on {report["launcher"]}']
  if ended := report['ended']:
    lines.append(f'the run {ended["reason"]} {ended.get("cause", "")}'.rstrip())
  lines.append(_describe_training(report['training']))
  counts: dict[str, collections.Counter[str]] = {}
  for task in report['tasks']:
    counter = counts.setdefault(task['role'], collections.Counter())
    counter[task['state']] += 1
    counter['restarts'] += task['restarts']
  heads = (*_STATES, 'restarts')
  lines.append(f'{"":10}' + ''.join(f'{h:>10}' for h in heads))
  lines += [
    f'{role:10}' + ''.join(f'{c[h]:>10}' for h in heads) for role, c in counts.items()
  ]
  notable = [t for t in report['tasks'] if t['state'] != 'running' or t['restarts']]
  # Failures first.
  notable.sort(key=lambda t: (-_STATES.index(t['state']), t['role'], t['index']))
  for task in notable[:_SHOWN]:
    name = process_name(task['role'], task['index'])
    where = f' on {task["where"]}' if task['where'] else ''
    restarts = f', {task["restarts"]} restarts' if task['restarts'] else ''
    lines.append(f'{name}: {task["state"]}{where}{restarts}; {task["detail"]}')
  if len(notable) > _SHOWN:
    lines.append(f'and {len(notable) - _SHOWN} more; --json has all')
  return '\n'.join(lines)


def _training(launch: backend.Launch, engine: backend.Backend) -> dict[str, Any]:
  training = launch.run.read_status()
  if not training and isinstance(engine, kubernetes.Kubernetes):
    try:
      training = json.loads(engine.run_file(launch, launch.run.status.name))
    except (backend.BackendError, ValueError):
      return {}
  if training:
    training['age'] = max(0.0, time.time() - training['time'])
  return training


def _describe_training(training: dict[str, Any]) -> str:
  if not training:
    return 'training: nothing heard of the learner yet'
  words = (
    f'training: {training["frames"]:,} of {training["total_frames"]:,} frames, '
    f'{training["frames_per_second"]:,.0f} frames/s, '
    f'{training["updates"]:,} updates, '
    f'lag {training["policy_lag_mean"]:.1f}, '
    f'queue {training["queue_fill"]:.0%}, bottleneck: {training["bottleneck"]}'
  )
  if training.get('episode_return') is not None:
    words += f', return {training["episode_return"]:.2f}'
  if inference := inference_figures.describe(training):
    words += f'; inference: {inference}'
  if engines := engine_figures.describe(training):
    words += f'; engines: {engines}'
  for line in training.get('given_up', ()):
    words += f'\nlevel {line}'
  if training['age'] > _STALE:
    words += f'; that was {training["age"]:.0f} s ago'
  return words


def _status(launch: backend.Launch, args: argparse.Namespace) -> str:
  report = status(launch.run_dir)
  return json.dumps(report, indent=1) if args.json else describe(report)


def _logs(launch: backend.Launch, args: argparse.Namespace) -> str:
  more = args.arguments
  role = launch.program.role(more[0] if more else 'learner')
  index = _number(more[1], 'INDEX') if len(more) > 1 else 0
  if not 0 <= index < role.replicas:
    raise ValueError(f'{role.name} {index}: there are 0 to {role.replicas - 1}')
  return backends.of_launch(launch).log(launch, role.name, index, args.lines)


def _scale(launch: backend.Launch, args: argparse.Namespace) -> str:
  if len(args.arguments) != 2:
    raise ValueError('write scale RUN_DIR actors N')
  name, number = args.arguments
  role = {'actors': 'actor'}.get(name, name)
  replicas = _number(number, 'N')
  if ended := launch.run.how_ended():
    raise ValueError(
      f'the run {ended.get("reason")}: nothing is left to scale; go on with it by '
      '--resume'
    )
  return backends.of_launch(launch).scale(launch, role, replicas)


def _stop(launch: backend.Launch, args: argparse.Namespace) -> str:
  ownership.check_in_reach(launch)
  ended = launch.run.how_ended()
  words = backends.of_launch(launch).stop(launch)
  lease.release(launch.run, lease.launch_of(launch.program.first_incarnation))
  return f'the run {ended.get("reason")} before; {words}' if ended else words


def _number(text: str, name: str) -> int:
  if not text.isdecimal() or len(text) > 7:
    raise ValueError(f'{name} is {text!r:.60}: must be a whole number up to 9,999,999')
  return int(text)


_COMMANDS = {'status': _status, 'logs': _logs, 'scale': _scale, 'stop': _stop}


def add_flags(parser: arguments.Parser) -> None:
  arguments.one_of(parser, 'command', 'COMMAND', list(_COMMANDS))
  parser.add_argument(
    'run_dir', metavar='DIR', help='directory of the run', type=pathlib.Path
  )
  parser.add_argument(
    'arguments', nargs='*', default=[], metavar='ARGUMENT', help='ROLE, INDEX or N'
  )
  arguments.flag(parser, 'lines', 'Of logs.', 40, kind=int, least=1, most=1_000_000)
  arguments.switch(parser, 'json', 'Of status: for programs.')


def run(args: argparse.Namespace) -> int:
  try:
    launch = backend.read_launch(args.run_dir.absolute())
    print(_COMMANDS[args.command](launch, args))
  except (backend.BackendError, ValueError, KeyError) as e:
    words = e.args[0] if e.args else repr(e)
    print(f'impala_jax: {words}', file=sys.stderr)
    return 1
  return 0
