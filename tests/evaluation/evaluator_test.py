"""Evaluations of a run: policies out of checkpoints, and what a session keeps."""

import json
import logging
import sys

import jax
import numpy as np
import pytest

import impala_jax
from impala_jax import components, configs, suites
from impala_jax import config as config_lib
from impala_jax.environments import base, registry
from impala_jax.evaluation import evaluator
from impala_jax.learning import checkpointing
from impala_jax.runtime import files
from tests import counting


def _build(suite, levels, **settings):
  return components.build(
    config_lib.Config(
      environment=config_lib.Environment(suite=suite, levels=levels),
      network=config_lib.Network(torso='mlp', hidden=4, frame_stack=1),
      evaluator=config_lib.Evaluator(**settings),
    )
  )


def _params(parts, seed=0):
  return jax.tree.map(np.asarray, parts.agent.init(jax.random.key(seed)))


def _save(directory, updates, params):
  metadata = {'updates': updates, 'frames': 100 * updates}
  return checkpointing.save(directory, updates, {'params': params}, metadata)


@pytest.fixture
def scored():
  """Level `<n>` has one episode of n steps, return n (n + 1) / 2; `bad` fails."""

  def make_one(level, seed):
    del seed
    if level == 'bad':
      raise base.EngineError('bad: it exited with code 1')
    return counting.CountingEnvironment(0, (int(level),))

  registry.register('scored', make_one)
  inner = registry.find('scored')
  scores = lambda means: {'sum': sum(means.values())} if len(means) == 2 else {}
  registry.register('scored', inner._replace(scores=scores))
  yield 'scored'
  suites._suites.pop('scored')


def test_policies_out_of_checkpoints(tmp_path, caplog):
  parts = _build('catch', ('catch',))
  directory = tmp_path / 'checkpoints'
  assert evaluator.newest_policy(directory) is None
  for updates in (3, 20):
    _save(directory, updates, _params(parts, updates))
  policy = evaluator.newest_policy(directory)
  assert policy.metadata['updates'] == 20
  jax.tree.map(np.testing.assert_array_equal, policy.params, _params(parts, 20))
  evaluator.check_policy(parts.agent, policy)

  content = policy.path.read_bytes()
  policy.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with caplog.at_level(logging.WARNING):
    assert evaluator.newest_policy(directory).metadata['updates'] == 3
  assert 'damaged' in caplog.text
  with pytest.raises(checkpointing.CheckpointError, match='damaged'):
    evaluator.read_policy(policy.path)


def test_parameters_of_another_network_are_refused(tmp_path):
  small, large = _build('catch', ('catch',)), components.build(configs.get('catch'))
  policy = evaluator.read_policy(_save(tmp_path, 1, _params(small)))
  with pytest.raises(checkpointing.CheckpointError, match=r'of another network.*4'):
    evaluator.check_policy(large.agent, policy)


def test_a_session_plays_all_levels(tmp_path, scored):
  parts = _build(scored, ('3', '5'), episodes=3, processes=1)
  event = evaluator.Session(parts, tmp_path).evaluate(7, _params(parts), lambda: False)
  # Reward s at step s of episode 0; 1000 e + s of episode e, of the same environment.
  returns = {k: sorted(v) for k, v in event.returns.items()}
  assert returns == {'3': [6.0, 3006.0, 6006.0], '5': [15.0, 5015.0, 10015.0]}
  assert event.means == {'3': 3006.0, '5': 5015.0}
  assert event.mean == 4010.5
  assert event.scores == {'sum': 8021.0}
  assert event.failed == {}
  assert event.version == 7
  assert event.frames == 7 * parts.config.frames_per_update
  (line,) = (tmp_path / 'evaluations.jsonl').read_text().splitlines()
  assert json.loads(line) == {'kind': 'evaluation', **vars(event)}


def test_frames_of_an_evaluation_are_those_of_the_run(tmp_path, scored):
  """Also where updates were of other sizes, and where the learner went back."""
  parts = _build(scored, ('3',), episodes=1)
  per_update = parts.config.frames_per_update
  _save(tmp_path / 'checkpoints', 6, _params(parts))  # 600 frames.
  session = evaluator.Session(parts, tmp_path)
  evaluate = lambda version: session.evaluate(version, _params(parts), lambda: False)
  found = [evaluate(version).frames for version in (8, 9, 7)]
  assert found == [600 + per_update * n for n in (2, 3, 1)]
  lines = files.read_json_lines(tmp_path / 'evaluations.jsonl')
  assert [line['version'] for line in lines] == [7]


