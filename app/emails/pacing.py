"""EMAILS_DOMAIN_LIMITS: the maximum number of emails to a domain at a time, and per minute."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from django.db import transaction

from emails.conf import conf
from emails.queries import execute, fetch, load

SQL = load("emails.sql")

OTHERS = "*"
# The allowance of a domain that has no limit.
UNLIMITED = 1_000_000


@dataclass
class Allowances:
    """How many deliveries may be published now: per listed domain, and for every other domain."""

    by_domain: dict[str, int] = field(default_factory=dict)
    others: int = UNLIMITED
    tokens: dict[str, float] = field(default_factory=dict)

    @property
    def closed(self) -> list[str]:
        return [domain for domain, count in self.by_domain.items() if count <= 0]

    def spend(self, domains: list[str]) -> None:
        """Subtracts published deliveries from the rates."""
        spent = {}
        for domain, count in Counter(domains).items():
            rate = limits_of(domain).get("per_minute")
            if rate:
                spent[domain] = self.tokens.get(domain, burst(rate)) - count
        if spent:
            values = {"domains": list(spent), "tokens": list(spent.values())}
            with execute(SQL["spend"], values):
                pass


def limits_of(domain: str) -> dict[str, float]:
    limits = conf.DOMAIN_LIMITS
    return limits.get(domain, limits.get(OTHERS, {}))


def burst(per_minute: float) -> float:
    """How many may be published at once after a pause: the rate per second, but at least one."""
    return max(per_minute / 60, 1)


@contextmanager
def allowances() -> Iterator[Allowances]:
    """The current allowance for publishing.

    If there are limits, a lock admits one relay at a time.
    """
    if not conf.DOMAIN_LIMITS:
        yield Allowances()
        return
    with transaction.atomic():
        fetch(SQL["lock_pace"])
        under_way: dict[str, int] = dict(fetch(SQL["under_way"], prepare=False))
        tokens = {}
        for domain, rest, seconds in fetch(SQL["tokens"]):
            if rate := limits_of(domain).get("per_minute"):
                tokens[domain] = min(rest + max(seconds, 0) * rate / 60, burst(rate))
        named = set(conf.DOMAIN_LIMITS) - {OTHERS}
        yield Allowances(
            {
                domain: allowance(domain, under_way.get(domain, 0), tokens)
                for domain in named | set(under_way) | set(tokens)
            },
            allowance(OTHERS, 0, {}),
            tokens,
        )


def allowance(domain: str, under_way: int, tokens: dict[str, float]) -> int:
    limits = limits_of(domain)
    allowed: float = UNLIMITED
    if concurrent := limits.get("concurrent"):
        allowed = min(allowed, concurrent - under_way)
    if rate := limits.get("per_minute"):
        allowed = min(allowed, tokens.get(domain, burst(rate)))
    return max(int(allowed), 0)
