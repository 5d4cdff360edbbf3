"""ViZDoom's adapter, against the engine itself where that is installed."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import dm_env
import numpy as np
import psutil
import pytest

from impala_jax.environments import area_average, specs
from impala_jax.environments.doom import environment as doom

# What its engines have in shared memory bears no process's name: no two at once.
pytestmark = pytest.mark.xdist_group('doom')
ROOT = pathlib.Path(__file__).parents[3]
FORWARD, BACKWARD, LEFT, RIGHT, TURN_LEFT, TURN_RIGHT, *_, ATTACK = range(9)


@pytest.fixture(scope='module')
def vizdoom():
  return pytest.importorskip('vizdoom')


@pytest.fixture
def make(vizdoom):
  """`doom.Doom` whose engines end with the test."""
  made = []

  def call(*args, kind=doom.Doom, **kwargs):
    made.append(kind(*args, **kwargs))
    return made[-1]

  yield call
  for environment in made:
    environment.close()


@pytest.fixture
def folders(tmp_path, monkeypatch):
  """Working and temporary directory of the test, empty."""
  work, temporary = tmp_path / 'work', tmp_path / 'tmp'
  work.mkdir()
  temporary.mkdir()
  monkeypatch.chdir(work)
  monkeypatch.setattr(tempfile, 'tempdir', str(temporary))
  return work, temporary


def shared():
  return {p.name for p in pathlib.Path('/dev/shm').glob('ViZDoom*')}


def engine_of(pid):
  (engine,) = psutil.Process(pid).children()
  return engine


def play(environment, actions):
  """Resets, then takes `actions`; the time steps up to and with the first LAST."""
  steps = [environment.reset()]
  for action in actions:
    if steps[-1].last():
      break
    steps.append(environment.step(action))
  return steps


def frames(steps):
  return np.stack([s.observation['frame'] for s in steps])


def mean_areas(picture, rows, columns):
  """From the definition: the integral over each cell, by its own area."""

  def weights(given, wanted):
    size = given / wanted
    low = np.arange(wanted)[:, None] * size
    at = np.arange(given)
    overlap = np.minimum(low + size, at + 1) - np.maximum(low, at)
    return np.clip(overlap, 0, None) / size

  vertical, horizontal = (
    weights(picture.shape[0], rows),
    weights(picture.shape[1], columns),
  )
  return np.einsum('yi,xj,ijc->yxc', vertical, horizontal, picture, optimize=True)


def digits(frame):
  """Where the frame's lower edge is as red as the digits of health and ammunition."""
  red, green, blue = np.moveaxis(frame[58:].astype(int), -1, 0)
  return red - np.maximum(green, blue) > 60


class TestAreaAverage:
  @pytest.mark.parametrize(
    'target', [(72, 96), (120, 160), (60, 80), (84, 84), (1, 1), (7, 159)]
  )
  def test_means(self, target):
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (120, 160, 4), dtype=np.uint8)
    reduce = area_average.AreaAverage((120, 160), target)
    found = reduce(given)
    assert found.dtype == np.uint8
    assert found.shape == (*target, 3)
    # Rounded twice, by at most a half each time.
    wanted = mean_areas(given[..., :3], *target)
    assert np.abs(found - wanted).max() <= 1.01
    np.testing.assert_array_equal(reduce(given), found)

  @pytest.mark.parametrize('value', [0, 1, 254, 255])
  @pytest.mark.parametrize('source', [(120, 160), (256, 256)])
  @pytest.mark.parametrize('target', [(72, 96), (1, 1), (119, 159)])
  def test_extremes_do_not_overflow(self, value, source, target):
    given = np.full((*source, 4), value, np.uint8)
    assert np.all(area_average.AreaAverage(source, target)(given) == value)

  def test_sums_that_would(self):
    with pytest.raises(ValueError, match='blocks of 640'):
      area_average.AreaAverage((480, 640), (480, 639))

  def test_result_belongs_to_the_receiver(self):
    reduce = area_average.AreaAverage((120, 160), (72, 96))
    first = reduce(np.full((120, 160, 4), 9, np.uint8))
    reduce(np.full((120, 160, 4), 200, np.uint8))
    assert np.all(first == 9)


