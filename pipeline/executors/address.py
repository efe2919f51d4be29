"""Which Ray a command uses: one of its own on this machine, or a running cluster, and who named that.

The one place where this is decided. Knows neither Ray nor workers.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Mapping

from pipeline.executors.base import ExecutorError

VARIABLE = "RAY_ADDRESS"
_FLAG = "--ray-address"
_CONNECT_S = 10.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a gRPC client begins: HTTP/2's preface and empty settings, which a server answers with a frame of its own settings."""
_MAX_PORT = 65_535


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where Ray is."""

    where: str | None
    """'auto' or host:port of a running cluster; None for a Ray that is started on this machine."""
    named_by: str = _FLAG
    """The flag or variable that says so, for messages."""
    notice: str | None = None
    """What the person at the terminal has to know of the choice."""


def choose(flag: str | None, environment: Mapping[str, str]) -> Address:
    """Take what the flag says, else RAY_ADDRESS; 'auto' means RAY_ADDRESS where that is set, as it does to Ray.

    Raises:
        ExecutorError: the address is of no form that can be joined; the flag or variable is named.
    """
    asked, variable = (flag or "").strip(), environment.get(VARIABLE, "").strip()
    if variable and asked in ("", "auto"):
        notice = None if variable == "local" else f"{VARIABLE}={variable}: joining this cluster"
        return _parsed(Address(where=variable, named_by=VARIABLE, notice=notice))
    differs = variable and asked != variable
    notice = f"{_FLAG} {asked} is used, not {VARIABLE}={variable}" if differs else None
    return _parsed(Address(where=asked or None, notice=notice))


def runs_elsewhere(workers: int, flag: str | None) -> bool:
    """Whether the workers asked for may be on other machines: those of a cluster that the flag or RAY_ADDRESS names."""
    return bool(workers or flag) and choose(flag, os.environ).where is not None


def _parsed(address: Address) -> Address:
    where = address.where
    if where in (None, "local"):
        return dataclasses.replace(address, where=None)
    if where != "auto" and _host_and_port(where) is None:
        raise ExecutorError(
            f"{address.named_by}: got {where}, expected 'auto' or host:port of a cluster this machine belongs to, or 'local'. Start the "
            f"command on one of its nodes: with 'ray job submit', or in a shell there{_or_unset(address)}"
        )
    return address


def _host_and_port(where: str) -> tuple[str, int] | None:
    host, _, port = where.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) <= _MAX_PORT:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def refuse_unreachable(address: Address, *, uses_tls: bool) -> None:
    """Make sure that a server such as Ray's listens there: Ray itself would try for minutes.

    Args:
        uses_tls: whether connections are encrypted, so that only Ray can talk to it.

    Raises:
        ExecutorError: nothing does, or something else.
    """
    found = _host_and_port(address.where or "")
    if found is None:
        return
    try:
        with socket.create_connection(found, timeout=_CONNECT_S) as connection:
            if uses_tls:
                return
            connection.sendall(_HELLO)
            answer = connection.recv(9)
            problem = "" if answer[3:4] == b"\x04" else f"what answers at {address.where} is not Ray's port"
    except (OSError, UnicodeError) as error:
        problem = f"nothing answers at {address.where} ({error})"
    if problem:
        raise ExecutorError(
            f"{address.named_by}: {problem}; start Ray there with 'ray start --head', or see which address it "
            f"printed{_or_unset(address)}"
        )


def _or_unset(address: Address) -> str:
    return f". Unset {VARIABLE} to start Ray on this machine" if address.named_by == VARIABLE else ""
