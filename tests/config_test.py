"""Configuration: nothing unknown or impossible gets through, all said at once."""

import dataclasses
import json
import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from impala_jax import config as config_lib
from impala_jax import configs, settings, suites


def flat(config):
  """By dotted name, those of the suite too."""
  found = {}
  for name, value in config_lib.to_dict(config).items():
    if isinstance(value, dict):
      found |= {f'{name}.{field}': x for field, x in value.items()}
    else:
      found[name] = value
  return found


def test_named_configurations_are_what_they_were():
  """Their figures are published: a setting may join, none may change by accident."""
  text = (pathlib.Path(__file__).parent / 'named_configurations.json').read_text()
  known = json.loads(text)
  common = known.pop('common')
  assert set(known) == set(configs.names())
  for name, own in known.items():
    now = flat(configs.get(name))
    was = {k: v for k, v in {**common, **own}.items() if k in now}
    assert was.items() <= now.items()
    assert own.keys() <= now.keys()
    # What has joined has its default.
    defaults = {i.name: i.default for i in config_lib.describe_settings()}
    assert all(now[k] == defaults[k] for k in now.keys() - was.keys())


def test_json_round_trip_of_every_named_configuration():
  for name in configs.names():
    config = configs.get(name)
    assert config.name == name
    text = json.dumps(config_lib.to_dict(config))
    assert config_lib.from_dict(json.loads(text)) == config
    config_lib.validate(config)


def _values(info):
  """Values of a setting's type, whether or not they are in its range."""
  texts = st.text(st.characters(exclude_characters=',', exclude_categories=['C', 'Z']))
  return {
    'bool': st.booleans(),
    'int': st.integers(-(2**40), 2**40),
    'float': st.floats(allow_nan=False),
    'str': texts,
    'list of str': st.lists(texts.filter(bool), max_size=3).map(tuple),
  }[info.type]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_round_trips_of_any_values(data):
  suite = data.draw(st.sampled_from(['atari', 'catch', 'dmlab', 'doom', 'procgen']))
  others = {f'{name}.' for name in suites.names()} - {f'{suite}.'}
  known = [
    info
    for info in config_lib.describe_settings()
    if not info.name.startswith(tuple(others)) and info.name != 'environment.suite'
  ]
  chosen = data.draw(st.lists(st.sampled_from(known), unique=True))
  values = {info.name: data.draw(_values(info), info.name) for info in chosen}
  texts = [
    f'{k}={",".join(v) if isinstance(v, tuple) else v}' for k, v in values.items()
  ]
  config = config_lib.override(
    config_lib.Config(),
    data.draw(st.permutations([*texts, f'environment.suite={suite}'])),
  )
  now = flat(config)
  assert now['environment.suite'] == suite
  for name, value in values.items():
    assert now[name] == (list(value) if isinstance(value, tuple) else value)
  defaults = {info.name: info.default for info in known if info.name not in values}
  assert all(
    now[k] == (list(v) if isinstance(v, tuple) else v) for k, v in defaults.items()
  )
  assert (
    config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config)))) == config
  )
  assert config_lib.override(config, []) == config


def test_every_setting_is_described():
  found = config_lib.describe_settings()
  names = [info.name for info in found]
  assert len(set(names)) == len(names)
  assert set(names) >= set(flat(config_lib.Config()))
  assert {n.partition('.')[0] for n in names} >= {'atari', 'dmlab', 'doom', 'learner'}
  for info in found:
    assert info.meaning[0].isupper(), info.name
    assert info.meaning.endswith('.'), info.name
    # A number without a range is an oversight; other types may be free.
    assert info.allowed or info.type not in ('int', 'float'), info.name
  by_name = {info.name: info for info in found}
  assert by_name['environment.levels'] == settings.SettingInfo(
    'environment.levels',
    'list of str',
    ('breakout',),
    'must not be empty and must name each once, by names that are not empty',
    'These tasks are played. Several make one multi-task agent.',
    'cannot change in a run that goes on',
  )
  assert by_name['atari.sticky_actions'].allowed == (
    'must not be negative and must be below 1, or no action would ever be taken'
  )


