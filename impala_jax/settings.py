"""What a setting is: a field of a frozen dataclass that says its meaning and its range.

A section is such a dataclass; its fields are settings, or sections again. The checks,
`section.field=value` texts, JSON and lists for people all follow from the fields.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import numbers
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar


class ConfigError(ValueError):
  """One or more impossible settings; the text lists all of them."""


class Section(Protocol):
  """A frozen dataclass of settings and sections, all with defaults.

  Where it has a method `relations`, that tells how its fields do not fit each other:
  pairs of a field and what is allowed.
  """

  __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


_SHOWN = 200  # Characters of a value in an error.
T = TypeVar('T')
S = TypeVar('S', bound=Section)


@dataclasses.dataclass(frozen=True)
class Constraint:
  """What a setting must be.

  Attributes:
    allowed: what follows a wrong value: 'must be at least 1'.
    holds: whether a value, which is of the field's type, is right.
  """

  allowed: str
  holds: Callable[[Any], bool]


def at_least(least: float, why: str = '') -> Constraint:
  return Constraint(f'must be at least {_amount(least, why)}', lambda x: x >= least)


def at_most(most: float, why: str = '') -> Constraint:
  return Constraint(f'must be at most {_amount(most, why)}', lambda x: x <= most)


def below(end: float, why: str = '') -> Constraint:
  return Constraint(f'must be below {_amount(end, why)}', lambda x: x < end)


def within(least: float, most: float) -> Constraint:
  text = f'must lie in [{_amount(least)}, {_amount(most)}]'
  return Constraint(text, lambda x: least <= x <= most)


def multiple_of(divisor: int) -> Constraint:
  text = f'must be a positive multiple of {divisor}'
  return Constraint(text, lambda x: x > 0 and x % divisor == 0)


def one_of(names: Iterable[str]) -> Constraint:
  known = tuple(names)
  return Constraint(f'must be one of {", ".join(known)}', lambda x: x in known)


# Of a float whose infinity means something: all others are finite.
MAY_BE_INFINITE = Constraint('may be inf', lambda x: True)
NOT_NEGATIVE = Constraint('must not be negative', lambda x: x >= 0)
POSITIVE = Constraint('must be positive', lambda x: x > 0)
DISTINCT = Constraint(
  'must name each once, by names that are not empty',
  lambda x: len(set(x)) == len(x) and '' not in x,
)
# What every number must be, or arithmetic with it would fail.
_REPRESENTABLE = Constraint(
  'must lie between -2^63 and 2^63',
  lambda x: not isinstance(x, numbers.Integral) or abs(int(x)) < 2**63,
)
# Of all texts: they go into scripts, logs and file names.
_PLAIN = Constraint(
  'must hold no control characters',
  lambda x: not any(map(has_control_characters, _texts(x))),
)
NOT_EMPTY = Constraint('must not be empty', lambda x: len(x) > 0)


def shown(value: Any) -> str:
  """`repr` of what a user gave, for errors; the middle of a long one is left out."""
  text = repr(value)
  return text if len(text) <= _SHOWN else f'{text[:150]}...{text[-40:]}'


def has_control_characters(text: str) -> bool:
  """Such as the end of a line, which no script and no command's answer can hold."""
  return any(unicodedata.category(c) == 'Cc' for c in text)


def _texts(value: Any) -> Iterator[str]:
  items = value if isinstance(value, tuple) else (value,)
  return (item for item in items if isinstance(item, str))


def _amount(number: float, why: str = '') -> str:
  text = '2^31' if number == 2**31 else f'{number:,}'
  return f'{text}, {why}' if why else text


@dataclasses.dataclass(frozen=True)
class Kept:
  """What of a setting must stay as it was when a run goes on.

  Attributes:
    allowed: what follows a change: 'cannot change'.
    of: the part of a value that must be the same.
  """

  allowed: str
  of: Callable[[Any], Any]


KEPT = Kept('cannot change in a run that goes on', lambda x: x)
KEPT_ZERO_OR_NOT = Kept('cannot become 0, or cease to be, in a run that goes on', bool)


