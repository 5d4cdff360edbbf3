"""What `impala list` shows."""

import dataclasses
import importlib.util
import typing

import pytest

from impala_jax import config as config_lib
from impala_jax import configs, suites
from impala_jax.commands import arguments, listing, main
from impala_jax.environments import registry
from tests.environments.registry_test import make_counting


@pytest.fixture
def shown(capsys):
  def run(*argv):
    assert main.main(['list', *argv]) == 0
    return capsys.readouterr().out.splitlines()

  return run


def test_configs(shown):
  lines = shown('configs')
  assert [line.split()[0] for line in lines[1:]] == configs.names()
  (pong,) = [line for line in lines if line.startswith('pong')]
  assert 'atari' in pong
  assert 'Pong on two cores' in pong


def test_suites_and_what_they_lack(shown, monkeypatch):
  real = importlib.util.find_spec
  gone = ('vizdoom', 'ale_py')
  lack = lambda name, *args: None if name in gone else real(name, *args)
  monkeypatch.setattr(importlib.util, 'find_spec', lack)
  text = '\n'.join(shown('suites'))
  for suite in suites.names():
    assert f'\n{suite}' in f'\n{text}'
  assert "pip install 'vizdoom" in text
  assert "pip install 'ale-py" in text
  assert 'catch      installed' in text


def test_levels_of_one_suite(shown):
  assert shown('levels', '--suite=catch') == ['catch']
  doom = shown('levels', '--suite=doom')
  assert doom[0] == 'doom9'
  assert 'defend_the_center' in doom
  dmlab = shown('levels', '--suite=dmlab')
  assert {'dmlab30', 'rooms_watermaze'} <= set(dmlab)
  assert 'coinrun_easy' in shown('levels', '--suite=procgen')


def test_every_level_that_is_listed_can_be_asked_for():
  for suite in ('atari', 'catch', 'dmlab', 'doom', 'procgen'):
    for level in registry.levels(suite):
      if level in ('dmlab30', 'doom9'):  # Groups.
        continue
      environment = config_lib.Environment(suite=suite, levels=(level,))
      registry.check(config_lib.Config(environment=environment))


def test_levels_of_all_suites(shown):
  lines = [line.split() for line in shown('levels')]
  assert ['catch', 'catch'] in lines
  assert ['doom', 'basic'] in lines


def test_a_suite_of_ones_own(monkeypatch):
  registry.register('mine', make_counting, ['two', 'three'])
  try:
    assert registry.levels('mine') == ('two', 'three')
    assert registry.missing('mine') == ''
    registry.register('mine', make_counting)
    with pytest.raises(arguments.Mistake, match='takes any name'):
      main_list('levels', suite='mine')
  finally:
    suites._suites.pop('mine')


def main_list(what, suite=None):
  parser = arguments.Parser(prog='impala list')
  listing.add_flags(parser)
  argv = [what, *([f'--suite={suite}'] if suite else [])]
  return listing.run(arguments.parse(parser, argv))


def test_every_setting_is_listed(shown):
  def leaves(cls, prefix=''):
    for name, kind in typing.get_type_hints(cls).items():
      if dataclasses.is_dataclass(kind):
        yield from leaves(kind, f'{prefix}{name}.')
      elif name != 'suite_settings':  # A section of the suite's name.
        yield f'{prefix}{name}'

  lines = shown('settings')
  expected = list(leaves(config_lib.Config))
  for suite in suites.names():
    if (kind := suites.settings_of(suite)) is not None:
      expected += leaves(kind, f'{suite}.')
  assert [line.split()[0] for line in lines[1:]] == expected
  assert 'atari.episodic_life' in expected
  (line,) = [x for x in lines if x.startswith('optimizer.max_grad_norm ')]
  assert line.split()[1:3] == ['float', '40.0']


def test_launchers_say_which_and_why(shown, monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setenv('IMPALA_LAUNCHER', 'slurm')
  monkeypatch.setenv('IMPALA_LAUNCHER_SET', 'slurm.partition=cpu')
  text = '\n'.join(shown('launchers'))
  assert 'sbatch is not on PATH' in text
  assert 'without --launcher: slurm, by the variable IMPALA_LAUNCHER' in text
  assert '  slurm.partition=cpu' in text
  assert f'{tmp_path}/impala_jax/launcher.toml (not there)' in text