def _with(config, name, value):
  section, _, field = name.partition('.')
  if not field:
    return dataclasses.replace(config, **{name: value})
  if section in suites.names():
    changed = dataclasses.replace(config.suite_section, **{field: value})
    return dataclasses.replace(config, suite_settings=changed)
  changed = dataclasses.replace(getattr(config, section), **{field: value})
  return dataclasses.replace(config, **{section: changed})


def test_every_range_is_judged():
  """A value below all ranges and one of another type, for each setting alone."""
  for info in config_lib.describe_settings():
    section = info.name.partition('.')[0]
    config = config_lib.Config()
    if section in suites.names():
      config = config_lib.override(config, [f'environment.suite={section}'])
    bad = {'int': -1, 'float': -0.5, 'str': 'no such', 'list of str': ()}
    cases = [(object(), 'must be a')] if info.type != 'bool' else [(2, 'must be true')]
    if info.name == 'name':
      bad['str'] = '../no'
    if info.allowed:
      cases.append((bad[info.type], info.allowed.split(' and ')[0]))
    for value, text in cases:
      words = re.escape(f'{info.name} is {value!r}: {text}')
      with pytest.raises(config_lib.ConfigError, match=words):
        config_lib.validate(_with(config, info.name, value))


def test_settings_of_the_suite():
  config = config_lib.override(
    config_lib.Config(),
    # The suite decides what there is, wherever it is said.
    ['doom.action_repeat=2', 'environment.suite=doom', 'environment.levels=basic'],
  )
  settings_class = suites.settings_of('doom')
  assert config.suite_settings == settings_class(action_repeat=2)
  assert config.of_suite(settings_class).action_repeat == config.action_repeat == 2
  assert config.frames_per_update == 32 * 20 * 2
  assert config_lib.to_dict(config)['doom']['action_repeat'] == 2
  assert 'atari' not in config_lib.to_dict(config)
  # Those of another suite leave with it.
  config = config_lib.override(config, ['environment.suite=atari'])
  assert config.suite_settings is None
  assert config.action_repeat == 4
  # Defaults are defaults, however they are said.
  said = dataclasses.replace(config, suite_settings=suites.settings_of('atari')())
  assert said == config
  # A suite without such a setting plays each frame once.
  assert configs.get('catch').action_repeat == 1
  assert (
    config_lib.Config(environment=config_lib.Environment('mine')).action_repeat == 1
  )


@pytest.mark.parametrize(
  ('setting', 'words'),
  [
    (
      'dmlab.level_cache=x',
      "dmlab.level_cache has no effect: environment.suite is 'atari'",
    ),
    (
      'atari.level_cache=x',
      'unknown setting atari.level_cache: known are atari.action_',
    ),
    ('atari.episodic_lives=1', 'did you mean atari.episodic_life?'),
    ('atari.episodic_life=2', "atari.episodic_life='2': not a valid bool"),
    ('atari=2', 'atari is a section: write atari.field=value'),
    ('attari.x=2', 'unknown setting attari.x: did you mean atari?'),
    ('environment.level_cache=x', 'environment.level_cache is now dmlab.level_cache'),
    (
      'environment.action_repeat=1',
      'environment.action_repeat is now atari.action_repeat',
    ),
    (
      'environment.frame_width=8',
      'environment.frame_width is now dmlab.frame_width or doom.frame_width',
    ),
  ],
)
def test_settings_that_the_suite_has_not(setting, words):
  with pytest.raises(config_lib.ConfigError, match=re.escape(words)):
    config_lib.override(config_lib.Config(), ['loss.discount=1', setting])


def test_settings_of_another_suite_are_impossible():
  config = config_lib.Config(suite_settings=suites.settings_of('doom')(action_repeat=2))
  for use in (config_lib.validate, config_lib.to_dict, lambda c: c.action_repeat):
    with pytest.raises(config_lib.ConfigError, match=r'must be of impala_jax\..*atari'):
      use(config)
  handed = dataclasses.replace(config, environment=config_lib.Environment('mine'))
  with pytest.raises(config_lib.ConfigError, match="the suite 'mine' has no settings"):
    config_lib.validate(handed)


