"""What the terminal shows of a run: a live panel, or plain lines in a log."""

import contextlib
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rich.columns
import rich.console
import rich.live
import rich.panel
import rich.progress_bar
import rich.table
import rich.text

from impala_jax import config as config_lib
from impala_jax.reporting import engine_figures, inference_figures
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

_PLAIN_INTERVAL = 10.0  # Seconds between plain lines.
Show = Callable[[dict[str, Any], str], None]


@contextlib.contextmanager
def make(kind: str, config: config_lib.Config, run_dir: pathlib.Path) -> Iterator[Show]:
  """A function that shows (status, phase), for as long as the context lasts."""
  if kind == 'auto':
    kind = 'live' if sys.stdout and sys.stdout.isatty() else 'plain'
  if kind == 'live':
    console = rich.console.Console()
    history: list[float] = []
    start = time.monotonic()
    with rich.live.Live(console=console, refresh_per_second=4) as live:
      yield lambda status, phase: live.update(
        panel(config, run_dir, status, phase, history, time.monotonic() - start)
      )
  elif kind == 'plain':
    yield _Plain(config, run_dir)
  else:
    yield lambda status, phase: None


class _Plain:
  """A line now and then, for logs."""

  def __init__(self, config: config_lib.Config, run_dir: pathlib.Path):
    print(f'{config.name}: {_levels(config)}; run directory {run_dir}', flush=True)
    self._start = time.monotonic()
    self._next = 0.0
    self._phase = 'running'
    self._closed = False
    self._given_up: list[str] = []
    self._told: float | None = None  # The time of the status that was shown.

  def __call__(self, status: dict[str, Any], phase: str) -> None:
    if self._closed:
      return
    try:
      self._print(status, phase)
    except BrokenPipeError:
      # Days of training are worth more than somebody who reads along.
      self._closed = True
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      print(
        'impala_jax: nobody reads what this command prints: the run goes on; Ctrl-C '
        'ends it',
        file=sys.stderr,
      )

  def _print(self, status: dict[str, Any], phase: str) -> None:
    now = time.monotonic()
    due = now >= self._next
    # Numbers in it may grow with each look.
    changed = re.sub(r'\d+ s\b', '', phase) != re.sub(r'\d+ s\b', '', self._phase)
    news = status.get('time') != self._told
    if changed or (due and not news):
      print(f'{now - self._start:7.0f} s  {phase}', flush=True)
    self._phase = phase
    if (lines := status.get('given_up', self._given_up)) != self._given_up:
      self._given_up = lines
      for line in lines:
        print(f'{now - self._start:7.0f} s  level {line}', flush=True)
    if due:
      self._next = now + _PLAIN_INTERVAL
    if not due or not news or not status:
      return
    self._told = status.get('time')
    print(
      f'{now - self._start:7.0f} s  {status["frames"]:>12,} frames  '
      f'{status["frames_per_second"]:7,.0f} frames/s  '
      f'return {_number(status.get("episode_return"), 1)}  '
      f'evaluation {_number(status.get("evaluation_return"), 1)}  '
      f'{_scores_in_words(status)}'
      f'lag {status["policy_lag_mean"]:.1f}  '
      f'queue {status["queue_fill"]:.0%}  bottleneck: {status["bottleneck"]}',
      flush=True,
    )


