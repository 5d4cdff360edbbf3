"""Learning curves of a run."""

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from impala_jax.environments import registry, scoring
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory

_TRAINING = '#1f77b4'
_EVALUATION = '#d62728'
_BY_LEVEL = 'episode_return/'
_SCORE = 'score/'


def learning_curve(run_dir: pathlib.Path) -> pathlib.Path | None:
  """Draws returns in training and evaluation against frames.

  Of several levels, whose returns may be of unlike sizes, it draws the suite's score
  instead, where the suite has one.

  Returns:
    The path of `learning_curve.png`, or None where no episode has ended yet.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  records = _records(run_dir)
  evaluations = files.read_json_lines(RunDirectory(run_dir).evaluations)
  several = len(_levels_of(run_dir)[1]) > 1
  scores = list(_score_curves(records, evaluations)) if several else []
  training = [
    (r['frames'], r['episode_return'])
    for r in records
    if r.get('episode_return') is not None
  ]
  if not training and not evaluations:
    return None
  figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
  for points, style in scores:
    axes.plot(*zip(*points, strict=True), **style)
  if scores:
    axes.set_ylabel('score of the suite')
  else:
    if training:
      axes.plot(*zip(*training, strict=True), color=_TRAINING, lw=1.8,
                label='training: mean of the last 100 episodes')  # fmt: skip
    if evaluations:
      _draw_evaluations(axes, evaluations)
    mean = ', mean over levels' if several else ''
    axes.set_ylabel(f'episode return (raw score{mean})')
  axes.set_xlabel('frames (action repeats counted)')
  axes.set_title(_title(run_dir, records), fontsize=10)
  axes.xaxis.set_major_formatter(lambda x, _: short(x))
  axes.set_xlim(left=0)
  axes.grid(alpha=0.3)
  axes.legend(loc='best', fontsize=8)
  if records:
    _add_time_axis(axes, records)
  figure.tight_layout()
  path = RunDirectory(run_dir).learning_curve
  figure.savefig(path)
  pyplot.close(figure)
  return path


def _score_curves(
  records: list[dict[str, Any]], evaluations: list[dict[str, Any]]
) -> Iterator[tuple[list[tuple[float, float]], dict[str, Any]]]:
  """Points and style of each figure that the suite makes of all its levels.

  A partial score is another figure than that of the whole suite, and has a line of its
  own; of how many levels it is, is none.
  """
  trained = [(r['frames'], scores_of(r)) for r in records]
  evaluated = [(e['frames'], e.get('scores', {})) for e in evaluations]
  for where, found, color, marker in (
    ('training', trained, _TRAINING, ''),
    ('evaluation', evaluated, _EVALUATION, 'o'),
  ):
    names = dict.fromkeys(name for _, scores in found for name in scores)
    for name in names:
      if name == scoring.PARTIAL_LEVELS:
        continue
      points = [(x, s[name]) for x, s in found if s.get(name) is not None]
      style: dict[str, Any] = {
        'color': color,
        'label': f'{where}: {name.replace("_", " ")}',
      }
      if name.startswith('partial') or 'uncapped' in name:
        style |= {'lw': 0.8, 'alpha': 0.6}
      if points:
        yield points, {'marker': marker, 'ms': 3, **style}


def scores_of(record: dict[str, Any]) -> dict[str, float]:
  """The figures of the suite in a record, by name."""
  return {k.removeprefix(_SCORE): v for k, v in record.items() if k.startswith(_SCORE)}


def level_curves(run_dir: pathlib.Path) -> pathlib.Path | None:
  """Draws the returns of each level of a multi-task run against frames.

  With the returns of random play and of people or another reference, where these are
  known.

  Returns:
    The path of `level_curves.png`, or None for a run of one level, or before the
    first episode has ended.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  records = _records(run_dir)
  training, evaluated = _points(run_dir, records)
  suite, configured = _levels_of(run_dir)
  seen = evaluated | training
  levels = [x for x in configured or seen if x in seen]
  if not levels or len(configured or levels) < 2:
    return None
  columns = min(5, math.ceil(math.sqrt(len(levels))))
  rows = math.ceil(len(levels) / columns)
  figure, grid = pyplot.subplots(
    rows,
    columns,
    figsize=(3.1 * columns, 2.0 * rows + 0.7),
    dpi=110,
    squeeze=False,
    layout='constrained',
  )
  legend: dict[str, Any] = {}
  for axes, level in zip(grid.flat, levels, strict=False):
    known = registry.reference(suite, level)
    _draw_level(axes, known, training.get(level), evaluated.get(level))
    tested = '' if level.endswith(known.name) else f'\nevaluated on {known.name}'
    axes.set_title(no_formula(f'{level}{tested}'), fontsize=8)
    handles, labels = axes.get_legend_handles_labels()
    legend |= dict(zip(labels, handles, strict=True))
  for axes in grid.flat[len(levels) :]:
    axes.set_visible(False)
  figure.supxlabel('frames of all levels (action repeats counted)', fontsize=8)
  figure.supylabel('episode return (raw score)', fontsize=8)
  figure.legend(
    legend.values(),
    legend.keys(),
    fontsize=8,
    ncols=4 if columns > 2 else 2,
    loc='outside upper center',
    frameon=False,
    title=_title(run_dir, records),
  )
  path = RunDirectory(run_dir).level_curves
  figure.savefig(path)
  pyplot.close(figure)
  return path


