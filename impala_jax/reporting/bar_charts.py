"""Bars of an evaluation, a level each."""

import pathlib
from typing import Any

from impala_jax.reporting import plots

_BAR = '#4c78a8'
_POOR = '#d62728'
_ROW = 0.27  # Inches.


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
  """Draws what `evaluation_report.make` says, into a PNG.

  Bars are scores (random play 0, people or another reference 100) where these are
  known of every level, else raw returns. These share an axis where they are of one
  order of magnitude; else each level has its own. Whiskers are confidence intervals.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  levels = report['levels']
  normalised = all(x['reference'] is not None for x in levels.values())
  rows = [_row(name, x, normalised) for name, x in levels.items()]
  if normalised or _comparable(rows):
    height = 1.6 + _ROW * len(rows)
    figure, axes = pyplot.subplots(figsize=(9, height), dpi=130)
    _draw_rows(axes, rows)
    if normalised:
      names = sorted({x['reference_is'] for x in levels.values()})
      _draw_references(axes, ', '.join(names))
    bottom = axes
  else:
    height = 1.3 + 2.1 * _ROW * len(rows)
    figure, several = pyplot.subplots(len(rows), figsize=(9, height), dpi=130)
    for axes, row in zip(several, rows, strict=True):
      _draw_rows(axes, [row])
      axes.tick_params(axis='x', labelsize=7, pad=1)
    bottom = several[-1]
  unit = 'normalised score' if normalised else 'episode return (raw score)'
  bottom.set_xlabel(f'{unit}; whiskers: 95 % confidence', fontsize=9)
  figure.suptitle(_title(report), fontsize=10)
  figure.tight_layout()
  figure.savefig(path)
  pyplot.close(figure)


def _row(name: str, level: dict[str, Any], normalised: bool) -> dict[str, Any]:
  kind = ('score', 'score_ci95') if normalised else ('mean', 'ci95')
  value, interval = level[kind[0]], level[kind[1]]
  note = ''
  if not level['complete']:
    note = '  failed: ' if level['error'] else '  '
    note += f'{level["episodes"]} of {level["planned_episodes"]} episodes'
  return {'name': name, 'value': value, 'interval': interval, 'note': note}


def _comparable(rows: list[dict[str, Any]]) -> bool:
  sizes = [abs(r['value']) for r in rows if r['value']]
  return len(rows) == 1 or not sizes or max(sizes) <= 10 * min(sizes)


def _draw_rows(axes: Any, rows: list[dict[str, Any]]) -> None:
  places = range(len(rows))
  values = [r['value'] or 0.0 for r in rows]
  axes.barh(places, values, height=0.66, color=_BAR, zorder=2)
  low = min(0.0, *values, *(r['interval'][0] for r in rows if r['interval']))
  high = max(0.0, *values, *(r['interval'][1] for r in rows if r['interval']))
  span = (high - low) or 1.0
  for place, row in zip(places, rows, strict=True):
    end = max(0.0, row['value'] or 0.0)
    if row['interval']:
      left, right = row['interval']
      axes.plot([left, right], [place, place], color='#222222', lw=1.2, zorder=3)
      for x in (left, right):
        axes.plot(
          [x, x], [place - 0.17, place + 0.17], color='#222222', lw=1.2, zorder=3
        )
      end = max(end, right)
    words = '' if row['value'] is None else f'{row["value"]:.1f}'
    axes.text(end + 0.012 * span, place, words + row['note'], va='center', fontsize=7.5,
              color=_POOR if row['note'] else '#222222', zorder=4,
              bbox={'facecolor': 'white', 'lw': 0, 'pad': 0.6})  # fmt: skip
  axes.set_yticks(list(places), [plots.no_formula(r['name']) for r in rows], fontsize=8)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  # Room for the numbers, and for words where there are some.
  room = 0.28 if any(r['note'] for r in rows) else 0.09
  axes.set_xlim(low - 0.03 * span if low < 0 else 0.0, high + room * span)
  axes.axvline(0, color='#222222', lw=0.8, zorder=3)
  axes.grid(axis='x', alpha=0.3, zorder=0)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.tick_params(axis='y', length=0)
  axes.tick_params(axis='x', labelsize=8)


def _draw_references(axes: Any, full: str) -> None:
  left, right = axes.get_xlim()
  axes.set_xlim(left, max(right, 108.0))
  axes.axvline(100, color='#e08214', lw=1.2, ls='--', zorder=1)
  for x, word in ((0, 'random'), (100, full)):
    axes.annotate(word, (x, 1), (0, 3), xycoords=('data', 'axes fraction'),
                  textcoords='offset points', ha='center', fontsize=8)  # fmt: skip


def _title(report: dict[str, Any]) -> str:
  frames = report['checkpoint']['frames']
  line = f'{plots.no_formula(report["run"])}: {report["episodes"]} episodes a level'
  if frames is not None:
    line += f', after {frames:,} frames'
  if not report['complete']:
    line += ' (incomplete)'
  scores = []
  for name, score in report['scores'].items():
    words = f'{name.replace("_", " ")} {round(score["value"], 1):g}'
    if score['ci95'] and score['ci95'][1] > score['ci95'][0]:
      words += ' [{:.1f}, {:.1f}]'.format(*score['ci95'])
    scores.append(words)
  return line + ('\n' + ', '.join(scores) if scores else '')
