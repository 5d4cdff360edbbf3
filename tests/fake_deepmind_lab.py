"""A stand-in for the module `deepmind_lab` that behaves like it, crashes included.

What it copies, and nothing else, is what an adapter sees: signatures, checks and their
exceptions, when an episode ends and what may be called then, the level cache, the
temporary folder, what goes to stdout, and the ways in which the engine ends its
process. Pictures are noise that follows from the level and all that was done to the
engine, so equal histories show equal pictures and others do not.

`install` makes `import deepmind_lab` find it, here and in processes started from here.

Levels by name behave as their namesakes; those of `fake/` break on purpose:
`fake/plain`, `fake/language`, `fake/maps`, `fake/no_instr`, and with a number n,
`fake/{abort,exit,segfault,hang,error}_at_{reset,step}_n` at the n-th call (from 1)
and `fake/slow_reset_n` (seconds).
"""

import ctypes
import hashlib
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import zipfile

import numpy as np

from impala_jax.environments.dmlab import levels as dmlab30

_HERE = pathlib.Path(__file__).resolve().parent
_LEVELS = re.compile(
  r'contributed/psychlab/[a-z0-9_]+$'
  r'|(lt_|nav_maze_|seekavoid_arena_01$|stairway_to_melon$)[a-z0-9_]*$'
)
_FAULT = re.compile(
  r'fake/(abort|exit|segfault|hang|error)_at_(reset|step)_(\d+)$'
  r'|fake/slow_reset_([\d.]+)$'
)
_COMPILED = re.compile(r'(explore_|lasertag_|skymaze_|rooms_keys_doors_puzzle|maps$)')
_PICTURES = ('psychlab_arbitrary_visuomotor_mapping', 'psychlab_continuous_recognition')
_SETTINGS = {
  'width', 'height', 'fps', 'levelDirectory', 'appendCommand', 'mixerSeed',
  'episodeLengthSeconds', 'allowHoldOutLevels', 'logLevel', 'datasetPath',
}  # fmt: skip
_NUMBERS = {'width', 'height', 'fps', 'mixerSeed', 'episodeLengthSeconds'}
_ACTIONS = (
  ('LOOK_LEFT_RIGHT_PIXELS_PER_FRAME', -512, 512),
  ('LOOK_DOWN_UP_PIXELS_PER_FRAME', -512, 512),
  ('STRAFE_LEFT_RIGHT', -1, 1),
  ('MOVE_BACK_FORWARD', -1, 1),
  ('FIRE', 0, 1),
  ('JUMP', 0, 1),
  ('CROUCH', 0, 1),
)
_FIRE = 4
_FPS = 60
INSTRUCTION_FRAMES = 40  # After so many frames a language level has a new one.
COLOURS = ('red', 'green', 'cyan')

instances: list['Lab'] = []  # All that were constructed in this process.
compiled: list[str] = []  # Keys of the maps that were compiled in this process.


def install(monkeypatch) -> None:
  """For the time of a test, `import deepmind_lab` means this module."""
  folder = _HERE / 'fake_modules'
  monkeypatch.syspath_prepend(str(folder))
  monkeypatch.delitem(sys.modules, 'deepmind_lab', raising=False)
  paths = [str(folder), str(_HERE.parent)]
  if os.environ.get('PYTHONPATH'):
    paths.append(os.environ['PYTHONPATH'])
  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(paths))
  instances.clear()
  compiled.clear()


def version():
  return '1.0'


def runfiles_path():
  return ''


def set_runfiles_path(path):
  del path