def panel(
  config: config_lib.Config,
  run_dir: pathlib.Path,
  status: dict[str, Any],
  phase: str,
  history: list[float],
  seconds: float = 0.0,
) -> rich.panel.Panel:
  """The whole screen, after so many seconds.

  `history` collects returns for the small curve.
  """
  # Of names, paths and causes none is read as markup.
  words = f'  {config.name}: {_levels(config)}'
  title = rich.text.Text.assemble(('impala_jax', 'bold'), words)
  if not status:
    waiting = rich.text.Text(f'{seconds:.0f} s: {phase} …')
    return rich.panel.Panel(waiting, title=title, subtitle=rich.text.Text(str(run_dir)))
  grid = rich.table.Table.grid(padding=(0, 2))
  grid.add_column(style='cyan', justify='right', no_wrap=True)
  grid.add_column(ratio=1)
  done = status['frames'] / status['total_frames']
  rate = status['frames_per_second']
  left = status.get('seconds_left')
  bar = rich.table.Table.grid(padding=(0, 1))
  bar.add_row(
    rich.progress_bar.ProgressBar(total=1.0, completed=done, width=28),
    f'{status["frames"]:,} of {status["total_frames"]:,}  ({done:.0%})'
    + (f'  about {_duration(left)} to go' if left is not None else ''),
  )
  grid.add_row('frames', bar)
  grid.add_row(
    'speed',
    f'[bold]{rate:,.0f}[/bold] frames/s = '
    f'{status["agent_steps_per_second"]:,.0f} agent steps/s, '
    f'{status["updates"]:,} updates in {_duration(status["wall_seconds"])}',
  )
  value = status.get('episode_return')
  if value is not None and (not history or history[-1] != value):
    history.append(value)
  grid.add_row(
    'episode return',
    f'[bold green]{_number(value)}[/bold green] in training '
    f'({status["episodes"]:,} episodes), '
    f'[bold green]{_number(status.get("evaluation_return"))}[/bold green] in '
    f'evaluation   {_sparkline(history)}',
  )
  _add_scores(grid, status)
  grid.add_row(
    'losses',
    f'policy {_number(status.get("policy_loss"))}  '
    f'baseline {_number(status.get("baseline_loss"))}  '
    f'entropy {_number(status.get("entropy"), 3)}  '
    f'gradient norm {_number(status.get("grad_norm"))}  '
    f'learning rate {status["learning_rate"]:.2e}',
  )
  grid.add_row(
    'data',
    f'policy lag {status["policy_lag_mean"]:.1f} updates '
    f'(at most {status["policy_lag_max"]:.0f}), queue {status["queue_fill"]:.0%} full, '
    f'unrolls {status["unrolls_received"]:,}{_troubles(status)}',
  )
  grid.add_row('learner time', _shares(status, 'learner_time/'))
  grid.add_row('actor time', _shares(status, 'actor_time/'))
  if inference := inference_figures.describe(status):
    grid.add_row('inference', inference)
  if engines := engine_figures.describe(status):
    grid.add_row('engines', engines)
  for line in status.get('given_up', ()):
    grid.add_row('level', rich.text.Text(line, style='bold red'))
  grid.add_row('bottleneck', rich.text.Text(status['bottleneck'], style='yellow'))
  _add_levels(grid, status)  # Last: many of them may not fit on the screen.
  subtitle = rich.text.Text(f'{phase} · {run_dir}')
  return rich.panel.Panel(grid, title=title, subtitle=subtitle)


def print_config(config: config_lib.Config) -> None:
  print(json.dumps(config_lib.to_dict(config), indent=1))
  print(
    f'one update: {config.learner.batch_size} unrolls x '
    f'{config.actor.unroll_length} steps x {config.action_repeat} = '
    f'{config.frames_per_update} frames; {config.total_updates} updates'
  )


def print_ending(run_dir: pathlib.Path, code: int, since: float = 0.0) -> None:
  """How the run ended and what it left behind.

  Args:
    run_dir: of the run.
    code: exit code.
    since: Unix time of its start; evaluations before are not of it.
  """
  run = RunDirectory(run_dir)
  kinds = {
    run.metrics: f'metrics (also for TensorBoard, in {run.tensorboard.name}/)',
    run.checkpoints: 'checkpoints; go on with --resume --run_dir',
    run.learning_curve: 'learning curve',
    run.level_curves: 'learning curve of each level',
    run.logs: 'logs of every process',
  }
  found = [(path.name, text) for path, text in kinds.items() if path.exists()]
  found += [(p.name, 'the evaluated agent playing') for p in run_dir.glob('*.mp4')]
  status = run.read_status()
  if 'frames' in status:
    print(f'{status["frames"]:,} of {status["total_frames"]:,} frames.', end=' ')
  for line in status.get('given_up', ()):
    print(f'Level {line}.')
  evaluations = [e for e in files.read_json_lines(run.evaluations) if e['time'] > since]
  if evaluations:
    print(f'Last evaluation{_evaluation_in_words(evaluations[-1])}.')
  print(f'{"Ended" if code == 0 else "Failed"}. In {run_dir}:')
  for name, text in found:
    print(f'  {name:<28} {text}')
  status = run.read_status()
  if status.get('skipped'):
    print(
      f'{status["skipped"]:.0f} of {status.get("updates", 0)} updates were skipped: '
      'loss, gradient or new parameters were not finite'
    )


