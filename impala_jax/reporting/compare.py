"""Learning curves of several runs in one picture."""

import pathlib
from collections.abc import Sequence

import numpy as np

from impala_jax.reporting import plots
from impala_jax.runtime import files
from impala_jax.runtime.run_directory import RunDirectory


def draw(
  runs: Sequence[pathlib.Path], path: pathlib.Path, title: str = ''
) -> list[str]:
  """Draws returns against frames, of all runs together, into `path`.

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
  for run in runs:
    records = [
      r
      for r in files.read_json_lines(RunDirectory(run).metrics)
      if r.get('episode_return') is not None
    ]
    if not records:
      raise ValueError(f'{run}: no finished episode')
    frames = [r['frames'] for r in records]
    name = plots.no_formula(run.name)
    (line,) = axes.plot(frames, [r['episode_return'] for r in records], label=name)
    evaluations = files.read_json_lines(RunDirectory(run).evaluations)
    axes.plot(
      [e['frames'] for e in evaluations],
      [e['mean'] for e in evaluations],
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
  axes.set_ylabel('episode return (raw score)')
  axes.set_title(title + ': lines in training, dots in evaluation', fontsize=10)
  axes.xaxis.set_major_formatter(lambda x, _: plots.short(x))
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path)
  pyplot.close(figure)
  return lines