def test_a_configuration_of_before_names_what_has_moved():
  data = config_lib.to_dict(configs.get('doom'))
  settings_now = data.pop('doom')
  data['environment'] |= {**settings_now, 'level_cache': '', 'episodic_life': False}
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.from_dict(data)
  lines = str(error.value).splitlines()
  assert 'environment.frame_width is now doom.frame_width' in lines
  assert 'environment.level_cache is now dmlab.level_cache' in lines
  assert 'environment.episodic_life is now atari.episodic_life' in lines
  assert len(lines) == len(settings_now) + 2


def test_a_damaged_configuration_is_refused_whole():
  data = config_lib.to_dict(config_lib.Config())
  data['learner']['batch_size'] = '32'
  data['environment']['levels'] = 'pong'
  data['loss'] = 3
  data['optimizer'] = {'learning_rate': 1}  # JSON has one kind of number.
  data['atari']['noop'] = 1
  data['doom'] = {}
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.from_dict(data)
  assert str(error.value).splitlines() == [
    "environment.levels is 'pong': must be a list, each a text",
    'loss is 3: must be a JSON object',
    "learner.batch_size is '32': must be a whole number",
    'unknown setting atari.noop: did you mean atari.noop_max?',
    "doom.* has no effect: environment.suite is 'atari'",
  ]
  for wrong in ([], None, 'x'):
    with pytest.raises(config_lib.ConfigError, match='must be a JSON object'):
      config_lib.from_dict(wrong)
  read = config_lib.from_dict({'optimizer': {'learning_rate': 1}})
  assert isinstance(read.optimizer.learning_rate, float)


@pytest.mark.parametrize(
  ('setting', 'words'),
  [
    (f'network.lstm={"1" * 40}', 'must lie between -2^63 and 2^63'),
    (f'network.lstm={"1" * 5000}', 'not a valid int'),
    ('network.lstm=1e9', 'network.lstm is 1000000000: with network.hidden 512 they'),
    ('network.hidden=1e12', 'GiB, and must need less than 1,024 in one process'),
    ('actor.envs_per_actor=16e12', 'must need less than 1,024 in one process'),
    ('actor.unroll_length=1e15', 'must need less than 1,024 in one process'),
    ('learner.batch_size=1e10', 'must need less than 1,024 in one process'),
    ('transport.queue_batches=1e12', 'must need less than 1,024 in one process'),
    ('actor.num_actors=1e9', 'must be at most 1,000,000'),
    ('atari.max_episode_frames=1e12', 'must be below 2^31'),
    ('environment.levels=pong,qbert,pong', 'must name each once'),
    ('environment.levels=pong,,qbert', 'separated by commas, none of them empty'),
    ('environment.levels=,', 'separated by commas, none of them empty'),
    *[
      (f'name={x}', 'must be 1 to 100 printable characters without a slash')
      for x in ('../x', 'a/b', '..', '.x', '', 'x' * 300)
    ],
    ('name=a\tb', 'must hold no control characters'),
    ('environment.levels=a\x1bb', 'must hold no control characters'),
  ],
)
def test_what_no_run_can_be(setting, words):
  judge = lambda: config_lib.validate(
    config_lib.override(config_lib.Config(), [setting])
  )
  with pytest.raises(config_lib.ConfigError) as error:
    judge()
  assert words in str(error.value)
  assert all(len(line) < 500 for line in str(error.value).splitlines())


def test_sizes_with_the_frames_of_the_suite():
  config = config_lib.override(config_lib.Config(), ['learner.batch_size=1e7'])
  config_lib.validate(config)
  with pytest.raises(config_lib.ConfigError, match='batch_size is too much'):
    config_lib.check_sizes(config, 84 * 84)
  config_lib.check_sizes(config_lib.Config(), 84 * 84)


def test_whole_numbers_are_exact():
  number = 2**53 + 1
  config = config_lib.override(config_lib.Config(), [f'learner.total_frames={number}'])
  assert config.learner.total_frames == number


