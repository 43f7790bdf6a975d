import secrets
import time
import uuid


def uuid7() -> uuid.UUID:
    """A random UUID that starts with the time in milliseconds (RFC 9562), so keys sort by age."""
    milliseconds = time.time_ns() // 1_000_000
    value = milliseconds << 80 | 7 << 76 | secrets.randbits(12) << 64
    return uuid.UUID(int=value | 0b10 << 62 | secrets.randbits(62))
