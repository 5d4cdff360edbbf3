"""Looks after a launched run: `python -m launch.manage COMMAND RUN_DIR`.

status RUN_DIR                  who is up, restarts, speed; --json for programs
logs RUN_DIR [ROLE [INDEX]]     the last --lines of a role's log; default: learner
scale RUN_DIR actors N          adds or removes actors while the run goes on
stop RUN_DIR                    learner first, with a checkpoint; bounded in time
"""

import collections
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from absl import app, flags

from impala_jax.launching import backends
from impala_jax.launching.backends import backend, kubernetes
from impala_jax.reporting import inference_figures
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import process_name

_LINES = flags.DEFINE_integer('lines', 40, 'Of logs.')
_JSON = flags.DEFINE_bool('json', False, 'status: for programs.')

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
    tasks.append({
        **dataclasses.asdict(task), 'detail': detail,
        'restarts': record.get('restarts', 0),
        'incarnation': record.get('incarnation', -1),
    })  # fmt: skip
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
  if training['age'] > _STALE:
    words += f'; that was {training["age"]:.0f} s ago'
  return words


def _status(launch: backend.Launch, arguments: list[str]) -> str:
  report = status(launch.run_dir)
  return json.dumps(report, indent=1) if _JSON.value else describe(report)


def _logs(launch: backend.Launch, arguments: list[str]) -> str:
  role = launch.program.role(arguments[0] if arguments else 'learner')
  index = _number(arguments[1], 'INDEX') if len(arguments) > 1 else 0
  if not 0 <= index < role.replicas:
    raise ValueError(f'{role.name} {index}: there are 0 to {role.replicas - 1}')
  return backends.of_launch(launch).log(launch, role.name, index, _LINES.value)


def _scale(launch: backend.Launch, arguments: list[str]) -> str:
  if len(arguments) != 2:
    raise ValueError('write scale RUN_DIR actors N')
  role = {'actors': 'actor'}.get(arguments[0], arguments[0])
  replicas = _number(arguments[1], 'N')
  return backends.of_launch(launch).scale(launch, role, replicas)


def _stop(launch: backend.Launch, arguments: list[str]) -> str:
  return backends.of_launch(launch).stop(launch)


def _number(text: str, name: str) -> int:
  if not text.isdecimal():
    raise ValueError(f'{name} is {text!r}: must be a number')
  return int(text)


_COMMANDS = {'status': _status, 'logs': _logs, 'scale': _scale, 'stop': _stop}


def main(argv: list[str]) -> int:
  if len(argv) < 3 or argv[1] not in _COMMANDS:
    print(__doc__, file=sys.stderr)
    return 2
  try:
    launch = backend.read_launch(pathlib.Path(argv[2]).absolute())
    print(_COMMANDS[argv[1]](launch, argv[3:]))
  except (backend.BackendError, ValueError, KeyError) as e:
    words = e.args[0] if e.args else repr(e)
    print(f'impala_jax: {words}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