def test_override_reads_every_kind_of_field():
  config = config_lib.override(
    config_lib.Config(),
    [
      'learner.total_frames=2e6',
      'environment.levels=pong, qbert',
      'seed=7',
      'evaluator.video=false',
      'optimizer.learning_rate=1e-3',
      'network.torso=deep',
    ],
  )
  assert config.learner.total_frames == 2_000_000
  assert config.environment.levels == ('pong', 'qbert')
  assert config.seed == 7
  assert config.evaluator.video is False
  assert config.optimizer.learning_rate == 1e-3
  assert config.network.torso == 'deep'


def test_all_bad_settings_are_named_at_once():
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.override(
      config_lib.Config(),
      ['learner.batchsize=3', 'loss.discount=much', 'nonsense', 'actor=1', 'seed=1.5'],
    )
  text = str(error.value)
  assert 'did you mean learner.batch_size' in text
  assert "loss.discount='much': not a valid float" in text
  assert "'nonsense': write section.field=value" in text
  assert 'actor is a section' in text
  assert "seed='1.5': not a valid int" in text


def test_all_impossible_settings_are_named_at_once_with_the_arithmetic():
  config = config_lib.override(
    config_lib.Config(),
    [
      'learner.batch_size=6',
      'loss.discount=1.5',
      'optimizer.name=sgd',
      'loss.c_clip=2',
      'actor.inference_batch=40',
      'transport.queue_batches=0',
    ],
  )
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.validate(config, local_devices=4)
  text = str(error.value)
  assert text.startswith('6 impossible setting(s)')
  assert '6 = 1 x 4 + 2' in text
  assert 'loss.discount is 1.5: must lie in [0, 1]' in text
  assert "optimizer.name is 'sgd': must be one of rmsprop, adam" in text
  assert 'loss.c_clip is 2.0: must not exceed loss.rho_clip (1.0)' in text
  assert 'must not exceed actor.envs_per_actor (32)' in text
  assert 'transport.queue_batches is 0: must be at least 1' in text


def test_more_updates_than_a_learner_can_count_are_impossible():
  settings = ['learner.total_frames=1e12', 'learner.batch_size=1']
  with pytest.raises(config_lib.ConfigError, match=r'below 2\^31 updates of 80 frames'):
    config_lib.validate(config_lib.override(config_lib.Config(), settings))


def test_more_levels_than_environments_is_impossible():
  config = config_lib.override(
    config_lib.Config(), ['environment.levels=a,b,c', 'actor.envs_per_actor=2']
  )
  with pytest.raises(config_lib.ConfigError, match='1 actors x 2 = 2'):
    config_lib.validate(config)


@pytest.mark.parametrize(
  ('settings', 'least', 'words'),
  [
    # A full queue, or the environments of all actors.
    (['transport.queue_batches=3'], 5, 'transport.queue_batches + 2 = 5'),
    (['actor.num_actors=20'], 20, '640 environments / learner.batch_size = 20 updates'),
  ],
)
def test_a_limit_of_lag_that_nothing_could_keep_is_impossible(settings, least, words):
  def check(limit):
    config_lib.validate(
      config_lib.override(
        config_lib.Config(), [*settings, f'learner.max_policy_lag={limit}']
      )
    )

  check(0)
  check(least)
  for limit in (1, least - 1):
    with pytest.raises(config_lib.ConfigError) as error:
      check(limit)
    assert f'learner.max_policy_lag is {limit}: must be 0' in str(error.value)
    assert f'at least {least}' in str(error.value)
    assert words in str(error.value)
  with pytest.raises(config_lib.ConfigError, match='max_policy_lag is -1: must not be'):
    check(-1)


def test_impossible_settings_of_inference_are_named_at_once():
  config = config_lib.override(
    config_lib.Config(),
    [
      'inference.servers=3',
      'actor.num_actors=2',
      'inference.max_batch=16',
      'inference.max_environments=31',
      'inference.deadline_ms=20000',
      'actor.platform=gpu',
      'transport.kind=local',
    ],
  )
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.validate(config)
  text = str(error.value)
  assert text.startswith('6 impossible setting(s)')
  assert 'must not exceed actor.num_actors (2)' in text
  assert 'must hold what one actor asks at once, 32 environments' in text
  assert 'must be 0 or at least the 32 of the actors dealt to one server' in text
  assert 'inference.deadline_ms is 20000.0: must be at most 10,000' in text
  assert "actor.platform is 'gpu': has no meaning with inference.servers" in text
  assert "transport.kind 'local' has not" in text
  for setting in ('inference.servers=-1', 'inference.platform=cuda',
                  'actor.platform=cuda', 'inference.max_batch=0'):  # fmt: skip
    config = config_lib.override(config_lib.Config(), [setting])
    with pytest.raises(config_lib.ConfigError, match=setting.split('=')[0]):
      config_lib.validate(config)


