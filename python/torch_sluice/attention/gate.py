"""The gate: one number per query and one per key, from which the operator decides the pairs to compute."""

import math

import torch
from torch import nn

PHASES = ("straight_through", "noise", "hard")

# c_a = c_b = 10 gives sigmoid(20), which is 1 in float32: a gate that is exactly open.
_EXACTLY_OPEN = 20.0


class Gate(nn.Module):
    """Separable gate logits ``a = W_a x + c_a`` per query head and ``b = W_b x + c_b`` per key head.

    The pair (i, j) has the gate ``g_ij = sigmoid(a_i + b_j)``: a_i decides whether query i looks far at all, b_j
    whether key j may be looked at from afar. x is the *input* of the attention layer: q and k after a rotary embedding
    depend on the position in ways that a linear gate should not see. W starts at zero, so all gates start at
    ``opening``.

    Args:
        dim: channels of x.
        heads: query heads, Hq.
        kv_heads: key heads, Hkv (default: ``heads``); must divide ``heads``.
        learn: False makes a frozen gate that is exactly open: g = 1 in float32, so that attention is plain softmax.
        opening: g at the start, in (0, 1); 0.95 leaves a swapped model nearly as it was.
        tau: pairs with g < tau are dropped by ``attend``, in [0, 1).
        target_density: share in (0, 1] of the pairs to which a ``DensityController`` drives the model that holds this
            gate, unless it is given another; None: the controller must be given one.

    Attributes (set by a controller, not saved):
        phase: how ``attend`` teaches the gate while the module is in training mode, one of ``PHASES``.
        noise: standard deviation of the exploration noise on a and on b in the phase "noise".
        rows: share of the query rows, in (0, 1], for which the phases "straight_through" and "noise" also compute
            what each dropped pair would have changed; 0 computes none.
    """

    def __init__(
        self, dim, heads, kv_heads=None, *, learn=True, opening=0.95, tau=0.5, target_density=None, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, value in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if heads % kv_heads:
            raise ValueError(f"heads is {heads}, expected a multiple of kv_heads = {kv_heads}")
        if not 0.0 < opening < 1.0:
            raise ValueError(f"opening is {opening}, expected a number in (0, 1)")
        if not 0.0 <= tau < 1.0:
            raise ValueError(f"tau is {tau}, expected a number in [0, 1)")
        if target_density is not None and not 0.0 < target_density <= 1.0:
            raise ValueError(f"target_density is {target_density}, expected a number in (0, 1], or None")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.learn, self.opening, self.tau = bool(learn), float(opening), float(tau)
        self.target_density = target_density
        self.phase, self.noise, self.rows = "hard", 0.0, 0.0
        self.record = None  # a list while a controller listens
        self.recomputes = False  # in a forward that learns: what runs in it without gradients is run again in backward
        self.owed = []  # the gradients that such calls are owed; see torch_sluice.attention.recomputed
        for name, shape in (
            ("query_weight", (heads, dim)),
            ("query_bias", (heads,)),
            ("key_weight", (kv_heads, dim)),
            ("key_bias", (kv_heads,)),
        ):
            tensor = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=self.learn))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Opens the gate: weights 0, biases such that every g is ``opening`` (1 if the gate does not learn)."""
        logit = math.log(self.opening / (1.0 - self.opening)) if self.learn else _EXACTLY_OPEN
        self.query_weight.zero_()
        self.key_weight.zero_()
        self.query_bias.fill_(logit / 2)
        self.key_bias.fill_(logit / 2)

    def __getstate__(self):
        """What copies and files hold: not what a controller listens to, which belongs to this gate's forwards."""
        return {**self.__dict__, "record": None, "recomputes": False, "owed": []}

    def _apply(self, fn, recurse=True):
        """Gates move with their model, and stay as precise as they are: steps of a gate are below what 8 bits hold."""

        def move(tensor):
            moved = fn(tensor)
            coarser = moved.is_floating_point() and torch.finfo(moved.dtype).eps > torch.finfo(tensor.dtype).eps
            return tensor.to(moved.device) if coarser else moved

        return super()._apply(move, recurse)

    def forward(self, x, key_x=None):
        """Gate logits of the queries from x and of the keys from ``key_x`` (default: x).

        Args:
            x: [B, Nq, dim], any floating dtype.
            key_x: [B, Nk, dim], for cross attention.

        Returns:
            a [B, Hq, Nq] and b [B, Hkv, Nk] in float32 (float64 if x is), under autocast too.
        """
        key_x = x if key_x is None else key_x
        for name, tensor in (("x", x), ("key_x", key_x)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.dim or not tensor.is_floating_point():
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} and dtype {tensor.dtype}, "
                    f"expected a floating-point [batch, tokens, {self.dim}]"
                )
        return (
            self._logits(x, self.query_weight, self.query_bias),
            self._logits(key_x, self.key_weight, self.key_bias),
        )

    def _logits(self, x, weight, bias):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).transpose(1, 2)

    def extra_repr(self):
        text = f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, tau={self.tau}"
        return text if self.learn else text + ", learn=False"
