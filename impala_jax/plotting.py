"""The learning curve of a run directory: `python -m impala_jax.plotting RUN_DIR`."""

import pathlib
import sys
from typing import Any

import numpy as np

from impala_jax import metrics


def learning_curve(run_dir: pathlib.Path) -> pathlib.Path | None:
  """Draws returns in training and evaluation against frames.

  Returns:
    The path of `learning_curve.png`, or None where no episode has ended yet.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  records = metrics.read_records(run_dir / 'metrics.jsonl')
  evaluations = metrics.read_records(run_dir / 'evaluations.jsonl')
  training = [
    (r['frames'], r['episode_return'], r['wall_seconds'])
    for r in records
    if r.get('episode_return') is not None
  ]
  if not training and not evaluations:
    return None
  figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
  if training:
    frames, returns, _ = np.array(training, dtype=float).T
    axes.plot(frames, returns, color='#1f77b4', lw=1.8,
              label='training: mean of the last 100 episodes')  # fmt: skip
  if evaluations:
    _draw_evaluations(axes, evaluations)
  axes.set_xlabel('frames (action repeats counted)')
  axes.set_ylabel('episode return (raw score)')
  axes.set_title(_title(run_dir, records), fontsize=10)
  axes.xaxis.set_major_formatter(lambda x, _: short(x))
  axes.set_xlim(left=0)
  axes.grid(alpha=0.3)
  axes.legend(loc='best', fontsize=8)
  if records:
    _add_time_axis(axes, records)
  figure.tight_layout()
  path = run_dir / 'learning_curve.png'
  figure.savefig(path)
  pyplot.close(figure)
  return path


def _draw_evaluations(axes: Any, evaluations: list[dict[str, Any]]) -> None:
  frames = np.array([e['frames'] for e in evaluations], dtype=float)
  spread = [np.concatenate(list(e['returns'].values())) for e in evaluations]
  axes.plot(frames, [e['mean'] for e in evaluations], 'o-', color='#d62728', lw=1,
            ms=4, label='evaluation: mean')  # fmt: skip
  axes.fill_between(frames, [s.min() for s in spread], [s.max() for s in spread],
                    color='#d62728', alpha=0.12, lw=0,
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
  name = run_dir.resolve().name
  if not records:
    return name
  last = records[-1]
  minutes = last['wall_seconds'] / 60
  return f'{name}: {short(last["frames"])} frames in {minutes:.1f} minutes'


def short(x: float) -> str:
  """A number as 12.3 k, 4 M."""
  for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if abs(x) >= size:
      return f'{x / size:.3g} {unit}'
  return f'{x:.0f}'


def main(argv: list[str]) -> int:
  if len(argv) != 2:
    print('usage: python -m impala_jax.plotting RUN_DIR', file=sys.stderr)
    return 2
  path = learning_curve(pathlib.Path(argv[1]))
  if path is None:
    print(f'{argv[1]}: no finished episode in metrics.jsonl yet', file=sys.stderr)
    return 1
  print(path)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv))
