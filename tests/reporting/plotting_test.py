"""Curves of run directories, whole, young and of several levels."""

import json

import pytest

from impala_jax.commands import main
from impala_jax.reporting import plots

pytest.importorskip('matplotlib')


def _write(run_dir, levels=(), suite='atari', count=5, evaluations=True):
  lines = [
    {
      'frames': 100 * i,
      'wall_seconds': 2.0 * i,
      'episode_return': 3.0 * i,
      'agent_steps_per_second': 50.0,
    }
    | {f'episode_return/{x}': 1.0 * i + k for k, x in enumerate(levels)}
    for i in range(count)
  ]
  (run_dir / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  config = {'environment': {'suite': suite, 'levels': list(levels)}}
  (run_dir / 'config.json').write_text(json.dumps({'config': config}))
  if evaluations:
    event = {
      'frames': 300,
      'mean': 4.0,
      'returns': {x: [4.0] for x in levels},
      'means': dict.fromkeys(levels, 4.0),
    }
    (run_dir / 'evaluations.jsonl').write_text(json.dumps(event))


def test_a_panel_for_each_level(tmp_path, figures):
  levels = ['rooms_watermaze', 'rooms_collect_good_objects_train', 'seekavoid_arena_01']
  _write(tmp_path, levels, 'dmlab')
  path = plots.level_curves(tmp_path)
  assert path.read_bytes()[:4] == b'\x89PNG'
  panels = [a for a in figures()[0].axes if a.get_visible()]
  levels[1] += '\nevaluated on rooms_collect_good_objects_test'
  assert [a.get_title() for a in panels] == levels
  lines = [{x.get_label(): x.get_ydata()[-1] for x in a.lines} for a in panels]
  training = 'training: mean of the last 100 episodes'
  assert [x[training] for x in lines] == [4.0, 5.0, 6.0]
  assert [x['evaluation: mean'] for x in lines] == [4.0] * 3
  assert (lines[0]['random play'], lines[0]['human']) == (4.065, 54.0)
  # Of the version that is tested.
  assert (lines[1]['random play'], lines[1]['human']) == (0.073, 10.0)
  assert 'human' not in lines[2]


def test_a_suite_has_the_curve_of_its_score(tmp_path, figures):
  """A mean over returns of unlike sizes would be that of the largest."""
  _write(tmp_path, ['basic', 'my_way_home'], 'doom')
  lines = [json.loads(x) for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  for i, line in enumerate(lines):
    line |= {'score/partial_mean_capped': 10.0 * i, 'score/partial_levels': 2.0}
    line['agent_steps_per_second'] = 1.0
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  event = json.loads((tmp_path / 'evaluations.jsonl').read_text())
  event['scores'] = {'partial_mean_capped': 33.0, 'partial_levels': 2.0}
  (tmp_path / 'evaluations.jsonl').write_text(json.dumps(event))
  assert plots.learning_curve(tmp_path).exists()
  axes = figures()[0].axes[0]
  assert axes.get_ylabel() == 'score of the suite'
  assert {x.get_label(): list(x.get_ydata()) for x in axes.lines} == {
    'training: partial mean capped': [0.0, 10.0, 20.0, 30.0, 40.0],
    'evaluation: partial mean capped': [33.0],
  }
  # Also beside another run.
  out = tmp_path / 'both.png'
  assert main.main(['compare', f'--out={out}', str(tmp_path)]) == 0
  axes = figures()[-1].axes[0]
  assert axes.get_ylabel() == 'partial mean capped of the suite'
  assert list(axes.lines[0].get_ydata()) == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_several_levels_without_a_score(tmp_path, figures):
  _write(tmp_path, ['pong', 'qbert'])
  plots.learning_curve(tmp_path)
  assert 'mean over levels' in figures()[0].axes[0].get_ylabel()


def test_one_level_needs_no_panels(tmp_path):
  _write(tmp_path, ['pong'])
  assert plots.level_curves(tmp_path) is None
  assert plots.learning_curve(tmp_path).exists()


def test_runs_that_have_just_begun(tmp_path, capsys):
  assert plots.learning_curve(tmp_path) is None
  assert plots.level_curves(tmp_path) is None
  _write(tmp_path, ['pong', 'qbert'], count=0, evaluations=False)
  assert plots.level_curves(tmp_path) is None
  assert main.main(['plot', str(tmp_path)]) == 1
  assert 'no finished episode' in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
  _write(tmp_path, ['pong', 'qbert'])
  assert main.main(['plot', str(tmp_path)]) == 0
  printed = capsys.readouterr().out.split()
  assert printed == [
    str(tmp_path / f'{x}_curve{s}.png') for x, s in (('learning', ''), ('level', 's'))
  ]
  assert main.main(['plot']) == 2


def test_names_are_no_formulas(tmp_path):
  name = r'a$\frac$b^{_c'
  run_dir = tmp_path / name
  run_dir.mkdir()
  _write(run_dir, [name, 'pong'])
  out = tmp_path / 'compared.png'
  assert main.main(['plot', str(run_dir)]) == 0
  assert main.main(['compare', f'--out={out}', str(run_dir)]) == 0
  assert out.exists()


def test_numbers_in_short():
  assert [plots.short(x) for x in (0, 950, 12_300, 4e6, 2.5e9)] == [
    '0', '950', '12.3 k', '4 M', '2.5 G',
  ]  # fmt: skip