@dataclasses.dataclass(frozen=True)
class _Setting:
  meaning: str
  constraints: tuple[Constraint, ...]
  kept: Kept | None


def setting(
  default: T, meaning: str, *constraints: Constraint, kept: Kept | None = None
) -> T:
  """A field of a section.

  Args:
    default: bool, int, float, str, or a tuple of one of these.
    meaning: for people, in whole sentences.
    *constraints: must all hold.
    kept: what must stay as it was when a run goes on from a checkpoint, because the
      network or the optimiser's state would be others; None where all may change.
  """
  metadata = {'setting': _Setting(meaning, constraints, kept)}
  return dataclasses.field(default=default, metadata=metadata)


def unlisted(default: T) -> T:
  """A field of a section that is no setting."""
  return dataclasses.field(default=default, metadata={'setting': None})


class SettingInfo(NamedTuple):
  """What there is to know of a setting."""

  name: str  # As `--set` takes it: section.field.
  type: str  # 'int', 'list of str', ...
  default: Any
  allowed: str  # Empty where the type says all.
  meaning: str
  kept: str = ''  # What must not change in a run that goes on; empty where all may.


@functools.cache
def kinds(section: type[Section]) -> dict[str, Any]:
  """The type of each setting and section in `section`, by field."""
  hints = typing.get_type_hints(section)
  return {
    f.name: hints[f.name]
    for f in dataclasses.fields(section)
    if f.metadata.get('setting', True)
  }


@functools.cache
def check_class(section: type[Section]) -> None:
  """Judges the settings that a suite brings.

  Raises:
    TypeError: `section` is no frozen dataclass, or one of its fields is no `setting`,
      or of a type that no text can be read as.
  """
  if not (
    isinstance(section, type)
    and dataclasses.is_dataclass(section)
    and section.__dataclass_params__.frozen  # type: ignore[attr-defined]
  ):
    raise TypeError(f'settings are {section!r}: must be a frozen dataclass')
  hints = typing.get_type_hints(section)
  for field in dataclasses.fields(section):
    kind, name = hints[field.name], f'{section.__qualname__}.{field.name}'
    if not isinstance(field.metadata.get('setting'), _Setting):
      raise TypeError(f'{name} must be made by `settings.setting`')
    if (_item(kind) or kind) not in _WORDS:
      raise TypeError(
        f'{name} is of type {kind}: must be bool, int, float, str, or tuple[..., ...] '
        'of one of these'
      )


def describe(section: type[Section], prefix: str = '') -> Iterator[SettingInfo]:
  """All settings of `section` and of the sections in it, in their order."""
  default = section()
  for field in _fields(section):
    kind, name = kinds(section)[field.name], prefix + field.name
    if dataclasses.is_dataclass(kind):
      yield from describe(typing.cast(type[Section], kind), f'{name}.')
    else:
      said: _Setting = field.metadata['setting']
      allowed = ' and '.join(c.allowed for c in said.constraints)
      kept = said.kept.allowed if said.kept else ''
      value = getattr(default, field.name)
      yield SettingInfo(name, _kind_name(kind), value, allowed, said.meaning, kept)


def wrong_types(section: Section, prefix: str = '') -> list[str]:
  """Texts `prefix + field is value: what it must be`, of values not of their types."""
  found = []
  for field, kind in kinds(type(section)).items():
    value, name = getattr(section, field), prefix + field
    if not dataclasses.is_dataclass(kind):
      if not _is_of(value, kind):
        found.append(f'{name} is {shown(value)}: {_must_be(kind)}')
    elif isinstance(value, typing.cast(type[Section], kind)):
      found += wrong_types(value, f'{name}.')
    else:
      found.append(f'{name} is {value!r}: must be a {_kind_name(kind)}')
  return found