class TestSteps:
  def test_specs(self, make):
    environment = make('basic', seed=1)
    step = environment.reset()
    assert step.first()
    environment.observation_spec()['frame'].validate(step.observation['frame'])
    assert specs.environment_spec(environment).num_actions == 9
    assert specs.environment_spec(environment).observation['frame'].shape == (72, 96, 3)

  @pytest.mark.parametrize('size', [(96, 72), (160, 120), (320, 240)])
  def test_frames_are_the_screen_reduced(self, vizdoom, make, size):
    width, height = size
    environment = make('deadly_corridor', 3, width=width, height=height)
    steps = play(environment, [FORWARD, TURN_LEFT, RIGHT])
    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, 'deadly_corridor.cfg'))
    large = width > 160
    name = 'RES_320X240' if large else 'RES_160X120'
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, name))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_render_hud(True)
    game.set_render_minimal_hud(True)
    game.set_window_visible(False)
    game.set_doom_config_path(os.path.join(environment._directory, 'other.ini'))
    game.init()
    game.set_seed(environment.episode_seed)
    game.new_episode()
    # MOVE_LEFT, MOVE_RIGHT, ATTACK, MOVE_FORWARD, MOVE_BACKWARD, TURN_LEFT, TURN_RIGHT
    buttons = [
      None,
      (0, 0, 0, 1, 0, 0, 0),
      (0, 0, 0, 0, 0, 1, 0),
      (0, 1, 0, 0, 0, 0, 0),
    ]
    try:
      for step, pressed in zip(steps, buttons, strict=True):
        if pressed:
          assert game.make_action(list(pressed), 4) == pytest.approx(step.reward)
        screen = game.get_state().screen_buffer
        wanted = mean_areas(screen, height, width)
        assert np.abs(step.observation['frame'] - wanted).max() <= 1.01
        assert screen.std() > 10
    finally:
      game.close()

  def test_health_and_ammunition_are_on_the_screen(self, make):
    """An agent that cannot see its health cannot tell how long it has to live."""
    steps = play(make('health_gathering', 1), [BACKWARD] * 30)  # It has no such button.
    first, last = (digits(steps[i].observation['frame']) for i in (0, -1))
    assert first[:, :48].any()
    assert not first[:, 48:].any()  # It has no weapon.
    assert (first != last).any()  # The floor hurts.

    steps = play(
      make('defend_the_center', 1), [BACKWARD] * 4 + [ATTACK] + [BACKWARD] * 4
    )
    first, last = (digits(steps[i].observation['frame'])[:, 60:] for i in (0, -1))
    assert first.any()
    assert (first != last).any()

  def test_actions_do_what_they_are_called(self, vizdoom, make):
    environment = make('deadly_corridor', seed=1)
    variables = vizdoom.GameVariable

    def effect(action, count=3):
      environment.reset()
      game = environment._game
      names = ('POSITION_X', 'POSITION_Y', 'ANGLE', 'AMMO2')
      read = lambda: [game.get_game_variable(getattr(variables, n)) for n in names]
      before = np.array(read())
      for _ in range(count):
        environment.step(action)
      x, y, angle, rounds = np.array(read()) - before
      return x, y, (angle + 180) % 360 - 180, rounds

    # The player looks along x; shots of monsters push, too.
    wanted = {
      FORWARD: (0, 1),
      BACKWARD: (0, -1),
      LEFT: (1, 1),
      RIGHT: (1, -1),
      TURN_LEFT: (2, 1),
      TURN_RIGHT: (2, -1),
    }
    for action, (variable, sign) in wanted.items():
      assert sign * effect(action)[variable] > 1, action
    for action, turn in ((6, 1), (7, -1)):
      x, _, angle, _ = effect(action)
      assert x > 1
      assert turn * angle > 1
    assert effect(ATTACK, 6)[3] < 0

  def test_buttons_that_a_scenario_lacks_do_nothing(self, make):
    environment = make('take_cover', seed=1)  # Has MOVE_LEFT and MOVE_RIGHT alone.
    assert [sum(b) for b in environment._buttons] == [0, 0, 1, 1, 0, 0, 0, 0, 0]

  def test_seed_and_actions_decide_everything(self, make):
    actions = np.random.default_rng(0).integers(0, 9, 40).tolist()
    first, second = make('defend_the_center', 7), make('defend_the_center', 7)
    runs = [play(first, actions), play(first, actions)]
    play(second, actions[:5])
    again = play(second, actions)
    np.testing.assert_array_equal(frames(again), frames(runs[1]))
    assert [s.reward for s in again] == [s.reward for s in runs[1]]
    assert first.episode_seed == second.episode_seed
    assert not np.array_equal(frames(runs[0]), frames(runs[1]))
    assert not np.array_equal(
      frames(play(make('defend_the_center', 8), actions)), frames(runs[0])
    )

  def test_the_result_belongs_to_the_receiver(self, make):
    environment = make('basic', seed=1)
    first = environment.reset().observation['frame']
    kept = first.copy()
    for _ in range(3):
      environment.step(LEFT)
    np.testing.assert_array_equal(first, kept)

  @pytest.mark.parametrize('action', [-1, 9])
  def test_bad_action(self, make, action):
    environment = make('basic', seed=1)
    environment.reset()
    with pytest.raises(ValueError, match=rf'action is {action}: must be in \[0, 9\)'):
      environment.step(action)


