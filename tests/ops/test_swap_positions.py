"""Sinks are the first tokens of a text, wherever it lies in a batch: padded on the left, or packed behind another."""

import pytest
import torch
from support.attention import formula

pytest.importorskip("transformers")

from support.gated_llama import draw, make

from torch_sluice import gated_attention
from torch_sluice.attention import kept_pairs
from torch_sluice.selection import select_logit_tau


def test_a_padded_sequence_is_the_sequence():
    torch.manual_seed(0)
    n, pad = 20, 7
    alone = [torch.randn(1, *shape) for shape in ((4, n, 8), (2, n, 8), (2, n, 8), (4, n), (2, n))]
    padded = [torch.cat((torch.randn_like(x[:, :, :pad]), x), dim=2) for x in alone]
    key_range = torch.tensor([[pad, pad + n]])
    for options in (dict(causal=True, window=2, sinks=4), dict(sinks=3), dict(causal=True, sinks=100)):
        expected = gated_attention(*alone, tau=0.6, **options)
        found = gated_attention(*padded, tau=0.6, key_range=key_range, **options)[:, :, pad:]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(expected, formula(*(x.double() for x in alone), tau=0.6, **options)[0].float())
        kept, _ = kept_pairs(*alone[3:], tau=0.6, **options)
        assert torch.equal(
            kept_pairs(padded[3][:, :, pad:], padded[4], tau=0.6, key_range=key_range, **options)[0], kept
        )
        density = dict(density=0.4, **options)
        wanted = select_logit_tau(*alone[3:], **density)
        torch.testing.assert_close(
            select_logit_tau(padded[3][:, :, pad:], padded[4], key_range=key_range, **density), wanted
        )


@torch.no_grad()
def test_a_batch_padded_on_the_left_answers_as_each_prompt_does():
    model, texts = make(), [draw(tokens=20), draw(tokens=13, seed=1)]
    alone = [model(text).logits[0] for text in texts]
    ids = torch.cat([torch.nn.functional.pad(text, (20 - text.shape[1], 0)) for text in texts])
    mask = (ids > 0).long()
    found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for logits, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(logits[-len(expected) :], expected, atol=1e-4, rtol=1e-4)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    together = model.generate(ids, attention_mask=mask, **options)
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row[20:], model.generate(text, **options)[0, text.shape[1] :])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:this attention mask is not the causal")
@pytest.mark.parametrize("lengths", [(20, 13), (1, 5, 30), (3, 3, 3)], ids=str)
def test_packed_documents_answer_as_each_does(lengths):
    model, texts = make(), [draw(tokens=n, seed=n + i) for i, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits[0].split(list(lengths))
    for logits, text in zip(found, texts, strict=True):
        torch.testing.assert_close(logits, model(text).logits[0], atol=1e-4, rtol=1e-4)
