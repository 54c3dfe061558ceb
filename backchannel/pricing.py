"""Usage becomes nano-dollars, here only: own prices, then genai-prices; unknown is not free."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from backchannel.registry import Provider
from backchannel.settings import PriceSettings, get_settings

if TYPE_CHECKING:
    from genai_prices import Usage as PricedUsage

NANO = Decimal(1_000_000_000)


class Tokens(NamedTuple):
    """Tokens of one call; input includes cached and cache-write, output includes reasoning."""

    input: int
    output: int
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0


class Price(NamedTuple):
    """What a call cost, and by which price list; ``nanousd`` None means nobody knows."""

    nanousd: int | None
    date: str


def price(provider: Provider, model: str, tokens: Tokens) -> Price:
    """The cost of one call at today's price.

    A built-in provider without a price list (Ollama, LM Studio, echo) costs 0 per token; a model
    that its price list does not know, or a custom provider without a price for it, has the price
    None, never 0.
    """
    today = datetime.now(UTC).date().isoformat()
    own = get_settings().prices.get(f"{provider.id}:{model}")
    if own is not None:
        return Price(_own_price(own, tokens), f"{today} settings")
    declared = provider.prices.get(model) or provider.prices.get("*")
    if declared is not None:
        return Price(_own_price(declared, tokens), f"{today} {provider.id}")
    if not provider.builtin:
        return Price(None, f"{today} no price")
    if provider.price_provider is None:
        return Price(0, f"{today} free")
    from genai_prices import Usage, __version__, calc_price

    source = f"{today} genai-prices {__version__}"
    if not _knows(provider.price_provider, model, __version__):
        return Price(None, source)
    try:
        usage: PricedUsage = Usage(
            input_tokens=tokens.input,
            output_tokens=tokens.output,
            cache_read_tokens=tokens.cached or None,
            cache_write_tokens=tokens.cache_write or None,
        )
        total = calc_price(usage, model_ref=model, provider_id=provider.price_provider).total_price
    except ValueError:
        # counts that contradict each other, as more cached tokens than input: nobody knows
        return Price(None, source)
    return Price(_nano(total), source)


def _own_price(own: PriceSettings, tokens: Tokens) -> int:
    cached = own.input if own.cached is None else own.cached
    cache_write = own.input if own.cache_write is None else own.cache_write
    fresh = max(tokens.input - tokens.cached - tokens.cache_write, 0)
    per_million = (
        fresh * own.input
        + tokens.cached * cached
        + tokens.cache_write * cache_write
        + tokens.output * own.output
    )
    return _nano(per_million / 1_000_000)


def _nano(dollars: Decimal) -> int:
    return int((dollars * NANO).to_integral_value(ROUND_HALF_EVEN))


@lru_cache(maxsize=4096)
def _knows(price_provider: str, model: str, _version: str) -> bool:
    from genai_prices import Usage, calc_price

    try:
        calc_price(Usage(input_tokens=1), model_ref=model, provider_id=price_provider)
    except LookupError:
        return False
    return True
