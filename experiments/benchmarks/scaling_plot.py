"""The figure of `scaling_benchmark`."""

import pathlib
from typing import Any

_MEASURED = '#1f77b4'
_IDEAL = '#666666'
_GOAL = 0.9  # Of ideal.


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
  """Throughput with the ideal line, and below it the share of ideal.

  Args:
    report: what `scaling_benchmark` prints.
    path: of the PNG.
  """
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot, ticker

  points = report['points']
  actors = [p['actors'] for p in points]
  steps = [p['steps_per_second'] for p in points]
  one = steps[0] / actors[0]
  figure, (upper, lower) = pyplot.subplots(
    2,
    1,
    figsize=(7, 6),
    dpi=120,
    sharex=True,
    height_ratios=(3, 1),
    layout='constrained',
  )
  upper.plot(actors, [one * n for n in actors], '--', color=_IDEAL, lw=1.2,
             label=f'ideal: {one:,.0f} agent steps/s an actor')  # fmt: skip
  waits = points[-1]['learner_waits']
  upper.plot(
    actors,
    steps,
    'o-',
    color=_MEASURED,
    lw=1.8,
    label=f'measured; the learner waits {waits:.0%} of its time at {actors[-1]} actors',
  )
  upper.set_yscale('log', base=2)
  upper.yaxis.set_major_formatter(lambda y, _: f'{y:,.0f}')
  upper.set_yticks([one * n for n in actors])
  upper.yaxis.set_minor_locator(ticker.NullLocator())
  upper.set_ylabel('agent steps/s that the learner trained on')
  arguments = report['arguments']
  upper.set_title(
    f'One learner, Reverb, environments that sleep {arguments["step_ms"]:g} ms a step, '
    f'{arguments["envs"]} an actor',
    fontsize=10,
  )
  upper.legend(loc='upper left', fontsize=9)
  lower.plot(actors, [100 * p['of_ideal'] for p in points], 'o-', color=_MEASURED)
  lower.axhline(100 * _GOAL, color=_IDEAL, lw=1, ls=':')
  lower.annotate(
    f'{_GOAL:.0%}', (actors[-1], 100 * _GOAL - 3), fontsize=8, va='top', ha='right'
  )
  lower.set_ylim(0, 110)
  lower.set_ylabel('% of ideal')
  lower.set_xlabel(f'actor processes (on a machine of {report["cores"]} cores)')
  lower.set_xscale('log', base=2)
  lower.set_xticks(actors, [str(n) for n in actors])
  lower.xaxis.set_minor_locator(ticker.NullLocator())
  for axes in (upper, lower):
    axes.grid(alpha=0.3)
  figure.savefig(path)
  pyplot.close(figure)
