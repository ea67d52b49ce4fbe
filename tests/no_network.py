"""Refuse every connection that would leave this machine.

`tests/conftest.py` installs this in the test process and, by way of PYTHONPATH, in every Python that a test starts
(the command line, notebook kernels). A name look-up is traffic too, so it is refused as well.
"""

import ipaddress
import socket

attempts: list[str] = []  # what was refused so far in this process


class NetworkRefused(RuntimeError):
    """A test tried to leave the machine. Not an OSError, so that code that survives a broken network cannot hide it."""


def install() -> None:
    """Guard the ways out of Python's socket module; calling it twice does no harm."""
    if getattr(socket.socket.connect, "guarded", False):
        return
    for method in ("connect", "connect_ex"):
        _guard(socket.socket, method, lambda args: args[1], of_socket=True)
    _guard(socket.socket, "sendto", lambda args: args[-1], of_socket=True)
    _guard(socket, "getaddrinfo", lambda args: args[:1])
    _guard(socket, "gethostbyname", lambda args: args[:1])


def _guard(owner, name: str, address_of, of_socket: bool = False) -> None:
    original = getattr(owner, name)

    def guarded(*args, **kwargs):
        local = of_socket and args[0].family not in (socket.AF_INET, socket.AF_INET6)
        if not local:
            address = address_of(args) or (kwargs.get("host"),)
            if not _is_loopback(address[0] if isinstance(address, tuple) else address):
                attempts.append(f"{name}({address!r})")
                raise NetworkRefused(
                    f"{name}({address!r}): tests must not use the network; start a server on 127.0.0.1 in the test"
                )
        return original(*args, **kwargs)

    guarded.guarded = True
    setattr(owner, name, guarded)


def _is_loopback(host) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return (ip := ipaddress.ip_address(host.split("%")[0])).is_loopback or ip.is_unspecified
    except ValueError:
        return False
