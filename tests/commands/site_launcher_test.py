"""Which launcher a site has chosen: variables, the user's file, the system's."""

import pytest

from impala_jax import config as config_lib
from impala_jax.commands import site_launcher


@pytest.fixture(autouse=True)
def site(tmp_path, monkeypatch):
  """Folders of the test's own; returns a function that writes a file there."""
  for name in ('IMPALA_LAUNCHER', 'IMPALA_LAUNCHER_SET'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path / 'user'))
  monkeypatch.setenv('XDG_CONFIG_DIRS', str(tmp_path / 'system'))

  def write(whose, text):
    path = tmp_path / whose / 'impala_jax' / 'launcher.toml'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

  return write


def test_where_it_looks(tmp_path, monkeypatch):
  user, system, last = site_launcher.files()
  assert user == tmp_path / 'user' / 'impala_jax' / 'launcher.toml'
  assert system == tmp_path / 'system' / 'impala_jax' / 'launcher.toml'
  assert str(last) == '/etc/impala_jax/launcher.toml'
  monkeypatch.delenv('XDG_CONFIG_HOME')
  monkeypatch.delenv('XDG_CONFIG_DIRS')
  monkeypatch.setenv('HOME', '/home/me')
  found = [str(path) for path in site_launcher.files()]
  assert found[0] == '/home/me/.config/impala_jax/launcher.toml'
  assert found[1] == '/etc/xdg/impala_jax/launcher.toml'


def test_nothing_is_chosen():
  choice = site_launcher.choose()
  assert choice == (site_launcher.FOREGROUND, 'nothing else is chosen', ())


def test_user_over_system_and_variable_over_both(site, monkeypatch):
  system = site('system', 'launcher = "slurm"\n')
  assert site_launcher.choose()[:2] == ('slurm', f'by {system}')
  user = site('user', 'launcher = "kubernetes"\n')
  assert site_launcher.choose()[:2] == ('kubernetes', f'by {user}')
  monkeypatch.setenv('IMPALA_LAUNCHER', 'local')
  assert site_launcher.choose().launcher == 'local'
  assert 'IMPALA_LAUNCHER' in site_launcher.choose().reason
  monkeypatch.setenv('IMPALA_LAUNCHER', 'foreground')
  assert site_launcher.choose().launcher == site_launcher.FOREGROUND
  assert site_launcher.choose('slurm')[:2] == ('slurm', 'by --launcher')
  assert site_launcher.choose('foreground').launcher == site_launcher.FOREGROUND


def test_settings_are_merged_one_by_one(site, monkeypatch):
  site(
    'system',
    'launcher = "slurm"\n[slurm]\npartition = "cpu"\nlearner_gpus = 1\n'
    'extra = "--comment=a b"\n[kubernetes]\nimage = "x"\n',
  )
  site('user', '[slurm]\nlearner_gpus = 4\n')
  monkeypatch.setenv('IMPALA_LAUNCHER_SET', "slurm.qos=high slurm.setup='source a'")
  launcher, _, settings = site_launcher.choose()
  assert launcher == 'slurm'
  # The last one of a field wins, and those of other launchers are none of its.
  assert dict(s.split('=', 1) for s in settings) == {
    'slurm.partition': 'cpu',
    'slurm.learner_gpus': '4',
    'slurm.extra': '--comment=a b',
    'slurm.qos': 'high',
    'slurm.setup': 'source a',
  }
  # They are the site's also where the launcher is named.
  assert site_launcher.choose('slurm').settings == settings
  assert site_launcher.choose('kubernetes').settings == ('kubernetes.image=x',)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    (
      'launcher = "slrum"',
      "launcher is 'slrum': must be one of foreground, local, slurm",
    ),
    ('launcher = 3', 'launcher is 3'),
    ('launcher slurm', 'is no TOML'),
    ('[slrum]\npartition = "cpu"', 'slrum is unknown'),
    ('partition = "cpu"', 'partition is unknown'),
    ('[slurm]\npartition = ["a"]', "slurm.partition is ['a']: must be a text"),
  ],
)
def test_mistakes_name_the_file(site, text, words):
  path = site('user', text)
  with pytest.raises(config_lib.ConfigError) as e:
    site_launcher.choose()
  assert words in str(e.value)
  assert str(path) in str(e.value)
  # Who says where to run is not held up by it.
  assert site_launcher.choose('foreground').launcher == site_launcher.FOREGROUND


def test_mistakes_in_variables(monkeypatch):
  monkeypatch.setenv('IMPALA_LAUNCHER', 'slrum')
  with pytest.raises(config_lib.ConfigError, match="IMPALA_LAUNCHER is 'slrum'"):
    site_launcher.choose()
  monkeypatch.setenv('IMPALA_LAUNCHER', 'slurm')
  monkeypatch.setenv('IMPALA_LAUNCHER_SET', "slurm.setup='open")
  with pytest.raises(config_lib.ConfigError, match='IMPALA_LAUNCHER_SET'):
    site_launcher.choose()
