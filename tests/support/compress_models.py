"""Small models of every kind that compression has to deal with, and inputs for them."""

import torch
from torch import nn

import torch_sluice


class Convolutions(nn.Module):
    """Residual, concatenation, depth-wise and grouped convolutions, batch and group norms, flattening."""

    def __init__(self, width=32, grouped=4):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped, self.norm3 = nn.Conv2d(width, 2 * width, 3, padding=1, groups=grouped), nn.GroupNorm(4, 2 * width)
        self.narrow, self.joined = nn.Conv2d(2 * width, 24, 1), nn.Conv2d(24 + width, 40, 1)
        self.hidden, self.head = nn.Linear(40 * 4, 48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = x + self.norm2(self.second(x)).relu()
        y = self.norm3(self.grouped(self.depthwise(x))).relu()
        y = self.joined(torch.cat([self.narrow(y).relu(), x], 1)).relu()
        return self.head(self.hidden(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1)).relu())


class Encoder(nn.Module):
    """nn.MultiheadAttention within nn.TransformerEncoder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Gated(nn.Module):
    """A block of torch_sluice.GatedAttention and an MLP."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 64), nn.LayerNorm(64)
        self.attention = torch_sluice.GatedAttention(64, 4, kv_heads=2, out_proj=True, causal=True, window=2)
        self.mlp, self.head = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), nn.Linear(64, 50)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.head(x + self.mlp(self.norm(x)))


class Branches(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 64)
        self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 4)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x).relu() if x.sum() > 0 else self.other(x).relu()
        return self.head(x)


def mlp(width=64, inputs=20, outputs=6):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width + 1), nn.ReLU(), nn.Linear(width + 1, outputs)
    )


def bert(pooled=False):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=50,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.head = BertModel(config), nn.Linear(64, 3)

        def forward(self, input_ids, attention_mask=None):
            out = self.bert(input_ids, attention_mask=attention_mask)
            return self.head(out.pooler_output if pooled else out.last_hidden_state.mean(1))

    return Classifier()


def llama(tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=50, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gated_llama():
    return torch_sluice.swap_attention(llama(), target_density=0.5, window=2)


def tokens(batch=2):
    return torch.randint(0, 50, (batch, 12))


MODELS = {
    "mlp": (mlp, lambda: torch.randn(3, 20)),
    "convolutions": (Convolutions, lambda: torch.randn(2, 3, 8, 8)),
    "encoder": (Encoder, tokens),
    "gated": (Gated, tokens),
    "bert": (bert, lambda: {"input_ids": tokens(), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}),
    "llama": (llama, lambda: {"input_ids": tokens()}),
    "gated llama": (gated_llama, lambda: {"input_ids": tokens()}),
}


def make(name, seed=0):
    """A model of MODELS in eval mode, with batch norms that have seen data, and an example."""
    torch.manual_seed(seed)
    build, inputs = MODELS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model, inputs()


def call_all_faster(model, candidates, *_):
    """In place of ``quantization._time_in_place``: every quantised layer takes half the time, whatever the machine."""
    for candidate in candidates:
        candidate.before, candidate.after = 2e-3, 1e-3
    return 2e-3 * len(candidates)
