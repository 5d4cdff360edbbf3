"""What `import deepmind_lab` finds where tests put this folder on the path."""

from tests.fake_deepmind_lab import (
  Lab,
  runfiles_path,
  set_runfiles_path,
  version,
)

__all__ = ['Lab', 'runfiles_path', 'set_runfiles_path', 'version']