def test_room_of_inference_servers():
  def room(*settings):
    config = config_lib.override(config_lib.Config(), settings)
    config_lib.validate(config)
    return config.inference_environments

  assert room() == 0
  # Twice what is dealt to the fullest.
  assert room('inference.servers=2', 'actor.num_actors=5') == 2 * 3 * 32
  assert room('inference.servers=1', 'inference.max_environments=100') == 100


def test_unknown_fields_of_a_saved_configuration_are_refused():
  data = config_lib.to_dict(config_lib.Config())
  data['loss']['gama'] = 1
  with pytest.raises(config_lib.ConfigError, match=r'loss\.gama'):
    config_lib.from_dict(data)


def test_unknown_name_of_a_configuration_suggests_near_ones():
  with pytest.raises(config_lib.ConfigError, match=r'did you mean .*pong'):
    configs.get('pongg')


def test_derived_numbers():
  config = configs.get('paper_atari_shallow')
  assert config.frames_per_update == 32 * 20 * 4
  assert config.total_updates == 78_125
  assert config.queue_capacity == 64


def test_configurations_cannot_be_changed_in_place():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config_lib.Config().seed = 2  # type: ignore[misc]


def test_frames_count_repeats_and_the_last_update_reaches_the_total():
  config = config_lib.Config(actor=config_lib.Actor(unroll_length=5))
  assert config.action_repeat == 4
  for total, updates in ((1, 1), (40, 1), (41, 2), (80, 2)):
    learner = config_lib.Learner(batch_size=2, total_frames=total)
    sized = dataclasses.replace(config, learner=learner)
    assert (sized.frames_per_update, sized.total_updates) == (40, updates)


@pytest.mark.parametrize(
  ('setting', 'words'),
  [
    ('optimizer.adam_b2=1', r'adam_b2 is 1\.0: must be below 1'),
    ('optimizer.adam_b1=1', r'adam_b1 is 1\.0: must be below 1'),
    ('optimizer.decay=1', r'decay is 1\.0: must be below 1'),
    ('optimizer.momentum=1', r'momentum is 1\.0: must be below 1'),
    ('optimizer.learning_rate=inf', 'learning_rate is inf: must be finite'),
    ('loss.entropy_cost=inf', 'entropy_cost is inf: must be finite'),
    ('loss.baseline_cost=nan', 'baseline_cost is nan: must be finite'),
    ('loss.trace_lambda=1e6', r'trace_lambda is 1000000\.0: must lie in \[0, 1\]'),
    ('loss.rho_clip=nan', 'rho_clip is nan: must not be negative'),
    ('learner.metrics_interval=inf', 'metrics_interval is inf: must be finite'),
  ],
)
def test_settings_that_make_nothing_finite_are_refused(setting, words):
  with pytest.raises(config_lib.ConfigError, match=words):
    config_lib.validate(config_lib.override(config_lib.Config(), [setting]))


def test_clips_may_be_infinite_but_not_their_products():
  free = ['loss.rho_clip=inf', 'loss.pg_rho_clip=inf', 'optimizer.max_grad_norm=inf']
  config_lib.validate(config_lib.override(config_lib.Config(), free))
  for c_clip in ('inf', '4'):
    made = config_lib.override(config_lib.Config(), [*free, f'loss.c_clip={c_clip}'])
    with pytest.raises(config_lib.ConfigError, match=r'c_clip .* at most 3\.981 with'):
      config_lib.validate(made)
  config_lib.validate(
    config_lib.override(config_lib.Config(), [*free, 'loss.c_clip=3.9'])
  )
