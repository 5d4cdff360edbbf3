"""A configuration by name, or from a file such as a run's `config.json`."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from impala_jax import config as config_lib
from impala_jax import configs


def load(given: str) -> config_lib.Config:
  """The configuration that `--config` names.

  Args:
    given: a named configuration, or the path of a JSON file: settings by section, as
      `config.to_dict` gives them, bare or under the key `config`. What the file leaves
      out has its default.

  Raises:
    config.ConfigError: there is none of this name, or all that is wrong in the file.
  """
  if not given.endswith('.json') and os.sep not in given:
    return configs.get(given)
  try:
    data = json.loads(pathlib.Path(given).read_bytes())
  except OSError as e:
    raise config_lib.ConfigError(f'--config={given}: {e.strerror}') from e
  except (ValueError, RecursionError) as e:
    raise config_lib.ConfigError(f'--config={given}: is no JSON: {e}') from e
  if isinstance(data, dict) and 'config' in data:
    data = data['config']
  if not isinstance(data, dict):
    raise config_lib.ConfigError(
      f'--config={given}: holds no settings: must be an object of sections'
    )
  try:
    # The way of `--set`, which judges every name and type.
    return config_lib.override(config_lib.Config(), list(_settings(data)))
  except config_lib.ConfigError as e:
    lines = str(e).splitlines()
    raise config_lib.ConfigError(
      '\n'.join(f'--config={given}: {line}' for line in lines)
    ) from e


def _settings(data: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
  for key, value in data.items():
    if isinstance(value, dict):
      yield from _settings(value, f'{prefix}{key}.')
    elif isinstance(value, list):
      yield f'{prefix}{key}=' + ','.join(map(str, value))
    else:
      # JSON's words: true, null and numbers as they stand in the file.
      text = value if isinstance(value, str) else json.dumps(value)
      yield f'{prefix}{key}={text}'
