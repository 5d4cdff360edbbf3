"""Keys of one run, for mutual TLS between its roles.

An authority that exists for this run alone signs a certificate for the learner, one
for the inference servers and one for all clients; then its key is forgotten, so that
nothing can be added. Who can read the folder can join the run, and nobody else.
"""

import datetime
import os
import pathlib
import shutil
import stat
import tempfile
from typing import Any, NamedTuple

from impala_jax import config as config_lib
from impala_jax.runtime.run_directory import RunDirectory

# The name in the learner's certificate, wherever it runs: a requeued learner moves.
LEARNER = 'impala-learner'
INFERENCE = 'impala-inference'
CLIENT = 'impala-client'
_FILES = {LEARNER: 'learner', INFERENCE: 'inference', CLIENT: 'client'}
_DAYS = 400
# Certificates that end within so many days are made anew before a launch.
_LEFT = 60


class KeysError(Exception):
  """The keys are missing, open to others or too old; says which and what to do."""


class Keys(NamedTuple):
  """Files (PEM) that one role needs."""

  authority: pathlib.Path
  certificate: pathlib.Path
  key: pathlib.Path


def folder_of(config: config_lib.Config, run_dir: pathlib.Path) -> pathlib.Path | None:
  """Where the run's keys are, if it is launched with mutual TLS."""
  return RunDirectory(run_dir).keys if config.transport.tls else None


def ensure(folder: pathlib.Path) -> None:
  """Makes the keys of a run unless they are there; for the launcher.

  Args:
    folder: that will hold them, mode 0700; its parent exists.

  Raises:
    KeysError: the package `cryptography` is not installed.
    OSError: the folder cannot be written.
  """
  x509 = _x509()
  if folder.exists():
    try:
      left = min(_not_after(x509, f) for f in _certificates(folder))
      if left - _now() > datetime.timedelta(days=_LEFT):
        return
    except (OSError, ValueError):
      pass  # Incomplete: made anew.
    shutil.rmtree(folder)
  new = pathlib.Path(tempfile.mkdtemp(prefix='.keys-', dir=folder.parent))
  try:
    _make(x509, new)
    new.rename(folder)
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    raise


def load(folder: pathlib.Path, name: str) -> Keys:
  """Checks the keys of a role and returns where they are.

  Args:
    folder: see `ensure`; or files of the same names from a secret store.
    name: `LEARNER`, `INFERENCE` or `CLIENT`.

  Raises:
    KeysError: see there.
  """
  stem = _FILES[name]
  authority = folder / 'authority.crt'
  keys = Keys(authority, folder / f'{stem}.crt', folder / f'{stem}.key')
  x509 = _x509()
  for file in keys:
    try:
      mode = stat.S_IMODE(file.stat().st_mode)
      file.read_bytes()
    except OSError as e:
      raise KeysError(f'no key of this run in {file}: {e.strerror}') from e
    if file == keys.key and mode & 0o007:
      raise KeysError(
        f'{file} is open to every user of this machine (mode {mode:04o}): chmod 600'
      )
  for file in keys[:2]:
    try:
      end = _not_after(x509, file)
    except ValueError as e:
      raise KeysError(f'{file} is no certificate: {e}') from e
    if end < _now():
      raise KeysError(
        f'{file} ended on {end:%Y-%m-%d}: launch the run again with --resume'
      )
  return keys


def _x509() -> Any:
  try:
    from cryptography import x509
  except ImportError as e:
    raise KeysError('mutual TLS needs the package cryptography') from e
  return x509


def _certificates(folder: pathlib.Path) -> list[pathlib.Path]:
  for stem in _FILES.values():
    (folder / f'{stem}.key').stat()
  return [folder / f'{stem}.crt' for stem in ('authority', *_FILES.values())]


def _not_after(x509: Any, file: pathlib.Path) -> datetime.datetime:
  return x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc


def _now() -> datetime.datetime:
  return datetime.datetime.now(datetime.UTC)


def _make(x509: Any, folder: pathlib.Path) -> None:
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec

  authority_key = ec.generate_private_key(ec.SECP256R1())
  authority_name = _name(x509, 'impala-run')

  def sign(name: Any, public_key: Any, extensions: list[tuple[Any, bool]]) -> bytes:
    builder = (
      x509.CertificateBuilder()
      .subject_name(name)
      .issuer_name(authority_name)
      .public_key(public_key)
      .serial_number(x509.random_serial_number())
      # Clocks of a cluster differ.
      .not_valid_before(_now() - datetime.timedelta(days=1))
      .not_valid_after(_now() + datetime.timedelta(days=_DAYS))
    )
    # Who checks strictly, as Python does by default from 3.13 on, asks for these.
    identifiers = (
      x509.SubjectKeyIdentifier.from_public_key(public_key),
      x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
    )
    for extension, critical in [*extensions, *((x, False) for x in identifiers)]:
      builder = builder.add_extension(extension, critical)
    certificate = builder.sign(authority_key, hashes.SHA256())
    return certificate.public_bytes(serialization.Encoding.PEM)

  _write(
    folder / 'authority.crt',
    sign(
      authority_name,
      authority_key.public_key(),
      [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_usage(x509, key_cert_sign=True), True),
      ],
    ),
  )
  usages = x509.oid.ExtendedKeyUsageOID
  for name in _FILES:
    usage = usages.CLIENT_AUTH if name == CLIENT else usages.SERVER_AUTH
    key = ec.generate_private_key(ec.SECP256R1())
    extensions = [
      (x509.BasicConstraints(ca=False, path_length=None), True),
      (_usage(x509, digital_signature=True), True),
      (x509.ExtendedKeyUsage([usage]), True),
      (x509.SubjectAlternativeName([x509.DNSName(name)]), False),
    ]
    certificate = sign(_name(x509, name), key.public_key(), extensions)
    _write(folder / f'{_FILES[name]}.crt', certificate)
    _write(
      folder / f'{_FILES[name]}.key',
      key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
      ),
    )


def _usage(x509: Any, **allowed: bool) -> Any:
  """What a key may be used for, and nothing else."""
  names = (
    'digital_signature',
    'content_commitment',
    'key_encipherment',
    'data_encipherment',
    'key_agreement',
    'key_cert_sign',
    'crl_sign',
    'encipher_only',
    'decipher_only',
  )
  return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def _name(x509: Any, text: str) -> Any:
  return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])


def _write(path: pathlib.Path, content: bytes) -> None:
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
  with os.fdopen(descriptor, 'wb') as file:
    file.write(content)
