"""Where a run's processes come from: this machine, Slurm or Kubernetes."""

import dataclasses
from collections.abc import Sequence

from impala_jax import config as config_lib
from impala_jax import settings as settings_lib
from impala_jax.launching.backends import backend
from impala_jax.launching.backends import foreground as foreground_lib
from impala_jax.launching.backends import kubernetes as kubernetes_lib
from impala_jax.launching.backends import local as local_lib
from impala_jax.launching.backends import slurm as slurm_lib

_BACKENDS: dict[str, type[backend.Backend]] = {
  b.name: b
  for b in (
    foreground_lib.Foreground,
    local_lib.Local,
    slurm_lib.Slurm,
    kubernetes_lib.Kubernetes,
  )
}
LAUNCHERS = tuple(_BACKENDS)


@dataclasses.dataclass(frozen=True)
class _AllOptions:
  foreground: backend.Options = backend.Options()
  local: backend.Options = backend.Options()
  slurm: slurm_lib.Options = slurm_lib.Options()
  kubernetes: kubernetes_lib.Options = kubernetes_lib.Options()


def get(name: str, settings: Sequence[str] = ()) -> backend.Backend:
  """The backend of that name.

  Args:
    name: one of `LAUNCHERS`.
    settings: `<launcher>.<field>=<value>`, of this launcher.

  Raises:
    config_lib.ConfigError: lists every unknown field and impossible value.
  """
  if name not in _BACKENDS:
    raise config_lib.ConfigError(
      f'launcher is {name!r}: must be one of {", ".join(LAUNCHERS)}'
    )
  nest = settings_lib.override(_AllOptions(), settings)
  problems = [
    f'{s}: has no effect with the launcher {name}'
    for s in settings
    if not s.strip().startswith(f'{name}.')
  ]
  options = getattr(nest, name)
  problems += settings_lib.problems((options, f'{name}.'))
  if problems:
    raise config_lib.ConfigError('\n'.join(problems))
  return _BACKENDS[name](options)


def of_launch(launch: backend.Launch) -> backend.Backend:
  """The backend that a run was submitted to, with the same options."""
  if launch.launcher not in _BACKENDS:
    raise backend.BackendError(f'launch.json names the launcher {launch.launcher!r}')
  kind = type(getattr(_AllOptions(), launch.launcher))
  try:
    return _BACKENDS[launch.launcher](kind(**launch.options))
  except TypeError as e:
    raise backend.BackendError(f'launch.json has other options: {e}') from e
