"""Learning curves of several runs in one picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from impala_jax.reporting import plots
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


def draw(
  runs: Sequence[pathlib.Path], path: pathlib.Path, title: str = ''
) -> list[str]:
  """Draws returns against frames, of all runs together, into `path`.

  Of runs of suites that have a score, all of the same, the score instead.

  Returns:
    A line for each run: frames, minutes, agent steps a second, last returns.

  Raises:
    ValueError: no episode of a run has ended yet; or the file's ending names no kind
      of picture.
    OSError: `path` cannot be written.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
  lines = []
  found = {run: _records(run) for run in runs}
  score = _common_score([records[-1] for records in found.values()])
  for run, records in found.items():
    trained = [
      (r['frames'], plots.scores_of(r).get(score) if score else r['episode_return'])
      for r in records
    ]
    (line,) = axes.plot(*_drawn(trained), label=plots.no_formula(run.name))
    evaluations = files.read_json_lines(RunDirectory(run).evaluations)
    evaluated = [
      (e['frames'], e.get('scores', {}).get(score) if score else e['mean'])
      for e in evaluations
    ]
    axes.plot(
      *_drawn(evaluated),
      'o',
      ms=4,
      color=line.get_color(),
      alpha=0.6,
    )
    last = records[-1]
    rate = np.median([r['agent_steps_per_second'] for r in records])
    lines.append(
      f'{run.name}: {last["frames"]:,} frames in {last["wall_seconds"] / 60:.1f} '
      f'minutes, {rate:,.0f} agent steps/s (median); return in training '
      f'{last["episode_return"]:.1f}'
      + (f', last evaluation {evaluations[-1]["mean"]:.1f}' if evaluations else '')
    )
  axes.set_xlabel('frames (action repeats counted)')
  words = score.replace('_', ' ')
  axes.set_ylabel(f'{words} of the suite' if score else 'episode return (raw score)')
  axes.set_title(title + ': lines in training, dots in evaluation', fontsize=10)
  axes.xaxis.set_major_formatter(lambda x, _: plots.short(x))
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path)
  pyplot.close(figure)
  return lines


def _records(run: pathlib.Path) -> list[dict[str, Any]]:
  """Those with an episode that has ended."""
  found = files.read_json_lines(RunDirectory(run).metrics)
  needed = ('frames', 'wall_seconds', 'agent_steps_per_second', 'episode_return')
  found = [r for r in found if all(r.get(name) is not None for name in needed)]
  if not found:
    raise ValueError(f'{run}: no finished episode')
  return found


def _common_score(records: Sequence[Mapping[str, Any]]) -> str:
  """The first of the suite's figures that all have; empty where there is none."""
  first, *others = ([*plots.scores_of(dict(r))] for r in records)
  return next((x for x in first if all(x in other for other in others)), '')


def _drawn(
  points: Sequence[tuple[float, float | None]],
) -> tuple[list[float], list[float]]:
  known = [(x, y) for x, y in points if y is not None]
  return [x for x, _ in known], [y for _, y in known]
