"""A run under random faults: does it hang, leak or lose anything without a count?

  python -m experiments.soak --minutes=60 --seed=0 --run_dir=DIR

Starts a real run through the local launcher (supervised processes), a cheap
environment, and does to its processes what clusters do, at random times drawn from
the seed:

  kill        SIGKILL of a role's process; its supervisor starts another
  orphan      SIGKILL of a supervisor; the role's process must leave by itself
  freeze      SIGSTOP of a role's process for twenty seconds
  terminate   SIGTERM of a supervisor, as when a machine is taken away
  forge       rows and reports that no role would send, at the learner's ports
  damage      a file that is no checkpoint, of a higher number than all that are
  launch      the run is launched once more, while it goes on

Its shell names a proxy at which nobody listens.
The local launcher has no engine that starts supervisors again; the soak stands in for
it. Actor 0 is left alone, so that one process sees all that happens around it for as
long as the soak lasts: what it leaks with each reconnection adds up.

Prints one JSON object, and ends with 1 and the reasons if a check fails.
"""

import argparse
import json
import pathlib
import re
import signal
import sys
import time
from typing import Any

import numpy as np

from experiments.soak import checks as soak_checks
from experiments.soak import processes as soak_processes
from experiments.soak import run as soak_run
from experiments.soak import stranger
from impala_jax import components
from impala_jax import config as config_lib
from impala_jax.learning import checkpointing
from impala_jax.runtime import files, versions

_LEAST_RETURN = 0.0  # Of Catch; random play has about -0.6, a trained agent 1.
_LEARNS = 300.0  # Seconds of soak after which a return is expected.
_ENOUGH = 0.25  # Hours of observation that a slope of memory needs to be judged.
_MOST = 40.0  # Descriptors or threads an hour: one with each fault would be 80.
_QUEUE = 32  # Unrolls: two batches.
_FIELDS = ('pss_mb', 'rss_mb', 'descriptors', 'threads')


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--run_dir', required=True, help='new or empty')
  parser.add_argument('--minutes', type=float, default=60.0, help='after the start')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--transport', choices=['reverb', 'tcp'], default='reverb')
  parser.add_argument('--learners', type=int, default=1)
  parser.add_argument(
    '--interval', type=float, default=45.0, help='mean seconds between faults'
  )
  parser.add_argument('--most_faults', type=int, default=200)
  parser.add_argument(
    '--bound',
    type=float,
    default=120.0,
    help='seconds without an update that are a fault',
  )
  parser.add_argument(
    '--most_growth', type=float, default=50.0, help='MB an hour (RSS), of any process'
  )
  args = parser.parse_args()
  if min(args.minutes, args.interval, args.bound, args.learners) <= 0:
    parser.error('--minutes, --interval, --bound and --learners must be positive')
  run_dir = pathlib.Path(args.run_dir).absolute()
  if run_dir.exists() and any(run_dir.iterdir()):
    parser.error(f'--run_dir={args.run_dir}: holds something already')
  # So that the run is ended, too, when the soak is.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped by SIGTERM'))
  shared_before = soak_processes.shared_memory()
  soak = soak_run.Soak(run_dir, args)
  try:
    soak.launch()
    start = soak.watch()
    end = time.time()
    stopping = soak.stop()
    left = soak_processes.left_behind(run_dir, shared_before)
  finally:
    soak.end_all()
  report = verdict(soak, args, start, end)
  report['left_behind'] = left
  report['seconds_to_stop'] = round(stopping, 1)
  report['problems'] += [f'left behind: {x}' for x in left]
  text = json.dumps(report, indent=1)
  (run_dir / 'soak.json').write_text(text)
  print(text)
  return int(bool(report['problems']))


def verdict(
  soak: soak_run.Soak, args: argparse.Namespace, start: float, end: float
) -> dict[str, Any]:
  """All figures, and under `problems` what must not be."""
  problems = list(soak.problems)
  records = files.read_json_lines(soak.run_dir / 'metrics.jsonl')
  progress = [r['time'] for r in records if r['frames_per_second'] > 0]
  halts = soak_checks.halts(progress, soak.faults, start, end)
  problems += [f'no update: {h}' for h in halts if h['seconds'] > args.bound]
  kinds = [name for _, name in soak.faults]
  return {
    'benchmark': 'soak',
    'minutes': round((end - start) / 60, 1),
    'seed': args.seed,
    'transport': args.transport,
    'learners': args.learners,
    'faults': {k: kinds.count(k) for k in sorted(set(kinds))},
    'faults_missed_because_the_process_was_away': soak.missed,
    'seconds_until_a_process_was_back': _spread(soak.returns),
    'longest_halts': [
      {**h, 'seconds': round(h['seconds'], 1), 'at': round(h['at'])} for h in halts[:10]
    ],
    'updates_redone_from_checkpoints': soak_checks.updates_redone(records),
    'growth_per_hour': _growth(soak, args.most_growth, problems),
    'unrolls': _unrolls(soak, records, end - start, problems),
    'strangers': _strangers(soak, problems),
    'end': _end_state(soak.run_dir, records, end - start, problems),
    'versions': versions.installed(),
    'problems': problems,
  }


