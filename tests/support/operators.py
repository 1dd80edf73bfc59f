"""Every operator of torch.ops.sluice, with arguments that are right."""

import torch

import torch_sluice  # noqa: F401  # registers them
from torch_sluice.quantize.operators import packed_sizes

ops = torch.ops.sluice


def attention_inputs():
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    places = torch.tensor([[0, 5]]), torch.tensor([0]), torch.tensor([0])
    of_scores = torch.randn(1, 1, 5, 5), torch.ones(1, 2), torch.randn(1, 2, 5, 1), torch.tensor([3])
    return [q, k, v, torch.randn(1, 2, 5), torch.randn(1, 2, 5), torch.zeros(1, 2), *places, *of_scores]


def packed_weight(outputs, inputs):
    size, scales = packed_sizes(outputs, inputs, 8, 0)
    return [torch.zeros(size, dtype=torch.uint8), torch.ones(scales)]


# Arguments that are right, with every optional tensor.
CALLS = {
    "accumulate_": lambda: [
        *(torch.zeros(5, 3, dtype=torch.float16), torch.zeros(1, dtype=torch.int8)),
        *(torch.ones(5, 3), 1.0, False, None),
    ],
    "channel_norms": lambda: [torch.ones(5, 3), 0],
    "conv2d_dynamic": lambda: [
        *(torch.ones(1, 2, 4, 4), *packed_weight(3, 18), torch.ones(3), 3),
        *([3, 3], [1, 1], [1, 1], [1, 1], 1, 8, 0, 8, 0.0),
    ],
    "gated_attention": lambda: [*attention_inputs(), True, 0, 0, 0, 0.0, 0.1, 0.3],
    "gated_attention_backward": lambda: [
        *(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5), *attention_inputs()),
        *(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5), True, 0, 0, 0, 0.0, 0.1, 0.3, True),
    ],
    "gated_attention_paged": lambda: [
        *(torch.randn(1, 2, 5, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8), torch.randn(1, 2, 5)),
        *(torch.randn(3, 4, 2), torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([7]), torch.zeros(1, 2)),
        *(torch.tensor([2]), torch.randn(1, 1, 5, 8), torch.ones(1, 2), True, 0, 0, 0, 0.0, 0.3),
    ],
    "gru_dynamic": lambda: [
        *(torch.ones(5, 9), torch.ones(3, 4), *packed_weight(12, 9), *packed_weight(12, 4)),
        *(torch.ones(12), torch.ones(12), torch.tensor([3, 2]), [8, 8], [0, 0], False, 8, 8, 0.0, 0.0),
    ],
    "linear_dynamic": lambda: [torch.ones(2, 9), *packed_weight(5, 9), torch.ones(5), 5, 8, 0, 8, 0.0, True, 0.0],
    "lookup_linear_weight": lambda: [torch.tensor([4, 0]), *packed_weight(5, 9), 5, 9, 8, 0],
    "lstm_dynamic": lambda: [
        *(torch.ones(5, 9), torch.ones(3, 2), torch.ones(3, 4), *packed_weight(16, 9), *packed_weight(16, 2)),
        *(*packed_weight(2, 4), torch.ones(16), torch.ones(16), torch.tensor([3, 2]), [8, 8, 8], [0, 0, 0]),
        *(False, 8, 8, 0.0, 0.0),
    ],
    "measure_gradient": lambda: [torch.ones(5, 3)],
    "pack_conv2d_weight": lambda: [torch.ones(4, 2, 3, 3), 8, 0, 1],
    "pack_linear_weight": lambda: [torch.ones(5, 9), 8, 0],
    "quantize_dynamic": lambda: [torch.ones(5, 9), 8, 0.0, True],
    "read_accumulator": lambda: [
        *(torch.zeros(5, 3, dtype=torch.float16), torch.zeros(1, dtype=torch.int8)),
        *(1.0, torch.ones(5, 3)),
    ],
    "unpack_linear_weight": lambda: [*packed_weight(5, 9), 5, 9, 8, 0],
}


def schema_of(name):
    return getattr(ops, name).default._schema


def is_tensor(argument):
    return str(argument.type) in ("Tensor", "Optional[Tensor]")