class TestEpisodes:
  def test_death_is_a_true_end(self, make):
    steps = play(make('defend_the_center', seed=1), [BACKWARD] * 600)
    assert steps[-1].last()
    assert steps[-1].discount == 0.0
    assert all(s.discount == 1.0 for s in steps[1:-1])
    assert sum(s.reward for s in steps[1:]) == -1.0  # Shot nobody, died.
    assert 20 < len(steps) < 500
    np.testing.assert_array_equal(*frames(steps[-2:]))

  def test_reaching_the_goal_is_a_true_end(self, make):
    environment = make('basic', seed=1)
    for _ in range(20):  # The monster is in front of the player in some episodes.
      steps = play(environment, [ATTACK] * 80)
      if steps[-1].discount == 0.0:
        break
    assert steps[-1].reward > 80
    assert len(steps) < 75

  def test_time_limit_of_the_scenario(self, make):
    steps = play(make('basic', seed=1), [BACKWARD] * 80)
    assert len(steps) == 1 + 75  # 300 tics.
    assert steps[-1].last()
    assert steps[-1].discount == 1.0
    assert sum(s.reward for s in steps[1:]) == -300.0

  @pytest.mark.parametrize(('repeat', 'count'), [(4, 5), (1, 18), (30, 1)])
  def test_time_limit_cuts_a_step_short(self, make, repeat, count):
    environment = make(
      'health_gathering', 1, action_repeat=repeat, time_limit=18, reward_scale=0.01
    )
    steps = play(environment, [FORWARD] * 50)
    assert len(steps) == 1 + count
    assert steps[-1].last()
    assert steps[-1].discount == 1.0
    assert sum(s.reward for s in steps[1:]) == pytest.approx(0.18)  # 1 a tic.
    np.testing.assert_array_equal(*frames(steps[-2:]))

  def test_a_longer_limit_leaves_that_of_the_scenario(self, make):
    steps = play(make('basic', seed=1, time_limit=5000), [BACKWARD] * 80)
    assert len(steps) == 1 + 75

  def test_the_next_episode(self, make):
    environment = make('health_gathering', 1, time_limit=8)
    assert environment.episode_seed == -1
    play(environment, [FORWARD] * 2)
    seed = environment.episode_seed
    step = environment.step(FORWARD)
    assert step.first()
    assert step.reward is None
    assert environment.episode_seed not in (-1, seed)
    assert environment.step(FORWARD).mid()