def _growth(
  soak: soak_run.Soak, most: float, problems: list[str]
) -> dict[str, dict[str, float]]:
  by_role: dict[str, list[dict[str, float]]] = {}
  for name, samples in soak.samples.items():
    # The one that lives as long as the soak stands alone.
    role = name if name == 'actor-0' else name.split('-')[0]
    by_role.setdefault(role, []).extend(samples)
  found = {}
  for role, samples in sorted(by_role.items()):
    slopes = {f: soak_checks.slope_per_hour(samples, f) for f in _FIELDS}
    # Resident memory, because what is shared changes hands when another process dies.
    if (memory := slopes['rss_mb']) is None:
      continue
    found[role] = {f: round(s['per_hour'], 2) for f, s in slopes.items() if s} | {
      'hours': round(memory['hours'], 2),
      'processes': memory['processes'],
      'peak_pss_mb': round(max(s['pss_mb'] for s in samples), 1),
    }
    if memory['hours'] < _ENOUGH:
      continue
    for field, limit in (('rss_mb', most), ('descriptors', _MOST), ('threads', _MOST)):
      if found[role][field] > limit:
        problems.append(f'{role}: {field} grows by {found[role][field]} an hour')
  return found


def _unrolls(
  soak: soak_run.Soak,
  records: list[dict[str, Any]],
  seconds: float,
  problems: list[str],
) -> dict[str, Any]:
  if not soak.ledgers:
    problems.append(
      'the learners wrote no unrolls-<index>.json: what was lost over their restarts '
      'cannot be counted'
    )
  ledgers = [
    {
      (w['actor'], w['incarnation']): soak_checks.Seen(
        *(w[field] for field in soak_checks.Seen._fields)
      )
      for w in ledger['writers']
    }
    for ledger in soak.ledgers.values()
  ]
  result = soak_checks.balance(ledgers, soak.sent)
  problems += [f'unrolls do not add up: {x}' for x in result['unbalanced']]
  for name in ('unrolls_corrupted', 'unrolls_duplicated'):
    result[name] = int(max(r[name] for r in records))
  if result['unrolls_corrupted']:
    problems.append(f'unrolls_corrupted: {result["unrolls_corrupted"]}, must be 0')
  # One that a frozen learner had taken but not confirmed is sent again, and refused.
  freezes = sum(name == 'freeze learner-0' for _, name in soak.faults)
  again = soak_run.ACTORS * freezes
  if result['unrolls_duplicated'] > again:
    problems.append(
      f'unrolls_duplicated: {result["unrolls_duplicated"]}, more than {again}'
    )
  # What may go with each learner: a full queue, what its last count (a second old, and
  # another until it is written) had not seen yet, and one in the hands of each actor.
  rate = result['received'] / max(seconds, 1.0)
  with_learner = _QUEUE + 3 * rate + soak_run.ACTORS
  result['learner_processes'] = len(ledgers)
  result['may_go_with_each_learner'] = round(with_learner)
  gone = result['gone'] + result['unheard']
  if gone > with_learner * max(len(ledgers), 1):
    problems.append(f'{gone} unrolls are gone, with {len(ledgers)} learner processes')
  return result


def _strangers(soak: soak_run.Soak, problems: list[str]) -> dict[str, int]:
  found = {
    'forged_rows': soak.stranger.rows,
    'refused_rows': stranger.refused(soak.run_dir),
    'refused_launches': soak.stranger.refused_launches,
    'files_put_aside': len(list((soak.run_dir / 'checkpoints').glob('*.damaged*'))),
  }
  # What a learner had refused since its last record goes with it.
  if found['refused_rows'] > found['forged_rows']:
    problems.append(f'honest unrolls were refused: {found}')
  if found['forged_rows'] and not found['refused_rows']:
    problems.append(f'forged unrolls were taken: {found}')
  return found


def _end_state(
  run_dir: pathlib.Path,
  records: list[dict[str, Any]],
  seconds: float,
  problems: list[str],
) -> dict[str, Any]:
  saved = json.loads((run_dir / 'config.json').read_text())
  parts = components.build(config_lib.from_dict(saved['config']))
  checkpoint = checkpointing.latest(
    run_dir / 'checkpoints', parts.make_learner().template()
  )
  if checkpoint is None:
    problems.append('there is no sound checkpoint')
    return {}
  import jax

  finite = all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint.state))
  if not finite:
    problems.append('the last checkpoint is not finite')
  last = records[-1]
  counts = {int(checkpoint.state.updates), checkpoint.metadata['updates']}
  if counts != {last['updates']}:
    problems.append(
      f'the last checkpoint has {counts} updates, the last record {last["updates"]}'
    )
  returned = last.get('episode_return')
  if not (returned is not None and _LEAST_RETURN < returned <= 1) and seconds > _LEARNS:
    problems.append(f'the last episode return is {returned}')
  log = (run_dir / 'logs' / 'learner.log').read_text(errors='replace')
  return {
    'updates': int(checkpoint.state.updates),
    'skipped': int(checkpoint.state.skipped),
    'finite': finite,
    'episode_return': returned,
    'evaluations': len(files.read_json_lines(run_dir / 'evaluations.jsonl')),
    'resumed': len(re.findall(r'goes on from ', log)),
  }


def _spread(values: list[float]) -> dict[str, float] | None:
  if not values:
    return None
  return {
    'median': round(float(np.median(values)), 1),
    'max': round(max(values), 1),
    'count': len(values),
  }


if __name__ == '__main__':
  sys.exit(main())
