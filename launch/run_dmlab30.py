#!/usr/bin/env python3
"""`impala dmlab30` by path, or as `python -m launch.run_dmlab30`."""

import pathlib
import sys

if __name__ == '__main__':
  root = str(pathlib.Path(__file__).resolve().parents[1])
  sys.path.insert(0, root)
  from impala_jax.commands import main

  sys.exit(main.script('dmlab30', root, __spec__))
