"""By what unrolls travel between processes here: both sets run the same tests."""

import importlib.util

HAVE_REVERB = importlib.util.find_spec('reverb') is not None
BETWEEN_PROCESSES = 'reverb' if HAVE_REVERB else 'tcp'
ALL_BETWEEN_PROCESSES = ['tcp', *(['reverb'] if HAVE_REVERB else [])]
ALL = ['local', *ALL_BETWEEN_PROCESSES]
