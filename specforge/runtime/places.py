"""Where the parts of a disaggregated run meet, by address: the metadata store and the feature store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from specforge.errors import UserError
from specforge.runtime.control_plane.metadata import MetadataStore
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.shared_dir import SharedDirBackend
from specforge.runtime.data_plane.store import FeatureBackend


def open_backend(address: str) -> FeatureBackend:
    """The feature store's backend at an address: a folder that all processes see, or ``mooncake://...``.

    Raises:
        UserError: there is no store of that kind, or the folder cannot be made.
    """
    scheme, path = _local(address)
    if scheme == "mooncake":
        from specforge.runtime.data_plane.mooncake import MooncakeBackend

        return MooncakeBackend(address)
    if scheme != "file":
        raise UserError(
            f"store {address}: no store of the kind {scheme}; name a folder that all processes see, or mooncake://"
        )
    try:
        return SharedDirBackend(path)
    except OSError as error:
        raise UserError(f"store {address}: cannot be used ({error})") from error


def open_metadata(address: str) -> MetadataStore:
    """The metadata store at an address.

    A file is SQLite, for one host. ``redis://`` and, with TLS, ``rediss://host:port/0`` is Redis; behind ``#`` may
    stand a namespace, for runs that share a server. Certificates are given as redis-py wants them
    (``?ssl_ca_certs=ca.pem&ssl_certfile=...&ssl_keyfile=...``), and a password by ``?password_file=FILE``, so that no
    command line or configuration shows it.

    Raises:
        UserError: it cannot be opened.
    """
    scheme, path = _local(address)
    if scheme == "file":
        return SQLiteMetadataStore(path)
    if scheme not in ("redis", "rediss"):
        raise UserError(f"metadata {address}: give a file (SQLite), or redis:// or rediss://")
    from specforge.runtime.control_plane.redis import RedisMetadataStore

    parts = urlsplit(address)
    options = dict(parse_qsl(parts.query))
    password_file = options.pop("password_file", None)
    password = None if password_file is None else _read_password(Path(password_file))
    url = urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(options), ""))
    return RedisMetadataStore(url, namespace=parts.fragment or "specforge", password=password)


def _local(address: str) -> tuple[str, Path]:
    scheme, separator, rest = address.partition("://")
    return (scheme, Path(rest)) if separator else ("file", Path(address).expanduser())


def _read_password(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise UserError(f"password_file {path}: cannot be read ({error.strerror})") from error
