"""The stores of a disaggregated run by address: the metadata store and the feature store.

Whoever comes first, the trainer, a producer or a server, creates them (``create=True``), and says so, because a
misspelt address is a new store. Every other opener refuses what is not there.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from specforge.errors import UserError
from specforge.files import read_secret
from specforge.runtime.control_plane.metadata import MetadataStore
from specforge.runtime.control_plane.sqlite import SQLiteMetadataStore
from specforge.runtime.data_plane.shared_dir import SharedDirBackend
from specforge.runtime.data_plane.store import SharedBackend

logger = logging.getLogger(__name__)
_REDIS_OPTIONS = {
    "password_file",
    "ssl_ca_certs",
    "ssl_ca_path",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_check_hostname",
    "ssl_keyfile",
    "ssl_password",
    "db",
    "username",
    "password",
    "protocol",
    "client_name",
    "socket_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "health_check_interval",
    "max_connections",
}


def open_backend(address: str, *, create: bool = False) -> SharedBackend:
    """Backend of the feature store at an address: a folder that all processes can access, or ``mooncake://...``.

    A missing folder is an error; with ``create`` it is created, and a warning names it.

    Raises:
        UserError: the kind of store is unknown, or the folder is missing or cannot be created.
    """
    scheme, path = _local(address, "store")
    if scheme == "mooncake":
        from specforge.runtime.data_plane.mooncake import MooncakeBackend

        return MooncakeBackend(address)
    if scheme != "file":
        raise UserError(
            f"store {shown(address)}: unknown kind of store {scheme}://; give a folder that all processes can access, "
            "or mooncake://"
        )
    is_new = not path.exists()
    try:
        backend = SharedDirBackend(path, create)
    except OSError as error:
        raise UserError(f"store {address}: cannot be used ({error})") from error
    _say_if(is_new, "new feature store", path)
    return backend


def open_metadata(address: str, *, create: bool = False) -> MetadataStore:
    """Metadata store at an address.

    A file is SQLite, for one host. ``redis://host:port/0``, or ``rediss://`` for TLS, is Redis; ``#NAME`` at the end
    is the namespace of a run that shares a server. Certificates are options of redis-py
    (``?ssl_ca_certs=ca.pem&ssl_certfile=...&ssl_keyfile=...``); a password is read from ``?password_file=FILE``, so
    that it appears in no command line or configuration. A missing file is an error; with ``create`` it is created, and
    a warning names it.

    Raises:
        UserError: it cannot be opened.
    """
    scheme, path = _local(address, "metadata")
    if scheme == "file":
        is_new = not path.exists()
        metadata = SQLiteMetadataStore(path, create=create)
        _say_if(is_new, "new metadata store", path)
        return metadata
    where = f"metadata {shown(address)}"
    if scheme not in ("redis", "rediss"):
        raise UserError(f"{where}: give a file (SQLite), redis:// or rediss://")
    from specforge.runtime.control_plane.redis import RedisMetadataStore

    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"{where}: is not an address such as {scheme}://127.0.0.1:6379/0") from error
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - _REDIS_OPTIONS)
    if unknown:
        raise UserError(f"{where}: has no option {unknown[0]}; choose from {', '.join(sorted(_REDIS_OPTIONS))}")
    if scheme == "redis" and any(name.startswith("ssl_") for name in options):
        raise UserError(f"{where}: certificates require TLS; write the address as rediss://")
    if not re.fullmatch(r"/?\d*", parts.path, re.ASCII):
        raise UserError(f"{where}: a database of Redis is a number; put the name of the run after #")
    password_file = options.pop("password_file", None)
    password = None if password_file is None else read_secret(Path(password_file), "password_file")
    url = urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(options), ""))
    return RedisMetadataStore(url, namespace=parts.fragment or "specforge", password=password)


def shown(address: str) -> str:
    """An address without the user name and password that it may contain."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else address


def is_there(address: str) -> bool:
    """Whether the file or folder at an address exists; servers are assumed to."""
    scheme, path = _local(address, "address")
    return scheme != "file" or path.exists()


def _say_if(is_new: bool, what: str, path: Path) -> None:
    """Name a store that did not exist, by its whole path: it may be in another folder than meant."""
    if is_new:
        logger.warning("%s: %s", what, path.absolute())


def _local(address: str, what: str) -> tuple[str, Path]:
    scheme, separator, rest = address.partition("://")
    path = rest if separator else address
    if not path.strip():
        raise UserError(f"{what} {address!r}: is empty")
    return scheme if separator else "file", Path(path).expanduser()