def _records(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  found = files.read_json_lines(RunDirectory(run_dir).metrics)
  return [r for r in found if 'frames' in r and 'wall_seconds' in r]


_Points = dict[str, list[tuple[float, float]]]  # Frames and return, by level.


def _points(
  run_dir: pathlib.Path, records: list[dict[str, Any]]
) -> tuple[_Points, _Points]:
  """In training and in evaluation."""
  training: _Points = {}
  evaluated: _Points = {}
  for record in records:
    for name, value in record.items():
      if name.startswith(_BY_LEVEL) and value is not None:
        points = training.setdefault(name.removeprefix(_BY_LEVEL), [])
        points.append((record['frames'], value))
  for event in files.read_json_lines(RunDirectory(run_dir).evaluations):
    for level, mean in event['means'].items():
      evaluated.setdefault(level, []).append((event['frames'], mean))
  return training, evaluated


def _draw_level(
  axes: Any,
  known: scoring.Reference,
  training: list[tuple[float, float]] | None,
  evaluated: list[tuple[float, float]] | None,
) -> None:
  from matplotlib import ticker

  for value, style, name in (
    (known.random, ':', 'random play'),
    (known.full, '--', known.full_is),
  ):
    if value is not None:
      axes.axhline(value, color='#666666', lw=1, ls=style, label=name)
  if training:
    axes.plot(*zip(*training, strict=True), color=_TRAINING, lw=1.5,
              label='training: mean of the last 100 episodes')  # fmt: skip
  if evaluated:
    axes.plot(*zip(*evaluated, strict=True), 'o-', color=_EVALUATION, lw=0.8, ms=3,
              label='evaluation: mean')  # fmt: skip
  axes.tick_params(labelsize=7)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
  axes.xaxis.set_major_formatter(lambda x, _: short(x))
  axes.set_xlim(left=0)
  axes.grid(alpha=0.3)


def _levels_of(run_dir: pathlib.Path) -> tuple[str, list[str]]:
  """Suite and levels of a run; empty where its settings cannot be read."""
  environment = RunDirectory(run_dir).settings().get('environment', {})
  return environment.get('suite', ''), environment.get('levels', [])


def _draw_evaluations(axes: Any, evaluations: list[dict[str, Any]]) -> None:
  frames = np.array([e['frames'] for e in evaluations], dtype=float)
  spread = [np.concatenate(list(e['returns'].values())) for e in evaluations]
  axes.plot(frames, [e['mean'] for e in evaluations], 'o-', color=_EVALUATION, lw=1,
            ms=4, label='evaluation: mean')  # fmt: skip
  axes.fill_between(frames, [s.min() for s in spread], [s.max() for s in spread],
                    color=_EVALUATION, alpha=0.12, lw=0,
                    label='evaluation: lowest to highest')  # fmt: skip


def _add_time_axis(axes: Any, records: list[dict[str, Any]]) -> None:
  """Minutes of wall time above the frames at which they had passed."""
  frames = np.array([r['frames'] for r in records], dtype=float)
  minutes = np.array([r['wall_seconds'] for r in records], dtype=float) / 60
  if frames[-1] <= 0:
    return
  step = _nice_step(minutes[-1] / 6)
  marks = np.arange(step, minutes[-1] + step / 100, step)
  places = np.interp(marks, minutes, frames)
  twin = axes.twiny()
  twin.set_xlim(axes.get_xlim())
  twin.set_xticks(places, [f'{m:g}' for m in marks])
  twin.set_xlabel('minutes', fontsize=8)
  twin.tick_params(labelsize=7)


def _nice_step(about: float) -> float:
  """1, 2 or 5 times a power of ten, near `about`."""
  power = 10.0 ** np.floor(np.log10(max(about, 1e-3)))
  return float(min((power * k for k in (1, 2, 5, 10)), key=lambda s: abs(s - about)))


def _title(run_dir: pathlib.Path, records: list[dict[str, Any]]) -> str:
  name = no_formula(run_dir.resolve().name)
  if not records:
    return name
  last = records[-1]
  minutes = last['wall_seconds'] / 60
  return f'{name}: {short(last["frames"])} frames in {minutes:.1f} minutes'


def no_formula(name: str) -> str:
  """So that matplotlib draws a name as it is, dollars included."""
  return name.replace('$', r'\$')


def short(x: float) -> str:
  """A number as 12.3 k, 4 M."""
  for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(x) >= size:
      return f'{x / size:.3g} {unit}'
  return f'{x:.0f}'
