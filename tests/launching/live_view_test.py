"""What the terminal shows of scores and of many levels."""

import io
import json
import pathlib
import re
import subprocess
import sys

import pytest
import rich.console

from impala_jax import config as config_lib
from impala_jax.commands import manage
from impala_jax.launching import live_view
from impala_jax.reporting import engine_figures
from impala_jax.runtime import printing

_STATUS = {
  'time': 5.0, 'wall_seconds': 100.0, 'frames': 1_000, 'total_frames': 10_000,
  'frames_per_second': 500.0, 'agent_steps_per_second': 125.0, 'updates': 30,
  'episodes': 40, 'learning_rate': 1e-3, 'policy_lag_mean': 1.0, 'policy_lag_max': 2,
  'queue_fill': 0.5, 'unrolls_received': 9, 'bottleneck': 'none',
}  # fmt: skip
_SCORES = {
  'score/mean_capped': 12.34,
  'score/mean_uncapped': 15.0,
  'evaluation_score/mean_capped': 11.0,
}


def _config(levels):
  return config_lib.Config(environment=config_lib.Environment(levels=levels))


def _shown(status, levels=('a',)):
  out = io.StringIO()
  panel = live_view.panel(_config(levels), pathlib.Path('run'), status, 'running', [])
  rich.console.Console(file=out, width=110).print(panel)
  return out.getvalue().splitlines()


def test_scores_have_one_line():
  lines = _shown(_STATUS | _SCORES)
  (line,) = [x for x in lines if 'mean capped' in x]
  assert 'mean capped 12.3, mean uncapped 15.0 in training' in line
  assert 'mean capped 11.0 in evaluation' in line
  assert not any('suite' in x for x in _shown(_STATUS))


def test_unrolls_that_were_too_old_show_where_there_are_any():
  text = ' '.join(' '.join(_shown(_STATUS | {'unrolls_stale': 3})).split())
  assert 'unrolls 9, 3 too old' in text
  assert not any('too old' in x for x in _shown(_STATUS | {'unrolls_stale': 0}))


def test_inference_servers_show_where_there_are_any():
  assert not any('requests/s' in x for x in _shown(_STATUS))
  figures = {
    'requests_per_second': 950.4, 'rows_per_second': 9504.0, 'batch_mean': 61.25,
    'padding': 0.1, 'wait_ms': 1.25, 'clients': 7, 'environments': 224, 'refused': 0,
  }  # fmt: skip
  status = {**_STATUS, **{f'inference/{k}': v for k, v in figures.items()}}
  words = '950 requests/s of 7 actors, batches of 61.2, 1.2 ms of waiting each'
  assert words in ' '.join(' '.join(_shown(status)).split())
  assert words in manage._describe_training({**status, 'age': 1.0})


def test_many_levels_come_last_and_are_not_broken_over_lines():
  levels = tuple(f'level_with_a_long_name_{i}' for i in range(30))
  returns = {f'episode_return/{x}': float(i) for i, x in enumerate(levels)}
  lines = _shown(
    _STATUS | returns | {'episode_return/level_with_a_long_name_3': None}, levels
  )
  text = '\n'.join(lines)
  assert all(f'{x} {i:.1f} ' in text for i, x in enumerate(levels) if i != 3)
  assert 'level_with_a_long_name_3 - ' in text
  place = lambda word: next(i for i, x in enumerate(lines) if word in x)
  assert place('bottleneck') < place('by level')
  assert 'and 28 more levels' in lines[0]


def test_nothing_is_read_as_markup():
  odd = 'a[/b] [red]'
  out = io.StringIO()
  console = rich.console.Console(file=out, width=300)
  status = _STATUS | {'bottleneck': odd, f'episode_return/{odd}': 1.0}
  for shown in ({}, status):
    console.print(
      live_view.panel(_config((odd,)), pathlib.Path(odd), shown, f'why: {odd}', [])
    )
  assert out.getvalue().count(odd) == 3 + 5


def test_plain_lines(capsys):
  with live_view.make('plain', _config(('a', 'b')), pathlib.Path('run')) as show:
    show(_STATUS | _SCORES, 'running')
  printed = capsys.readouterr().out
  assert printed.startswith('custom: a, b; run directory run\n')
  assert 'mean capped 12.3  mean uncapped 15.0' in printed


@pytest.mark.parametrize('kind', ['live', 'plain'])
@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_what_a_terminal_cannot_show_is_replaced(kind, encoding, monkeypatch):
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding))
  monkeypatch.setenv('COLUMNS', '200')
  printing.replace_unprintable()
  run_dir = pathlib.Path('实验', '\udcff')
  with live_view.make(kind, _config(('a',)), run_dir) as show:
    show({}, 'running')
    for value in (1.0, 3.0, 2.0):
      show(_STATUS | {'episode_return': value}, 'running ▁▂▃')
  live_view.print_ending(run_dir, 0)
  sys.stdout.flush()
  printed = sys.stdout.buffer.getvalue()
  assert b'bottleneck' in printed or kind == 'plain'  # Not in the first ten seconds.
  assert ('实验/?' if encoding == 'utf-8' else '??/?').encode() in printed


