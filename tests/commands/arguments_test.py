"""What flags take: all that absl's took, and one clear line for what they do not."""

import pytest

from impala_jax.commands import arguments


@pytest.fixture
def parser():
  parser = arguments.Parser(prog='impala try')
  parser.add_argument('run_dir', nargs='?')
  arguments.flag(parser, 'seed', 'Seed.', kind=int, shown='none')
  arguments.flag(parser, 'episodes', 'Episodes.', 100, kind=int, least=1)
  arguments.flag(parser, 'view', 'View.', 'auto', choices=('auto', 'live'))
  arguments.flag(parser, 'set', 'Settings.', many=True, shown='none')
  arguments.flag(parser, 'game', 'Games.', kind=arguments.names, shown='none')
  arguments.switch(parser, 'resume', 'Resume.')
  arguments.switch(parser, 'skip', 'Skip.', None, shown='as configured')
  return parser


def parse(parser, *argv):
  return arguments.parse(parser, argv)


def test_defaults(parser):
  args = parse(parser)
  assert (args.seed, args.episodes, args.view, args.set) == (None, 100, 'auto', [])
  assert (args.game, args.resume, args.skip, args.run_dir) == (None, False, None, None)


def test_values_by_equals_sign_or_space(parser):
  args = parse(parser, '--seed=3', '--episodes', '7', '--view=live', '--seed=-4')
  assert (args.seed, args.episodes, args.view) == (-4, 7, 'live')  # The last one wins.
  assert parse(parser, '--game=pong, breakout').game == ['pong', 'breakout']
  # A number below zero is none of our flags.
  assert parse(parser, '-1', '--seed', '-5').run_dir == '-1'


def test_repeated(parser):
  args = parse(parser, '--set', 'a.b=1', '--set=c.d=x,y')
  assert args.set == ['a.b=1', 'c.d=x,y']
  assert parse(parser).set == []  # The default is not what was added to.


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('--resume', True),
    ('--noresume', False),
    ('--resume=true', True),
    ('--resume=True', True),
    ('--resume=1', True),
    ('--resume=false', False),
    ('--resume=0', False),
  ],
)
def test_booleans(parser, text, value):
  assert parse(parser, text).resume is value
  assert parse(parser, '--resume', text).resume is value
  assert parse(parser, text.replace('resume', 'skip')).skip is value


def test_a_boolean_takes_no_word_that_follows(parser):
  args = parse(parser, '--resume', 'runs/1', '--seed=2')
  assert (args.resume, args.run_dir, args.seed) == (True, 'runs/1', 2)


def test_what_was_typed_is_kept(parser):
  assert parse(parser, '--resume=no', '--set', 'a b').typed == "--resume=no --set 'a b'"


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--episods=5'], "unknown flag 'episods': did you mean --episodes?"),
    (['--xyz'], "unknown flag 'xyz': impala try --help lists all"),
    (['--episode=5'], "unknown flag 'episode': did you mean --episodes?"),
    (['--episodes=many'], '--episodes=many: must be a whole number'),
    (['--episodes=1.5'], '--episodes=1.5: must be a whole number'),
    (['--episodes=0'], '--episodes=0: must be at least 1'),
    (['--view=big'], '--view=big: must be one of auto, live'),
    (['--resume=perhaps'], '--resume=perhaps: must be true or false'),
    (['--noresume=1'], 'resume'),
    (['--seed'], '--seed: expected one argument'),
    (['runs/1', 'more'], "unknown arguments ['more']: flags begin with --"),
  ],
)
def test_mistakes(parser, argv, words):
  with pytest.raises(arguments.Mistake) as e:
    parse(parser, *argv)
  assert words in str(e.value)
  assert '\n' not in str(e.value)


def test_help_tells_each_default(parser, capsys):
  with pytest.raises(SystemExit) as e:
    parse(parser, '--help')
  assert e.value.code == 0
  text = ' '.join(capsys.readouterr().out.split())
  for words in (
    '--seed N Seed. Default: none.',
    '--episodes N Episodes. Default: 100.',
    '--view {auto,live} View. Default: auto.',
    '--resume, --noresume Resume. Default: off.',
    '--skip, --noskip Skip. Default: as configured.',
  ):
    assert words in text
