"""A run as data."""

import dataclasses
import json

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.launching import program as program_lib
from tests.launching import programs


def test_roles_of_a_run():
  program = programs.make(actors=1000)
  assert [r.name for r in program.roles] == ['learner', 'actor', 'evaluator']
  assert [r.replicas for r in program.roles] == [1, 1000, 1]
  assert [r.elastic for r in program.roles] == [False, True, False]
  assert [r.restart.essential for r in program.roles] == [True, False, False]
  for role in program.roles:
    assert role.argv == ('-m', 'impala_jax.distributed.roles.run', role.name)
  assert json.loads(program.config)['config']['actor']['num_actors'] == 1000


def test_inference_servers_are_a_role_of_their_own():
  program = programs.make(actors=1000, servers=4)
  assert [r.name for r in program.roles] == [
    'learner',
    'inference',
    'actor',
    'evaluator',
  ]
  role = program.role('inference')
  assert (role.replicas, role.elastic, role.restart.essential) == (4, False, False)
  assert role.ports == ('inference',)
  with pytest.raises(ValueError, match='inference has 4 and cannot be scaled'):
    program.scaled('inference', 5)


def test_several_learners_are_a_gang():
  assert programs.make(learners=4).role('learner').restart.gang
  assert not programs.make(learners=1).role('learner').restart.gang


def test_no_evaluator_where_there_is_none():
  config = config_lib.override(
    configs.get('catch'), ['transport.kind=reverb', 'evaluator.enabled=false']
  )
  program = program_lib.program_of(config, 'runs/x', '.', 'impala-x')
  assert [r.name for r in program.roles] == ['learner', 'actor']
  assert program.run_dir.startswith('/')


def test_incarnations_grow_with_launches():
  assert programs.make(launches=3).first_incarnation == 3000


def test_all_mistakes_are_told_at_once():
  config = config_lib.override(configs.get('catch'), ['transport.kind=local'])
  with pytest.raises(config_lib.ConfigError) as e:
    program_lib.program_of(config, 'runs/x', '.', 'impala-x', learners=5)
  assert 'transport.kind' in str(e.value)
  assert 'multiple of the number of devices (5 learners x 1): 16 = 3 x 5 + 1' in str(
    e.value
  )


def test_scaled():
  program = programs.make(actors=3)
  assert program.scaled('actor', 7).role('actor').replicas == 7
  assert program.role('actor').replicas == 3
  with pytest.raises(ValueError, match='learner has 1 and cannot be scaled'):
    program.scaled('learner', 2)
  with pytest.raises(ValueError, match='0 replicas: must be at least 1'):
    program.scaled('actor', 0)
  with pytest.raises(KeyError, match='learner, actor, evaluator'):
    program.role('acter')


def test_json_and_back():
  program = programs.make(actor=program_lib.Resources(cpus=3, memory_mib=100))
  data = json.loads(json.dumps(program_lib.to_dict(program)))
  assert program_lib.from_dict(data) == program
  assert program.role('actor').resources.cpus == 3


def test_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    programs.make().name = 'other'


@pytest.mark.parametrize('character', '\n\r\t\0\x7f\x85')
def test_paths_hold_no_control_characters(character):
  with pytest.raises(config_lib.ConfigError, match='must hold no control characters'):
    programs.make(f'/runs/a{character}b')
