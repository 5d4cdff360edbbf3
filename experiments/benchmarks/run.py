"""The benchmark job of CI: what got slower since the baseline was taken.

  python -m experiments.benchmarks.run --suite ci
  python -m experiments.benchmarks.run --suite ci --baseline FILE [--tolerance 0.3]
  python -m experiments.benchmarks.run --suite ci --write FILE

Every piece of work (`ci_cases`) takes turns with a fixed computation of its kind
(arithmetic, memory or the interpreter), and its figure is CPU-seconds over those of
this reference: a slow or busy machine slows both. The median of the repeats is compared
with that in the baseline file, which keeps one set of figures for each version of JAX.
Slower is what exceeds the baseline by more than the tolerance *and* lies beyond the
quartiles of both. Prints one JSON object; what it makes of it goes to stderr.

Exit status: 0, or 1 where something got slower, or 2 where the question is wrong.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

from experiments.benchmarks import ci_cases
from impala_jax.runtime import versions

_SUITES = {'ci': tuple(ci_cases.CASES)}

Figures = dict[str, dict[str, float]]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--suite', default='ci', choices=sorted(_SUITES))
  parser.add_argument('--only', action='append', choices=sorted(ci_cases.CASES))
  parser.add_argument('--baseline', type=pathlib.Path)
  parser.add_argument('--write', type=pathlib.Path, help='baseline to make or extend')
  parser.add_argument('--tolerance', type=float, default=0.3, help='0.3 allows +30 %%')
  parser.add_argument('--repeats', type=int, default=9)
  args = parser.parse_args(argv)
  if args.repeats < 3:
    parser.error(f'--repeats={args.repeats}: must be at least 3')
  if not args.tolerance >= 0:
    parser.error(f'--tolerance={args.tolerance}: must be at least 0')
  key = f'jax {versions.installed()["jax"]}'
  known = None
  try:
    if args.baseline:
      known = read_baseline(args.baseline).get(key)
      if known is None:
        raise ValueError(
          f'--baseline={args.baseline} has no figures of {key}: '
          f'take them with --write={args.baseline}'
        )
  except ValueError as e:
    print(e, file=sys.stderr)
    return 2
  names = args.only or [n for n in _SUITES[args.suite] if _available(n)]
  found = {name: measure(name, args.repeats) for name in names}
  slower = [] if known is None else compare(found, known, args.tolerance)
  if args.write:
    kept = read_baseline(args.write) if args.write.exists() else {}
    kept[key] = kept.get(key, {}) | found
    args.write.write_text(json.dumps(kept, indent=1, sort_keys=True) + '\n')
  result = {
    'suite': args.suite,
    'figures': found,
    'baseline': known,
    'slower': slower,
    'versions': versions.installed(),
  }
  print(json.dumps(result, indent=1))
  return 1 if slower else 0


def read_baseline(path: pathlib.Path) -> dict[str, Figures]:
  """Figures by version of JAX.

  Raises:
    ValueError: there is no such file, or it is no baseline.
  """
  try:
    found: dict[str, Figures] = json.loads(path.read_text())
    for figures in found.values():
      for figure in figures.values():
        if not {'low', 'median', 'high'} <= figure.keys():
          raise ValueError('a figure lacks low, median or high')
  except (OSError, ValueError, AttributeError) as e:
    raise ValueError(f'{path} is no baseline: {e}') from None
  return found


def measure(name: str, repeats: int) -> dict[str, float]:
  """CPU-seconds of a case over those of the reference: quartiles and median."""
  case = ci_cases.CASES[name]
  work, end = case.set_up()
  try:
    work()
    case.reference()
    ratios, costs = [], []
    before = _cpu(case.reference)
    for _ in range(repeats):
      cost = _cpu(work)
      after = _cpu(case.reference)
      ratios.append(2 * cost / (before + after))
      costs.append(cost)
      before = after
  finally:
    end()
  low, median, high = statistics.quantiles(ratios, n=4, method='inclusive')
  print(f'{name}: {median:.3g} times the reference', file=sys.stderr)
  figures = {'low': low, 'median': median, 'high': high}
  figures['cpu_ms'] = 1e3 * statistics.median(costs)
  return {k: float(f'{v:.4g}') for k, v in figures.items()}


def compare(found: Figures, known: Figures, tolerance: float) -> list[str]:
  """The names of what got slower; says of everything how it stands, on stderr."""
  slower = []
  for name, now in found.items():
    before = known.get(name)
    if before is None:
      print(f'{name}: not in the baseline', file=sys.stderr)
      continue
    change = now['median'] / before['median'] - 1.0
    beyond_noise = now['low'] > before['high']
    worse = change > tolerance and beyond_noise
    verdict = (
      'SLOWER' if worse else 'within noise' if change > tolerance else 'as allowed'
    )
    print(
      f'{name} ({ci_cases.CASES[name].about}): {now["median"]:.3g} times the '
      f'reference, was {before["median"]:.3g}: {100 * change:+.0f} %, allowed is '
      f'{100 * tolerance:+.0f} %: {verdict}',
      file=sys.stderr,
    )
    if worse:
      slower.append(name)
  return slower


def _available(name: str) -> bool:
  if ci_cases.CASES[name].available():
    return True
  print(f'{name}: not installed here, left out', file=sys.stderr)
  return False


def _cpu(work: Any) -> float:
  before = time.process_time()
  work()
  return time.process_time() - before


if __name__ == '__main__':
  sys.exit(main())
