"""Prompts, the caches of transformers, and what a causal model makes of both: for benchmarks.swap_language."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Prompt:
    tokens: Tensor  # int64 [B, N]
    mask: Tensor  # [B, N], 0 where a row is padded on the left

    @property
    def padding(self) -> list[int]:
        return (self.mask == 0).sum(1).tolist()


def cut_prompt(text: Tensor, tokens: int, padding: list[int]) -> Prompt:
    """One row for each number of tokens that are padding, from different places of text int64 [N]."""
    rows = torch.stack([text[i * 7 : i * 7 + tokens] for i in range(len(padding))])
    mask = torch.stack([(torch.arange(tokens) >= pad).long() for pad in padding])
    return Prompt(torch.where(mask > 0, rows, 0), mask)


@dataclass
class CacheKind:
    """A way to have a cache: ``make(transformers, config, batch, tokens)``. Some round what they are given."""

    name: str
    make: Callable
    rounds: bool = False


def _quantised(backend: str, **options) -> CacheKind:
    name = " ".join(["quantised by", backend, *(f"to {bits} bits" for bits in options.values())])
    return CacheKind(name, lambda hf, config, *_: hf.QuantizedCache(backend, config, **options), rounds=True)


def _made_ready(hf, config, batch: int, tokens: int):
    """Buffers of the model's own sizes, which know nothing of gates."""
    cache = hf.StaticCache(config, max_cache_len=tokens)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, torch.float32, torch.device("cpu"))
    return cache


CACHES = (
    CacheKind("dynamic", lambda hf, config, *_: hf.DynamicCache(config=config)),
    CacheKind("dynamic, of no config", lambda hf, *_: hf.DynamicCache()),
    CacheKind("static, longer", lambda hf, config, _, tokens: hf.StaticCache(config, max_cache_len=tokens + 50)),
    CacheKind("static, made ready", _made_ready),
    _quantised("quanto", nbits=4),
    _quantised("quanto", nbits=2),
    _quantised("hqq", nbits=4),
    _quantised("fp8"),
    CacheKind("dynamic, offloaded", lambda hf, config, *_: hf.DynamicCache(config=config, offloading=True)),
    CacheKind("static, offloaded", lambda hf, config, _, n: hf.StaticCache(config, max_cache_len=n, offloading=True)),
)


@torch.no_grad()
def logits_of(model: nn.Module, prompt: Prompt) -> Tensor:
    """[B, N, V], as one forward without a cache gives them; 0 at the padding."""
    places = (prompt.mask.cumsum(1) - 1).clamp(min=0)
    logits = model(prompt.tokens, attention_mask=prompt.mask, position_ids=places, use_cache=False).logits
    return logits.mul_(prompt.mask[..., None])


def cache_name(model: nn.Module) -> str:
    return "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"


@torch.no_grad()
def generate(model: nn.Module, prompt: Prompt, new: int, cache) -> tuple[Tensor, Tensor]:
    """(tokens [B, N + new], the logits [B, new, V] that they were the largest of)."""
    out = model.generate(
        prompt.tokens, attention_mask=prompt.mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        use_cache=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        **{cache_name(model): cache},
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, dim=1)


@torch.no_grad()
def replay(model: nn.Module, prompt: Prompt, tokens: Tensor, cache) -> tuple[Tensor, Tensor]:
    """The same by the model's own forward, token by token, that is fed what was generated. As long as the largest logit
    is always that of the next of tokens, it would have generated them itself."""
    name, places = cache_name(model), (prompt.mask.cumsum(1) - 1).clamp(min=0)
    given, mask, logits = prompt.tokens, prompt.mask, []
    for number in range(prompt.tokens.shape[1], tokens.shape[1]):
        arguments = dict(attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
        logits.append(model(given, **arguments, **{name: cache}).logits[:, -1])
        given, mask = tokens[:, number, None], torch.nn.functional.pad(mask, (0, 1), value=1)
        places = places[:, -1:] + 1
    logits = torch.stack(logits, dim=1)
    return torch.cat((prompt.tokens, logits.argmax(-1)), dim=1), logits


def uncached(model: nn.Module, prompt: Prompt, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same for tokens that were generated, by one forward over them."""
    new = tokens.shape[1] - prompt.tokens.shape[1]
    whole = Prompt(tokens[:, :-1], torch.nn.functional.pad(prompt.mask, (0, new - 1), value=1))
    logits = logits_of(model, whole)[:, -new:]
    return torch.cat((prompt.tokens, logits.argmax(-1)), dim=1), logits


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest of theirs."""
    largest = theirs.abs().max()
    return float((ours - theirs).abs_().max() / largest)
