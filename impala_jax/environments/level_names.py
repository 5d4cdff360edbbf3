"""Which level is meant by a name that is none: misspelt, or as other libraries have it.

`PongNoFrameskip-v4`, `ALE/Pong-v5`, `Pong-ramDeterministic-v0`, `VizdoomBasic-v0`,
`procgen:procgen-coinrun-v0`: libraries decorate the names of games, and write them as
`SpaceInvaders`.
"""

import difflib
import re
from collections.abc import Iterable

_DECORATIONS = (
  r'^.*[/:](?=.)',  # A package or a namespace.
  r'\.(bin|rom|a26|wad|cfg)$',
  r'[-_ ]?v\d+$',
  r'[-_ ]?(no[-_ ]?frame[-_ ]?skip|deterministic)$',
  r'[-_ ]?ram$',
  r'^(atari(2600)?|ale|gym|vizdoom|doom|procgen|dmlab(_?30)?)[-_ ]?',
)


def near(name: str, known: Iterable[str]) -> list[str]:
  """The level that `name` is but for its decorations, else up to three like it."""
  by_letters = {_letters(level): level for level in known}
  plain = name
  for decoration in ('', *_DECORATIONS):
    plain = re.sub(decoration, '', plain, flags=re.IGNORECASE)
    if _letters(plain) in by_letters:
      return [by_letters[_letters(plain)]]
  found = difflib.get_close_matches(_letters(plain), by_letters, 3, 0.6)
  return [by_letters[letters] for letters in found]


def _letters(name: str) -> str:
  return re.sub(r'[\W_]+', '', name).lower()
