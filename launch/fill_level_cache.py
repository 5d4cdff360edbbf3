#!/usr/bin/env python3
"""`impala fill_level_cache` by path, or as `python -m launch.fill_level_cache`."""

import pathlib
import sys

if __name__ == '__main__':
  root = str(pathlib.Path(__file__).resolve().parents[1])
  sys.path.insert(0, root)
  from impala_jax.commands import main

  sys.exit(main.script('fill_level_cache', root, __spec__))
