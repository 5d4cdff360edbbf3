"""Names as other libraries have them lead to ours: the first hint is the level."""

import pytest

from impala_jax.environments import level_names, procgen, registry
from impala_jax.environments.atari import games
from impala_jax.environments.doom import suite as doom

needs_atari = pytest.mark.skipif(
  bool(registry.missing('atari')), reason='no ale_py here'
)
# As gymnasium and ALE have registered them over the years.
VARIANTS = (
  '{}',
  'ALE/{}-v5',
  '{}-v5',
  '{}-v0',
  '{}-v4',
  '{}NoFrameskip-v0',
  '{}NoFrameskip-v4',
  '{}Deterministic-v0',
  '{}Deterministic-v4',
  '{}-ram-v0',
  '{}-ram-v4',
  'ALE/{}-ram-v5',
  '{}-ramDeterministic-v4',
  '{}-ramNoFrameskip-v0',
  'ale_py:ALE/{}-v5',
  'Atari/{}',
  'gymnasium:{}NoFrameskip-v4',
  '{}NoFrameskip',
  'atari_{}',
  'MinAtar/{}-v1',
  '{}.bin',
)


def camel(game):
  return ''.join(word.capitalize() for word in game.split('_'))


@needs_atari
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_game_in_every_spelling(variant):
  for game in games.games():
    for spelt in (game, camel(game), game.replace('_', '-'), game.upper()):
      name = variant.format(spelt)
      said = games.problem(name)
      assert said is None or said.endswith(f': did you mean {game}?'), name


@needs_atari
@pytest.mark.parametrize(
  ('name', 'hint'),
  [
    ('Ms. Pac-Man', 'did you mean ms_pacman?'),
    ('Q*bert', 'did you mean qbert?'),
    ('PnogNoFrameskip-v4', 'did you mean pong'),
    ("Montezuma's Revenge", 'did you mean montezuma_revenge'),
    ('ALE/Joust-v5', 'joust has no mode for a single player'),
    ('xyzzy', 'known are adventure, '),
    ('-v4', 'known are adventure, '),
    ('', 'known are adventure, '),
  ],
)
def test_other_spellings(name, hint):
  assert hint in games.problem(name)


@pytest.mark.parametrize(
  ('problem', 'name', 'level'),
  [
    (doom.problem, 'VizdoomBasic-v0', 'basic'),
    (doom.problem, 'VizdoomCorridor-v0', 'deadly_corridor'),
    (doom.problem, 'VizdoomDefendCenter-v1', 'defend_the_center'),
    (doom.problem, 'VizdoomHealthGatheringSupreme-v0', 'health_gathering_supreme'),
    (doom.problem, 'my_way_home.cfg', 'my_way_home'),
    (procgen.problem, 'procgen:procgen-coinrun-v0', 'coinrun'),
    (procgen.problem, 'procgen-starpilot-v0', 'starpilot'),
    (procgen.problem, 'CoinRun', 'coinrun'),
  ],
)
def test_of_other_suites(problem, name, level):
  assert f': did you mean {level}' in problem(name)


def test_what_is_like_nothing_has_no_hint():
  assert level_names.near('xyzzy', ['pong', 'breakout']) == []
  assert level_names.near('pong', []) == []