def test_engines_and_their_level_cache_show_where_there_are_any():
  figures = {
    'resets': 90.0, 'reset_seconds': 21.34, 'cache_hit_rate': 0.93,
    'cache_misses': 12.0, 'cache_evictions': 0.0, 'cache_unwritable': 0.0,
  }  # fmt: skip

  def shown(**more):
    found = {f'engines/{k}': v for k, v in {**figures, **more}.items()}
    status = {**_STATUS, **found, 'age': 1.0}
    text = ' '.join(' '.join(_shown(status)).split()).replace(' │ │ ', ' ')
    assert engine_figures.describe(status) in manage._describe_training(status)
    return text

  assert '21.3 s to begin an episode, level cache had 93% of the maps, 12' in shown()
  assert 'cache is full' not in shown()
  assert 'full: 7 maps removed' in shown(cache_evictions=7.0)
  assert 'CANNOT BE WRITTEN by 3 engines' in shown(cache_unwritable=3.0)
  assert not any('engines' in x for x in _shown(_STATUS))


def test_levels_that_were_given_up_show(capsys):
  words = 'a: given up by 2 environment(s), none plays it'
  status = {**_STATUS, 'given_up': [words], 'age': 1.0}
  assert words in ' '.join(_shown(status))
  with live_view.make('plain', _config(['a']), pathlib.Path('run')) as show:
    show(status, 'running')
    show({**status, 'time': 6.0}, 'running')
  assert capsys.readouterr().out.count(f'level {words}') == 1
  assert words in manage._describe_training(status)


def test_a_look_ahead_needs_more_than_one_update():
  text = lambda **more: ' '.join(_shown({**_STATUS, **more}))
  assert 'to go' not in text()
  assert 'to go' not in text(seconds_left=None)
  assert 'about 18 s to go' in text(seconds_left=18.0)


def test_the_clock_runs_from_the_first_second(capsys):
  out = io.StringIO()
  made = live_view.panel(_config(['a']), pathlib.Path('run'), {}, 'importing', [], 42.3)
  rich.console.Console(file=out, width=110).print(made)
  assert '42 s: importing' in out.getvalue()
  with live_view.make('plain', _config(['a']), pathlib.Path('run')) as show:
    for phase in ('learner: importing', 'learner: importing', 'nothing for 9 s'):
      show({}, phase)
    show({}, 'nothing for 10 s')
  lines = capsys.readouterr().out.splitlines()[1:]
  # Said once, whatever its numbers are, with the seconds before it.
  assert [re.sub(r'^ *\d+ s  ', '', x) for x in lines[:2]] == [
    'learner: importing',
    'nothing for 9 s',
  ]


def test_the_ending_gives_the_last_evaluation(tmp_path, capsys):
  event = {
    'time': 50.0, 'frames': 3000, 'mean': 2.5, 'means': {'a': 1.0, 'b': 4.0},
    'scores': {'mean_capped': 7.0}, 'returns': {'a': [1.0], 'b': [4.0, 4.0]},
    'failed': {'c': 'aborted'},
  }  # fmt: skip
  (tmp_path / 'evaluations.jsonl').write_text(json.dumps(event))
  status = {**_STATUS, 'given_up': ['c: given up by 2 environment(s), none plays it']}
  (tmp_path / 'status.json').write_text(json.dumps(status))
  live_view.print_ending(tmp_path, 0)
  text = capsys.readouterr().out
  assert '1,000 of 10,000 frames.' in text
  assert 'Level c: given up by 2 environment(s), none plays it.' in text
  assert (
    'Last evaluation at 3,000 frames: return 2.50, mean of 3 episodes of 2 levels, '
    'mean capped 7.0; not played: c.'
  ) in text
  live_view.print_ending(tmp_path, 0, since=60.0)  # It was of an earlier start.
  assert 'Last evaluation' not in capsys.readouterr().out


def test_a_view_that_nobody_reads_does_not_end_the_run(tmp_path):
  script = (
    'import pathlib, time\n'
    'from impala_jax import config\n'
    'from impala_jax.launching import live_view\n'
    'with live_view.make("plain", config.Config(), pathlib.Path("run")) as show:\n'
    '  input()\n'
    '  for i in range(3):\n'
    '    show({}, "phase" * (i + 1))\n'
    f'pathlib.Path({str(tmp_path / "done")!r}).touch()\n'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert 'run directory run' in process.stdout.readline()
  process.stdout.close()
  process.stdin.write('\n')
  process.stdin.flush()
  assert process.wait(60) == 0
  errors = process.stderr.read()
  assert 'the run goes on' in errors
  assert 'Traceback' not in errors
  assert (tmp_path / 'done').exists()