def test_a_session_that_was_replaced_writes_nothing(tmp_path, scored):
  parts = _build(scored, ('3',), episodes=1)

  def check():
    raise RuntimeError('another one runs')

  session = evaluator.Session(parts, tmp_path, check)
  with pytest.raises(RuntimeError, match='another one'):
    session.evaluate(8, _params(parts), lambda: False)
  assert not (tmp_path / 'evaluations.jsonl').exists()


def test_a_session_goes_on_without_a_level_that_fails(tmp_path, scored):
  # The first level gives the spec.
  parts = _build(scored, ('3', 'bad'), episodes=1)
  event = evaluator.Session(parts, tmp_path).evaluate(1, _params(parts), lambda: False)
  assert event.means == {'3': 6.0}
  assert event.failed == {'bad': 'EngineError: bad: it exited with code 1'}
  assert event.scores == {}


def test_a_session_that_is_stopped_says_nothing(tmp_path, scored):
  parts = _build(scored, ('3', '5'), episodes=2)
  session = evaluator.Session(parts, tmp_path)
  assert session.evaluate(1, _params(parts), lambda: True) is None
  assert not (tmp_path / 'evaluations.jsonl').exists()


def test_the_end_of_a_run(tmp_path, scored):
  """The last evaluation, from a sound checkpoint, and no film where none can be."""
  parts = _build(scored, ('3', '5'), episodes=1)
  _save(tmp_path / 'checkpoints', 4, _params(parts))
  broken = tmp_path / 'checkpoints' / 'checkpoint_0000000009.msgpack'
  broken.write_bytes(b'nothing')
  evaluator.Session(parts, tmp_path).finish(lambda: False)
  (line,) = (tmp_path / 'evaluations.jsonl').read_text().splitlines()
  assert json.loads(line)['version'] == 4
  assert not list(tmp_path.glob('*.mp4'))


def test_the_end_of_a_run_without_the_extras(tmp_path, monkeypatch, caplog):
  """What it trained is not lost with what draws and films it."""
  for name in ('matplotlib', 'imageio_ffmpeg'):
    monkeypatch.setitem(sys.modules, name, None)
  parts = _build('catch', ('catch',), episodes=1)
  _save(tmp_path / 'checkpoints', 4, _params(parts))
  evaluator.Session(parts, tmp_path).finish(lambda: False)
  assert json.loads((tmp_path / 'evaluations.jsonl').read_text())['version'] == 4
  assert 'could not be filmed: import of imageio_ffmpeg' in caplog.text
  assert 'no learning curve: import of matplotlib' in caplog.text


def test_a_film(tmp_path):
  imageio_ffmpeg = pytest.importorskip('imageio_ffmpeg')
  parts = _build('catch', ('catch',))
  path = evaluator.Session(parts, tmp_path).video(
    'catch', _params(parts), lambda: False
  )
  assert path == tmp_path / 'evaluation_catch.mp4'
  # FIRST and the nine steps of a game.
  assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 10
  assert list(tmp_path.iterdir()) == [path]


class _NoEngine:
  num_envs = 1

  def reset(self, seed):
    raise base.EngineError('no engine')

  def frame(self):
    return None

  def close(self):
    pass


def test_a_film_that_fails_does_not_end_the_session(tmp_path, scored):
  suite = registry.find(scored)._replace(scene=lambda config, task: _NoEngine())
  registry.register(scored, suite)
  parts = _build(scored, ('3',))
  session = evaluator.Session(parts, tmp_path)
  assert session.video('3', _params(parts), lambda: False) is None


def test_evaluation_from_python():
  """A fixed number of episodes, each whole, also with an agent that was handed over."""
  config = impala_jax.override(configs.get('catch'), ['evaluator.enabled=false'])
  result = impala_jax.train(config, total_frames=2_000)
  returns = impala_jax.evaluate(result, episodes=7, seed=3)
  assert returns.shape == (7,)
  assert set(returns.tolist()) <= {-1.0, 1.0}
  again = impala_jax.evaluate(result, episodes=7, seed=3)
  assert returns.tolist() == again.tolist()
