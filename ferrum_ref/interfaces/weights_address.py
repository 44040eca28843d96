"""What may be shown of an address.  Clause: WL-SECRET-1 (specs/weights.md)."""

from __future__ import annotations

from urllib.parse import urlsplit


def public_address(url: str) -> str:
    """Scheme, host, port and path of a URL: no user, no password, no query, no fragment.  [WL-SECRET-1]

    A dropped query leaves "?..." behind. Pure; never raises.
    """
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port is not None else ""
        host = parts.hostname or ""
    except (ValueError, AttributeError, TypeError):
        return "(an unreadable address)"
    shown = f"{parts.scheme}://{host}{port}{parts.path}{'?...' if parts.query else ''}"
    return shown if shown.isprintable() and "@" not in shown else ascii(shown.rpartition("@")[2])
