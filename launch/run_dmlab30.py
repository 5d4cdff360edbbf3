"""Trains one agent on many levels: `python -m launch.run_dmlab30 --num_actors=4`.

By default on the 30 levels of DMLab-30, which needs DeepMind Lab. `--suite=doom`
trains on the scenarios of ViZDoom instead, which pip installs.
"""

import sys

from absl import app, flags

from launch import training

# The named configuration of each suite.
_CONFIGS = {'dmlab': 'dmlab30', 'doom': 'doom'}

_SUITE = flags.DEFINE_enum('suite', 'dmlab', sorted(_CONFIGS), 'Family of levels.')
_CONFIG = flags.DEFINE_string(
  'config', None, 'Named configuration; default: dmlab30 or doom, by --suite.'
)
_LEVELS = flags.DEFINE_list(
  'levels', None, 'Levels, or dmlab30 for all; default: those of the configuration.'
)
_SKIP = flags.DEFINE_bool(
  'skip_unavailable_levels', None, 'Leave out levels that lack their data.'
)
_TORSO = flags.DEFINE_string('network', None, 'Torso: shallow, deep, ...')
_DATASET = flags.DEFINE_string(
  'dataset_path', None, 'Folder of the pictures that two psychlab levels need.'
)
_CACHE = flags.DEFINE_string('level_cache', None, 'Folder of compiled maps.')


def main(argv: list[str]) -> int:
  name = _CONFIG.value or _CONFIGS[_SUITE.value]
  return training.main(
    argv,
    name,
    {
      'environment.suite': _SUITE.value if flags.FLAGS['suite'].present else None,
      'environment.levels': ','.join(_LEVELS.value) if _LEVELS.value else None,
      'dmlab.skip_unavailable_levels': _SKIP.value,
      'dmlab.dataset_path': _DATASET.value,
      'dmlab.level_cache': _CACHE.value,
      'network.torso': _TORSO.value,
    },
  )


if __name__ == '__main__':
  app.run(lambda argv: sys.exit(main(argv)))