def _evaluation_in_words(event: dict[str, Any]) -> str:
  count = sum(map(len, event['returns'].values()))
  words = f' at {event["frames"]:,} frames: return {event["mean"]:.2f}'
  words += f', mean of {count} episodes'
  if (levels := len(event['means'])) > 1:
    words += f' of {levels} levels'
  for name, value in event.get('scores', {}).items():
    words += f', {name.replace("_", " ")} {value:.1f}'
  if failed := event.get('failed'):
    words += f'; not played: {", ".join(failed)}'
  return words


def _levels(config: config_lib.Config) -> str:
  names = config.environment.levels
  if len(names) > 4:
    return f'{", ".join(names[:2])} and {len(names) - 2} more levels'
  return ', '.join(names)


def _add_scores(grid: rich.table.Table, status: dict[str, Any]) -> None:
  """One line of the suite's figures, in training and in evaluation."""
  words = []
  for prefix, where in (('score/', 'training'), ('evaluation_score/', 'evaluation')):
    found = _starting_with(status, prefix)
    if found:
      words.append(
        ', '.join(
          f'{name.replace("_", " ")} [bold green]{_number(value, 1)}[/bold green]'
          for name, value in found.items()
        )
        + f' in {where}'
      )
  if words:
    grid.add_row('suite', '   '.join(words))


def _scores_in_words(status: dict[str, Any]) -> str:
  found = _starting_with(status, 'score/')
  words = [f'{k.replace("_", " ")} {_number(v, 1)}  ' for k, v in found.items()]
  return ''.join(words)


def _add_levels(grid: rich.table.Table, status: dict[str, Any]) -> None:
  by_level = _starting_with(status, 'episode_return/')
  if by_level:
    words = [
      rich.text.Text(f'{level} {_number(value, 1)}')
      for level, value in by_level.items()
    ]
    grid.add_row('by level', rich.columns.Columns(words, padding=(0, 2)))


def _starting_with(status: dict[str, Any], prefix: str) -> dict[str, Any]:
  return {k.removeprefix(prefix): v for k, v in status.items() if k.startswith(prefix)}


def _troubles(status: dict[str, Any]) -> str:
  words = []
  for name, text in (
    ('unrolls_corrupted', 'corrupted'),
    ('unrolls_refused', 'impossible'),
    ('reports_refused', 'reports refused'),
    ('unrolls_lost', 'lost'),
    ('unrolls_duplicated', 'repeated'),
    ('environment_failures', 'engines replaced'),
    ('unrolls_stale', 'too old'),
    ('unrolls_dropped', 'unfinished dropped'),
  ):
    if status.get(name):
      words.append(f'{status[name]:.0f} {text}')
  if status.get('skipped'):
    words.append(f'{status["skipped"]:.0f} updates skipped (not finite)')
  return f', [red]{", ".join(words)}[/red]' if words else ''


def _shares(status: dict[str, Any], prefix: str) -> str:
  shares = _starting_with(status, prefix)
  if not shares:
    return 'not known yet'
  ordered = sorted(shares.items(), key=lambda kv: -kv[1])
  return '  '.join(f'{k} {v:.0%}' for k, v in ordered if v >= 0.005)


def _sparkline(values: list[float], width: int = 24) -> str:
  if len(values) < 2:
    return ''
  step = max(1, len(values) // width)
  some = values[::-1][::step][::-1][-width:]
  low, high = min(some), max(some)
  if high == low:
    return ''
  return ''.join('▁▂▃▄▅▆▇█'[int(7 * (v - low) / (high - low))] for v in some)


def _number(value: float | None, digits: int = 2) -> str:
  return '-' if value is None else f'{value:.{digits}f}'


def _duration(seconds: float) -> str:
  if seconds < 90:
    return f'{seconds:.0f} s'
  if seconds < 5400:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'