def out_of_range(section: Section, prefix: str = '') -> list[str]:
  """Texts `prefix + field is value: what is allowed`, where no type is wrong.

  Of fields by themselves, and of those that do not fit each other.
  """
  found = []
  for field in _fields(section):
    value, name = getattr(section, field.name), prefix + field.name
    if dataclasses.is_dataclass(value):
      found += out_of_range(typing.cast(Section, value), f'{name}.')
      continue
    constraints = (_PLAIN, *field.metadata['setting'].constraints, _REPRESENTABLE)
    if MAY_BE_INFINITE not in constraints and not _finite(value):
      found.append(f'{name} is {value!r}: must be finite')
      continue
    wrong = [c for c in constraints if not c.holds(value)]
    found += [f'{name} is {shown(value)}: {c.allowed}' for c in wrong[:1]]
  for field_name, allowed in getattr(section, 'relations', tuple)():
    value = functools.reduce(getattr, field_name.split('.'), section)
    found.append(f'{prefix}{field_name} is {shown(value)}: {allowed}')
  return found


def problems(*sections: tuple[Section, str]) -> list[str]:
  """All that is wrong with some sections, each given with its prefix."""
  wrong = [text for part in sections for text in wrong_types(*part)]
  return wrong or [text for part in sections for text in out_of_range(*part)]


def changed(was: Any, section: Section, prefix: str = '') -> list[str]:
  """Texts `prefix + field was value, would be value: why not`, of what must be kept.

  Args:
    was: the section as JSON, of a run that is to go on; defaults for what lacks.
    section: what it would be.
    prefix: names the section; empty or with a dot at its end.
  """
  found = []
  was, default = was if isinstance(was, dict) else {}, type(section)()
  for field in _fields(section):
    name, value = prefix + field.name, getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      part = typing.cast(Section, value)
      found += changed(was.get(field.name), part, f'{name}.')
      continue
    kept: Kept | None = field.metadata['setting'].kept
    before = was.get(field.name, getattr(default, field.name))
    before = tuple(before) if isinstance(before, list) else before
    if kept is not None and kept.of(before) != kept.of(value):
      texts = (
        ','.join(x) if isinstance(x, tuple) else repr(x) for x in (before, value)
      )
      found.append('{} was {}, would be {}: {}'.format(name, *texts, kept.allowed))
  return found


def check(section: Section, prefix: str = '') -> None:
  """Raises `ConfigError` that lists all that is wrong with `section`."""
  raise_problems(problems((section, prefix)))


def raise_problems(found: Sequence[str]) -> None:
  """Raises `ConfigError` of the problems in `found`, if there are any."""
  if found:
    raise ConfigError(f'{len(found)} impossible setting(s):\n  ' + '\n  '.join(found))


def override(section: S, texts: Iterable[str]) -> S:
  """Applies texts `field=value`, where `field` may be `section.field`.

  Raises:
    ConfigError: lists every unknown field and unreadable value.
  """
  found = []
  for text in texts:
    try:
      section = assign(section, *split(text))
    except ConfigError as e:
      found.append(str(e))
  if found:
    raise ConfigError('\n'.join(found))
  return section


def split(text: str) -> tuple[str, str]:
  """Name and value of `section.field=value`. Raises `ConfigError`."""
  name, equals, value = text.partition('=')
  if not equals:
    raise ConfigError(f'{text!r}: write section.field=value')
  return name.strip(), value.strip()


def assign(section: S, name: str, text: str, prefix: str = '') -> S:
  """`section` with another value for one setting.

  Args:
    section: what is changed.
    name: of the setting in it.
    text: the value; items of a list are separated by commas.
    prefix: names the section in errors; empty or with a dot at its end.

  Raises:
    ConfigError: the field is unknown, or the value unreadable.
  """
  field, dot, rest = name.partition('.')
  full = prefix + name
  if field not in kinds(type(section)):
    raise ConfigError(unknown(full, prefix, kinds(type(section))))
  kind, value = kinds(type(section))[field], getattr(section, field)
  if dataclasses.is_dataclass(kind):
    if not dot:
      raise ConfigError(f'{full} is a section: write {full}.field=value')
    value = assign(value, rest, text, f'{prefix}{field}.')
  elif dot:
    raise ConfigError(f'{full}: {prefix}{field} has no fields')
  else:
    value = _parse(text, kind, full)
  return dataclasses.replace(section, **{field: value})


