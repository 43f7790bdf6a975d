from typing import Any


class VerifiedTLS(dict[str, Any]):
    """TLS options that verify a broker's certificate against the host name of its URL.

    Kombu verifies the host name as long as `server_hostname` is None. But Kombu writes the first
    node's name into the options, and would then expect that name from every other node.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(server_hostname=None, **options)

    def __getitem__(self, key: str) -> Any:
        return None if key == "server_hostname" else super().__getitem__(key)
