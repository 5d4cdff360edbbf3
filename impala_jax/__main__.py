"""`python -m impala_jax ...` is the console command `impala ...`."""

import sys

if __name__ == '__main__':
  from impala_jax.commands import main

  sys.exit(main.main())