def from_dict(cls: type[S], data: Any, prefix: str, found: list[str]) -> S:
  """A section from JSON, as `dataclasses.asdict` makes it; defaults for what lacks.

  Args:
    cls: of the section.
    data: decoded JSON.
    prefix: names the section in errors; empty or with a dot at its end.
    found: what is wrong is added to it, and left out of the result.
  """
  if not isinstance(data, dict):
    name = prefix.removesuffix('.') or 'the configuration'
    found.append(f'{name} is {data!r}: must be a JSON object')
    return cls()
  values: dict[str, Any] = {}
  for field, value in data.items():
    name = prefix + field
    kind = kinds(cls).get(field)
    if kind is None:
      found.append(unknown(name, prefix, kinds(cls)))
    elif dataclasses.is_dataclass(kind):
      values[field] = from_dict(
        typing.cast(type[Section], kind), value, f'{name}.', found
      )
    elif _is_of(value, kind):
      # JSON has no tuples, and writes 1.0 as it likes.
      values[field] = _converted(value, kind)
    else:
      found.append(f'{name} is {value!r}: {_must_be(kind)}')
  return cls(**values)


def unknown(name: str, prefix: str, known: Iterable[str]) -> str:
  """That there is no setting `name`, whose section is `prefix`, with near ones."""
  fields = list(known)
  near = difflib.get_close_matches(name[len(prefix) :].split('.')[0], fields, 3)
  names = ', '.join(prefix + field for field in near or fields)
  return f'unknown setting {name}: ' + (
    f'did you mean {names}?' if near else f'known are {names}'
  )


def _fields(section: Section | type[Section]) -> list[dataclasses.Field[Any]]:
  cls = section if isinstance(section, type) else type(section)
  return [f for f in dataclasses.fields(cls) if f.name in kinds(cls)]


_WORDS: dict[Any, str] = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
}


def _item(kind: Any) -> Any:
  """The type of a list's items; None where `kind` is no list."""
  return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _kind_name(kind: Any) -> str:
  item = _item(kind)
  return f'list of {item.__name__}' if item else str(kind.__name__)


def _finite(value: Any) -> bool:
  if isinstance(value, tuple | list):
    return all(map(_finite, value))
  # A whole number may be too large to be asked.
  real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral)
  return not real or math.isfinite(value)


def _must_be(kind: Any) -> str:
  item = _item(kind)
  return 'must be ' + (f'a list, each {_WORDS[item]}' if item else _WORDS[kind])


def _is_of(value: Any, kind: Any) -> bool:
  item = _item(kind)
  if item:
    return isinstance(value, tuple | list) and all(_is_of(x, item) for x in value)
  if isinstance(value, bool):
    return kind is bool
  return isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))


def _converted(value: Any, kind: Any) -> Any:
  item = _item(kind)
  return tuple(_converted(x, item) for x in value) if item else kind(value)


def _parse(text: str, kind: Any, name: str) -> Any:
  try:
    return _read(text, kind)
  except (KeyError, ValueError, OverflowError):
    more = ' (separated by commas, none of them empty)' if _item(kind) else ''
    raise ConfigError(
      f'{name}={shown(text)}: not a valid {_kind_name(kind)}{more}'
    ) from None


def _read(text: str, kind: Any) -> Any:
  item = _item(kind)
  if item:
    items = [x.strip() for x in text.split(',')] if text.strip() else []
    if '' in items:
      raise ValueError
    return tuple(_read(x, item) for x in items)
  if kind is bool:
    return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
  if kind is int:
    with contextlib.suppress(ValueError):
      return int(text)  # Exactly, however large.
    number = float(text.replace('_', ''))  # 2e6 is a number of frames, too.
    if number != int(number):
      raise ValueError
    return int(number)
  return kind(text)
