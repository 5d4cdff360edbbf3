"""What a machine holds of a run, by the arithmetic that a user is shown."""

import re

import pytest

from impala_jax import config as config_lib
from impala_jax import configs
from impala_jax.commands import capacity

LAPTOP = capacity.Machine(threads=32_768, gib=16.0, cores=8)


def problems(name, *settings, machine=LAPTOP, command='impala train'):
  settings = ('transport.kind=reverb', *settings)
  config = config_lib.override(configs.get(name), settings)
  return capacity.problems(config, command, machine)


@pytest.mark.parametrize('name', configs.names())
def test_a_workstation_holds_every_configuration(name):
  machine = capacity.Machine(threads=32_768, gib=64.0, cores=8)
  assert problems(name, machine=machine) == []


def test_a_thousand_actors_on_a_laptop():
  command = 'impala dmlab30 --num_actors 1000 --seed=3'
  (text,) = problems('dmlab30', 'actor.num_actors=1000', command=command)
  lines = text.splitlines()
  assert lines[0].startswith('1,000 actors')
  # Learner, evaluator and its five engines; actors with eight engines each.
  assert '9,007 with 41,102 threads of 32,768: 9 with 41 for each actor' in lines[1]
  each, rest = 0.2 + 8 * 0.24, 2.8 + 0.2 + 5 * 0.24
  assert f'{rest + 1000 * each:,.1f} GiB of 16.0: 2.1 for each actor' in lines[2]
  assert '8: 125 actors a core' in lines[3]
  most = int((16 - rest) / each)
  assert f'at most {most} fit (memory)' in lines[4]
  assert lines[4].endswith(f'impala dmlab30 --seed=3 --num_actors={most}')
  assert lines[5].endswith(f'{command} --launcher=slurm --dry_run')
  assert lines[6].endswith(f'{command} --oversubscribe')


def test_a_learner_that_is_too_large_by_itself():
  for setting in ('learner.batch_size=1e6', 'network.lstm=1e5'):
    (text,) = problems('small', setting)
    assert text.startswith('the run is more than this machine holds')


def test_what_it_says_fits_does_fit():
  for name in ('dmlab30', 'doom', 'small', 'paper_atari_deep'):
    (text,) = problems(name, 'actor.num_actors=5000')
    most = int(re.search(r'--num_actors=(\d+)', text).group(1))
    assert most >= 1
    assert problems(name, f'actor.num_actors={most}') == []
    assert problems(name, f'actor.num_actors={most + 1}')


@pytest.mark.parametrize(
  ('machine', 'reason'),
  [
    (capacity.Machine(1000, 1e6, 1000), 'processes'),
    (capacity.Machine(100_000, 10.0, 1000), 'memory'),
    (capacity.Machine(100_000, 1e6, 1), 'cores'),
  ],
)
def test_each_limit_by_itself(machine, reason):
  (text,) = problems('doom', 'actor.num_actors=500', machine=machine)
  assert f'fit ({reason})' in text


def test_not_even_one_fits():
  machine = capacity.Machine(32_768, 2.0, 2)
  (text,) = problems('dmlab30', machine=machine)
  assert 'fit (' not in text
  assert '--launcher=slurm' in text


def test_actors_that_are_threads_need_no_processes():
  (text,) = problems('small', 'actor.num_actors=300', 'transport.kind=local')
  assert 'processes  1 with 371 threads' in text
  assert problems('catch', 'actor.num_actors=16', 'transport.kind=local') == []


def test_a_wrong_number_is_the_business_of_others():
  assert problems('small', 'actor.num_actors=0') == []


def test_this_machine_can_be_measured():
  machine = capacity.this_machine()
  assert machine.threads > 100
  assert 0.1 < machine.gib < 1e5
  assert machine.cores >= 1