class Lab:
  """The engine's class.

  Attributes (of the fake alone):
    resets: seeds of the episodes.
    actions: what the engine read of each action, seven ints.
  """

  def __init__(
    self, level, observations, config=None, renderer='software', level_cache=None
  ):
    _require(level, str, 'level')
    _require(observations, list, 'observations')
    config = {} if config is None else _require(config, dict, 'config')
    if renderer not in ('software', 'hardware'):
      raise RuntimeError(f'Failed to set renderer, actual "{renderer}"!')
    for key, value in config.items():
      _require(key, str, 'key')
      _require(value, str, 'value')
      self._check_setting(key, value)
    self._level = level
    self._name = level.rsplit('/', 1)[-1]
    self._config = dict(config)
    self._cache = level_cache
    self._temp = tempfile.mkdtemp(prefix='dmlab_temp_folder_')
    try:
      self._init(observations)
    except BaseException:
      shutil.rmtree(self._temp)
      raise
    self._names = list(observations)
    self._width = int(config.get('width', '320'))
    self._height = int(config.get('height', '240'))
    seconds = float(config.get('episodeLengthSeconds', '2'))
    self._frames_per_episode = round(seconds * _FPS)
    self._frames = 0
    self._status = 'uninitialised'
    self._history = hashlib.md5(f'{level} {sorted(config.items())}'.encode())
    self._calls = {'reset': 0, 'step': 0}
    self.resets: list[int] = []
    self.actions: list[tuple[int, ...]] = []
    instances.append(self)
    if config.get('logLevel', 'INFO') == 'INFO':
      os.write(1, f'I level.lua:1] init {level}\n'.encode())

  def _check_setting(self, key, value):
    wrong = RuntimeError(f"Failed to apply setting '{key} = {value}'")
    if key not in _SETTINGS:
      raise wrong
    if key in _NUMBERS:
      try:
        number = float(value)
      except ValueError:
        raise wrong from None
      if key in ('width', 'height') and (number <= 0 or number % 4):
        raise wrong
      if key == 'mixerSeed' and (number < 0 or number >= 2**32 or not value.isdigit()):
        raise wrong
    if key == 'logLevel' and value not in ('NEVER', 'ERROR', 'WARN', 'INFO'):
      raise wrong

  def _init(self, observations):
    known = _LEVELS.match(self._level) or _FAULT.match(self._level)
    if self._level.startswith(dmlab30.PREFIX):
      known = dmlab30.find(self._name)
    if not known and self._level not in (
      'fake/plain',
      'fake/language',
      'fake/maps',
      'fake/no_instr',
    ):
      raise RuntimeError(
        f'Failed to init environment - "Level not found: {self._level}"'
      )
    held_out = self._level.startswith(dmlab30.PREFIX) and self._name.endswith('_test')
    if held_out and self._config.get('allowHoldOutLevels') != 'true':
      raise RuntimeError(
        'Failed to init environment - "This level must only be used during '
        'evaluation. If you really want to use this level, add the setting '
        '"allowHoldOutLevels" = "true" explicitly"'
      )
    offered = {spec['name'] for spec in self.observation_spec()}
    for name in observations:
      if name not in offered:
        raise ValueError(f"Unknown observation '{name}'.")

  def observation_spec(self):
    w, h = (int(self._config.get(k, d)) for k, d in (('width', 320), ('height', 240)))
    found = [
      (f'{order}{kind}', np.uint8, (h, w, n) if kind else (n, h, w))
      for order, n in (('RGB', 3), ('RGBD', 4), ('BGR', 3), ('BGRD', 4))
      for kind in ('', '_INTERLEAVED')
    ]
    found += [
      (name, np.float64, (n,))
      for name, n in (
        ('MAP_FRAME_NUMBER', 1),
        ('FRAMES_REMAINING_AT_60', 1),
        ('VEL.TRANS', 3),
        ('VEL.ROT', 3),
        ('TEAM.SCORE', 2),
      )
    ]
    if self._level.startswith('contributed/') or (
      self._level.startswith('fake/') and self._name != 'no_instr'
    ):
      found.append(('INSTR', str, ()))
    return [{'name': n, 'dtype': d, 'shape': s} for n, d, s in found]

  def action_spec(self):
    return [{'name': n, 'min': low, 'max': high} for n, low, high in _ACTIONS]

  def fps(self):
    return _FPS

  def events(self):
    return []

  def num_steps(self):
    return self._frames

  def is_running(self):
    return self._status == 'running'

  def reset(self, episode=-1, seed=None):
    del episode
    self._check_open()
    if seed is None:
      seed = int.from_bytes(os.urandom(3), 'little')
    if not isinstance(seed, int):
      raise ValueError(f"'seed' must be int or None, was '{type(seed).__name__}'.")
    if not 0 <= seed < 2**31:
      raise ValueError(f"'seed' must be below 2^31, was {seed}")
    self._status = 'terminated'
    self._fault('reset')
    if self._name in _PICTURES and not self._config.get('datasetPath'):
      raise RuntimeError(
        'Failed to start environment - "Follow instructions to download datasets '
        'here: data/brady_konkle_oliva2008/README.md"'
      )
    self.resets.append(seed)
    if _COMPILED.match(self._name):
      self._load_map(seed)
    self._history.update(b'reset %d' % seed)
    self._frames = 0
    self._status = 'running'
    return True

  def _load_map(self, seed):
    mixer = self._config.get('mixerSeed', '0')
    text = f'{self._level} {mixer} {seed}'.encode()
    key = f'lt_procedural_aas_{hashlib.md5(text).hexdigest()}'
    pk3 = os.path.join(self._temp, 'lt_procedural.pk3')
    if os.path.exists(pk3):
      os.remove(pk3)
    if self._cache is not None and self._cache.fetch(key, pk3):
      try:
        with zipfile.ZipFile(pk3) as archive:
          sound = archive.read('maps/lt_procedural.bsp')[: len(text)] == text
      except (OSError, KeyError, zipfile.BadZipFile):
        sound = False
      if not sound:
        _exit("Couldn't load maps/lt_procedural.bsp")
      return
    compiled.append(key)
    with zipfile.ZipFile(pk3, 'w') as archive:
      archive.writestr('maps/lt_procedural.bsp', text + os.urandom(1000))
    if self._cache is not None:
      self._cache.write(key, pk3)

  def step(self, action, num_steps=1):
    self._check_open()
    _require(action, np.ndarray, 'action')
    if self._status != 'running':
      raise RuntimeError('Environment in wrong status to advance.')
    if action.ndim != 1 or action.shape[0] != len(_ACTIONS):
      raise ValueError(f'action must have shape ({len(_ACTIONS)})')
    if action.dtype != np.intc:
      raise ValueError('action must have dtype np.intc')
    self._fault('step')
    # What lies in memory after the first element, whatever the strides say.
    count = len(_ACTIONS)
    read = (ctypes.c_int * count).from_address(action.ctypes.data)
    self.actions.append(tuple(read))
    frames = min(num_steps, self._frames_per_episode - self._frames)
    self._frames += frames
    self._history.update(repr((self.actions[-1], frames)).encode())
    if self._frames == self._frames_per_episode:
      self._status = 'terminated'
    return float(frames + 1000 * self.actions[-1][_FIRE])

  def observations(self):
    self._check_open()
    if self._status != 'running':
      raise RuntimeError('Environment in wrong status for call to observations()')
    found = {}
    for spec in self.observation_spec():
      if spec['name'] == 'INSTR':
        value = self._instruction()
      else:
        size = int(np.prod(spec['shape'])) * np.dtype(spec['dtype']).itemsize
        noise = hashlib.shake_128(self._history.digest()).digest(size)
        value = np.frombuffer(noise, np.uint8).copy()
        value = value.view(spec['dtype']).reshape(spec['shape'])
      found[spec['name']] = value
    return {name: found[name] for name in self._names}

  def _instruction(self):
    if not self._name.startswith('language'):
      return ''
    return f'Pick the {COLOURS[self._frames // INSTRUCTION_FRAMES % 3]} object'

  def close(self):
    if self._status == 'closed':
      return False
    self._status = 'closed'
    shutil.rmtree(self._temp, ignore_errors=True)
    return True

  def _check_open(self):
    if self._status == 'closed':
      if os.environ.get('FAKE_DMLAB_SEGFAULT'):
        ctypes.string_at(0)
      raise AssertionError('used after close(): the engine may segfault here')

  def _fault(self, call):
    self._calls[call] += 1
    found = _FAULT.match(self._level)
    if not found:
      return
    kind, at, number, seconds = found.groups()
    if seconds and call == 'reset':
      time.sleep(float(seconds))
    if at != call or self._calls[call] != int(number):
      return
    if kind == 'abort':
      os.write(2, b'PANIC: unprotected error in call to Lua API\n')
      os.abort()
    if kind == 'exit':
      _exit("Couldn't load maps/missing.bsp")
    if kind == 'segfault':
      ctypes.string_at(0)
    if kind == 'hang':
      while True:
        time.sleep(60)
    raise RuntimeError(f'Failed to {call} environment - "error in a level script"')


def _exit(words):
  os.write(2, f'{words}\n'.encode())
  os._exit(1)


def _require(value, kind, name):
  if not isinstance(value, kind):
    raise TypeError(f'{name} must be {kind.__name__}, not {type(value).__name__}')
  return value
