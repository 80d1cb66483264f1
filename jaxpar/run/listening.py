"""Where process 0 listens: at the coordinator's own address, and not on all interfaces of its machine, if that can be."""

import ipaddress
import os
import socket
import sys

from jaxpar.config import ConfigError


def split_address(address: str) -> tuple[str, str]:
    """Host, without the brackets of IPv6, and port; either is "" if it is missing."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def own_address(address: str) -> str:
    """`address` (host:port), if the host is this machine; otherwise all interfaces, with a note."""
    host, port = split_address(address)
    found = [str(place[0]) for _, place in _resolve(host, port)]
    # Debian's /etc/hosts gives a machine's own name a loopback address, where the other machines would find nobody.
    meant_for_one_machine = host == "localhost" or host in found
    if any(_is_own(ip) and (meant_for_one_machine or not ipaddress.ip_address(ip).is_loopback) for ip in found):
        return address
    print(
        f"note: coordinator {address}: on process 0's machine, {host} is {' and '.join(found) or 'no known name'}, not one of "
        f"its addresses in the network, so it listens on all its interfaces. JAX_COORDINATOR_BIND_ADDRESS (host:port) chooses one",
        file=sys.stderr,
        flush=True,
    )
    return f"[::]:{port}"


def listen(address: str) -> list[socket.socket]:
    """Sockets at all addresses of the host (of host:port) that this machine has; [::] is all of them.

    Raises:
      ConfigError: there are none, or another program has the port.
    """
    host, port = split_address(address)
    sockets: list[socket.socket] = []
    try:
        if host == "::":
            both = socket.has_dualstack_ipv6()
            everywhere = socket.AF_INET6 if both else socket.AF_INET
            return [socket.create_server(("", int(port)), family=everywhere, dualstack_ipv6=both)]
        sockets = [socket.create_server(at, family=family) for family, at in _resolve(host, port) if _is_own(at[0])]
    except OSError as error:
        raise ConfigError(
            f"coordinator {address}: process 0 cannot listen on port {port} ({os.strerror(error.errno or 0)}): if no second "
            f"process has ID 0, set another port in JAX_COORDINATOR_ADDRESS, or under Slurm in JAX_COORDINATOR_PORT, for all "
            f"processes"
        ) from None
    if not sockets:
        raise ConfigError(f"JAX_COORDINATOR_BIND_ADDRESS: process 0's machine does not have the address {address}")
    return sockets


def _resolve(host: str, port: str) -> list[tuple[int, tuple]]:
    """The host's addresses as (family, what a socket binds to)."""
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys((family, place) for family, _, _, _, place in found))


def _is_own(ip: str) -> bool:
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True