class TestSettings:
  @pytest.mark.parametrize(
    ('settings', 'text'),
    [
      ({'action_set': 'all'}, "action_set is 'all': must be one of default"),
      ({'width': 161}, 'are 161, 72: must be at most 160, 120, or one of the screens'),
      ({'height': 0}, 'are 96, 0'),
    ],
  )
  def test_impossible(self, settings, text):
    with pytest.raises(ValueError, match=text):
      doom.Doom('basic', 1, **settings)

  def test_unknown_level(self, vizdoom, folders):
    with pytest.raises(ValueError, match="level is 'basics': vizdoom has no scenario"):
      doom.Doom('basics', 1)
    assert not list(folders[1].iterdir())

  def test_not_installed(self, monkeypatch):
    monkeypatch.setitem(sys.modules, 'vizdoom', None)
    with pytest.raises(ImportError):
      doom.Doom('basic', 1)

  def test_nothing_may_be_run_in_tmpdir(self, vizdoom, folders, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(RuntimeError, match='set TMPDIR'):
      doom.Doom('basic', 1)
    assert not list(folders[1].iterdir())


class TestWhatIsLeft:
  def test_nothing_after_a_normal_end(self, make, folders):
    work, temporary = folders
    before = shared()
    environment = make('basic', seed=1)
    assert shared() <= before, 'names in shared memory outlive the start'
    play(environment, [ATTACK] * 3)
    engine = engine_of(os.getpid())
    environment.close()
    environment.close()
    assert not engine.is_running()
    assert not list(work.iterdir())
    assert not list(temporary.iterdir())
    assert shared() <= before

  def test_the_engine_ends_with_its_process(self, vizdoom, tmp_path):
    before = shared()
    script = (
      'import sys, time\n'
      'from impala_jax.environments.doom import environment as doom\n'
      'environment = doom.Doom("basic", 1)\n'
      'environment.reset()\n'
      'print("ready", flush=True)\n'
      'time.sleep(600)\n'
    )
    with subprocess.Popen(
      [sys.executable, '-c', script],
      cwd=ROOT,
      env={**os.environ, 'TMPDIR': str(tmp_path)},
      stdout=subprocess.PIPE,
    ) as process:
      try:
        assert process.stdout.readline() == b'ready\n'
        engine = engine_of(process.pid)
      finally:
        process.kill()
    _, alive = psutil.wait_procs([engine], timeout=20)
    assert not alive
    assert shared() <= before

  def test_an_engine_that_dies_is_seen(self, make, vizdoom, folders):
    environment = make('basic', seed=1)
    environment.reset()
    engine_of(os.getpid()).kill()
    with pytest.raises(
      (vizdoom.ViZDoomErrorException, vizdoom.ViZDoomUnexpectedExitException)
    ):
      environment.step(FORWARD)
    environment.close()
    assert not list(folders[1].iterdir())

  def test_an_engine_that_hangs_can_be_closed(self, make):
    environment = make('basic', seed=1)
    environment.reset()
    engine = engine_of(os.getpid())
    engine.suspend()
    try:
      environment.close()
    finally:
      engine_gone = not engine.is_running()
      if not engine_gone:
        engine.resume()
    assert engine_gone

  def test_sweep(self, tmp_path, monkeypatch):
    monkeypatch.setattr(doom, '_SHARED_MEMORY', tmp_path)
    old = time.time() - 400
    for name in ('ViZDoomSMa', 'ViZDoomMQCtra', 'ViZDoomMQDooma', 'other'):
      (tmp_path / name).touch()
      os.utime(tmp_path / name, (old, old))
    (tmp_path / 'ViZDoomSMb').touch()
    doom.sweep_shared_memory()
    assert {p.name for p in tmp_path.iterdir()} == {'other', 'ViZDoomSMb'}


class TestFilmed:
  def test_frames_of_the_agent_and_pictures(self, make):
    actions = [FORWARD, TURN_LEFT, ATTACK] * 3
    plain = play(make('deadly_corridor', 5), actions)
    filmed = make('deadly_corridor', 5, kind=doom.Filmed)
    shape = filmed.observation_spec()['picture'].shape
    assert shape == doom.PICTURE_SHAPE == (480, 640, 3)
    steps = play(filmed, actions)
    np.testing.assert_array_equal(frames(steps), frames(plain))
    assert [s[:3] for s in steps] == [s[:3] for s in plain]
    for step in steps:
      picture = mean_areas(step.observation['picture'], 72, 96)
      # The same scene, drawn with more detail.
      assert np.abs(picture - step.observation['frame']).mean() < 12

  def test_games_that_part(self, make, monkeypatch):
    environment = make('basic', 1, kind=doom.Filmed)
    environment.reset()
    other = dm_env.transition(reward=7.0, observation={})
    monkeypatch.setattr(environment._film, 'step', lambda action: other)
    with pytest.raises(RuntimeError, match='left the played one'):
      environment.step(FORWARD)

  def test_made_by_name(self, make):
    assert isinstance(make('basic', 1, kind=doom.make), doom.Doom)
    assert isinstance(make('basic', 1, kind=doom.make, picture=True), doom.Filmed)


def test_signals_are_left_alone(make):
  """The engine's library must not change what Ctrl-C does here."""
  before = signal.getsignal(signal.SIGINT)
  make('basic', 1)
  assert signal.getsignal(signal.SIGINT) is before
