from typing import Any


class VerifiedTLS(dict[str, Any]):
    """TLS options that check a broker's certificate against the host name of its own URL.

    Kombu does so while it reads None as `server_hostname`, but writes the name it used back into
    the options, and would then expect the first node's name from every other node.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(server_hostname=None, **options)

    def __getitem__(self, key: str) -> Any:
        return None if key == "server_hostname" else super().__getitem__(key)
