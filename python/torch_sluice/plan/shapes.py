"""What the planner is told and what it answers: plain numbers, named and explained in ``ops/sluice/plan.h``."""

from dataclasses import dataclass, fields

SCHEDULES = ("gpipe", "1f1b", "interleaved")
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16", "fp8")
EXCHANGES = ("ring", "all-to-all")
OVERLAPS = ("none", "gradients", "all")


@dataclass(frozen=True)
class ModelShape:
    """A decoder of transformer layers. Counts of elements, heads and layers; ``sequence`` in tokens."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    sequence: int
    gated: bool = True
    tied: bool = False
    dropout: bool = False
    causal: bool = True
    kept_share: float = 1.0


@dataclass(frozen=True)
class Cluster:
    """A GPU and the network between its kind: FLOP/s, bytes, bytes/s, seconds; shares and efficiencies in [0, 1]."""

    peak_flops: float
    peak_flops_fp8: float
    memory_bytes: float
    memory_bandwidth: float
    gemm_efficiency: float
    gemm_half_size: float
    attention_efficiency_forward: float
    attention_efficiency_backward: float
    memory_efficiency: float
    kernel_overhead: float
    gpus_per_node: int
    intra_bandwidth: float
    intra_latency: float
    inter_bandwidth: float
    inter_latency: float
    link_efficiency: float
    overlap_share: float
    spread: float


@dataclass(frozen=True)
class Layout:
    """How the work is cut: ranks, micro-batches and what is kept, sharded, fused and overlapped."""

    gpus: int
    global_batch: int
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    micro_batch: int = 1
    schedule: str = "1f1b"
    recompute: str = "none"
    precision: str = "bf16"
    exchange: str = "ring"
    zero: int = 1
    sequence_parallel: bool = True
    fused_attention: bool = True
    fused_loss: bool = True
    fused_accumulation: bool = True
    tp_overlap: str = "gradients"
    pp_overlap: bool = True
    dp_overlap: bool = True
    gradient_bytes: float = 4.0
    reduce_bytes: float = 4.0
    state_bytes: float = 12.0
    margin: float = 0.05


@dataclass(frozen=True)
class Estimate:
    """What a step costs: seconds that add up to ``step_s``, FLOPs of all GPUs, bytes of the busiest one."""

    step_s: float
    compute_s: float
    recompute_s: float
    tp_s: float
    cp_s: float
    pp_s: float
    bubble_s: float
    spread_s: float
    dp_s: float
    optimizer_s: float
    micro_batches: int
    parameters: float
    model_flops: float
    hardware_flops: float
    mfu: float
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float
    activation_bytes: float
    temporary_bytes: float
    margin_bytes: float
    total_bytes: float


def names_of(kind: type) -> tuple[str, ...]:
    """The names of a dataclass's fields, in order."""
    return tuple(field.name for field in fields(kind))
