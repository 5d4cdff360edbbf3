"""What is printed ends no run."""

import io
import sys


def replace_unprintable() -> None:
  """From now on what this terminal's or log's encoding lacks is printed as `?`."""
  if isinstance(sys.stdout, io.TextIOWrapper):  # A notebook's is none.
    sys.stdout.reconfigure(errors='replace')
