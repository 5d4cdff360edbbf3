"""By what unrolls travel between processes here: both sets run the same tests."""

import importlib.util

HAVE_REVERB = importlib.util.find_spec('reverb') is not None
BETWEEN_PROCESSES = 'reverb' if HAVE_REVERB else 'tcp'
ALL = ['local', 'tcp', *(['reverb'] if HAVE_REVERB else [])]
