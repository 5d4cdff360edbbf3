"""A configuration from a file: what `config.json` of a run is, or settings alone."""

import dataclasses
import json

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.commands import config_file
from impala_jax.launching import run_directory


def write(tmp_path, data):
  path = tmp_path / 'my.json'
  path.write_text(data if isinstance(data, str) else json.dumps(data))
  return str(path)


@pytest.mark.parametrize('name', configs.names())
def test_the_file_of_a_run(tmp_path, name):
  config = dataclasses.replace(configs.get(name), seed=7)
  run_dir = run_directory.create(config, str(tmp_path / 'run'))
  assert config_file.load(str(run_dir / 'config.json')) == config


def test_settings_alone(tmp_path):
  config = configs.get('paper_dmlab_level')
  assert config_file.load(write(tmp_path, config_lib.to_dict(config))) == config


def test_what_is_left_out_has_its_default(tmp_path):
  data = {'seed': 5, 'environment': {'levels': ['pong', 'breakout']}}
  config = config_file.load(write(tmp_path, data))
  assert config.environment.levels == ('pong', 'breakout')
  assert config.seed == 5
  assert config.loss == config_lib.Loss()


def test_names_are_names():
  assert config_file.load('pong') == configs.get('pong')
  with pytest.raises(config_lib.ConfigError, match='did you mean pong'):
    config_file.load('pongo')


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    ('{', 'is no JSON'),
    ('[1]', 'must be an object of sections'),
    ({'config': 3}, 'must be an object of sections'),
    ({'loss': {'discont': 0.9}}, 'did you mean loss.discount'),
    ({'los': {'discount': 1}}, 'unknown setting los'),
    ({'loss': 3}, 'loss is a section'),
    ({'seed': 'many'}, "seed='many': not a valid int"),
    ({'seed': None}, "seed='null': not a valid int"),
    ({'seed': {'a': 1}}, 'seed has no fields'),
    ({'actor': {'num_actors': 2.5}}, "actor.num_actors='2.5': not a valid int"),
    ({'evaluator': {'enabled': 'maybe'}}, "evaluator.enabled='maybe'"),
  ],
)
def test_mistakes(tmp_path, data, words):
  path = write(tmp_path, data)
  with pytest.raises(config_lib.ConfigError) as e:
    config_file.load(path)
  assert words in str(e.value)
  assert all(line.startswith(f'--config={path}: ') for line in str(e.value).split('\n'))


def test_no_such_file(tmp_path):
  with pytest.raises(config_lib.ConfigError, match='No such file'):
    config_file.load(str(tmp_path / 'none.json'))
  with pytest.raises(config_lib.ConfigError, match='Is a directory'):
    config_file.load(f'{tmp_path}/')


def test_all_mistakes_at_once(tmp_path):
  path = write(tmp_path, {'seed': 'x', 'loss': {'discount': 'y', 'discont': 1}})
  with pytest.raises(config_lib.ConfigError) as e:
    config_file.load(path)
  assert len(str(e.value).splitlines()) == 3
