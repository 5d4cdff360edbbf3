"""Records as tests want them."""

from typing import Any

from impala_jax.reporting import record


def make(**figures: Any) -> record.Record:
  """Zeros and nothing, but for what is given."""
  empty: dict[type, Any] = {int: 0, float: 0.0, record.Numbers: {}}
  fields = record.Record.__annotations__
  plain = {name: empty.get(hint.__origin__) for name, hint in fields.items()}
  return record.Record(**{**plain, **figures})
