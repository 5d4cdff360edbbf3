"""A stand-in for kubectl: objects are files in $CLUSTER, one folder a namespace.

As in a cluster, a Job's template cannot be changed, and `apply` says what it did. What
$REFUSED names, such as "apply JobSet", is refused; with $SILENT it says nothing.
"""

import json
import os
import pathlib
import sys

import yaml


def main(arguments):
  flags = dict(a.partition('=')[::2] for a in arguments if a.startswith('--'))
  command, *rest = [a for a in arguments if not a.startswith('--')]
  folder = pathlib.Path(os.environ['CLUSTER'], flags['--namespace'])
  folder.mkdir(parents=True, exist_ok=True)
  refused = os.environ.get('REFUSED', '').split()
  path_of = lambda name: folder / name.replace('/', ' ')
  if command == 'apply':
    item = yaml.safe_load(pathlib.Path(rest[1]).read_text())
    name = f'{item["kind"]}/{item["metadata"]["name"]}'
    if refused == [command, item['kind']]:
      sys.exit('Error from server (InternalError): failed calling webhook')
    word = _apply(path_of(name), item)
    if 'SILENT' not in os.environ:
      print(f'{name.lower()} {word}')
  elif command == 'get' and rest[0] == 'pods':
    print('{"items": []}')
  elif command == 'get':
    found = [json.loads(p.read_text()) for p in map(path_of, rest) if p.exists()]
    if found:
      print(json.dumps(found[0] if len(rest) == 1 else {'items': found}))
  elif command == 'delete':
    for name in rest:
      if refused == [command, name.partition('/')[0]]:
        sys.exit('Error from server: it will not go')
      path_of(name).unlink(missing_ok=True)
  elif command == 'patch':
    if refused == [command, rest[0].partition('/')[0]]:
      sys.exit('Error from server: not now')
    path = path_of(rest[0].replace('job/', 'Job/'))
    item = json.loads(path.read_text())
    item['spec'] |= json.loads(rest[2])['spec']
    path.write_text(json.dumps(item, sort_keys=True))
  else:
    sys.exit(f'what is {command}?')


def _apply(path, item):
  text = json.dumps(item, sort_keys=True)
  if not path.exists():
    path.write_text(text)
    return 'created'
  if path.read_text() == text:
    return 'unchanged'
  free = {'parallelism': 0, 'completions': 0}
  before = json.loads(path.read_text())
  fixed = item['kind'] in ('Job', 'JobSet')
  if fixed and before['spec'] | free != item['spec'] | free:
    sys.exit(f'The {item["kind"]} is invalid: spec.template: field is immutable')
  path.write_text(text)
  return 'configured'


if __name__ == '__main__':
  main(sys.argv[1:])
