"""What a session tells about itself."""

from dataclasses import asdict, dataclass


@dataclass
class ParameterStats:
    """One parameter. Norms are Euclidean; those of a window that is open, else of the last one."""

    format: str  # of its sum: "fp16", "fp32", or "torch" where the kernels don't take it
    elements: int
    bytes: int  # that the sum takes
    grad_norm: float  # of the last gradient, as autograd gave it
    grad_amax: float  # the largest magnitude of the last one that was added to others, or asked for by stats()
    step_norm: float  # of the averaged gradient at the last step
    error: float  # relative error of the sum that rounding to float16 has made
    underflow: int  # elements of the sum below float16's normal range
    promotions: int  # sums that began in float16 and went on in float32


@dataclass
class SessionStats:
    """All parameters of a session together."""

    steps: int  # that the optimizer has made
    skipped_steps: int  # left out because a gradient was not finite
    held_steps: int  # calls of step() held back by every=N
    elements: int
    fp16_share: float  # elements whose sum is float16 / elements
    bytes: int  # that the sums take
    bytes_fp32: int  # that they would take in float32
    step_norm: float  # of all averaged gradients at the last step
    promotions: int
    parameters: dict[str, ParameterStats]

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self)


def make_stats(session) -> SessionStats:
    """Collects the figures of a session."""
    parameters = {}
    for gradient in session.gradients.values():
        if not gradient.parameter.requires_grad and gradient.is_empty:
            continue
        record = gradient.record
        parameters[gradient.name] = ParameterStats(
            format=gradient.format,
            elements=record.elements,
            bytes=gradient.sum.bytes_in(gradient.format),
            grad_norm=record.grad_norm,
            grad_amax=record.grad_amax,
            step_norm=record.step_norm,
            error=record.error if record.folds else record.last_error,
            underflow=int(record.underflow),
            promotions=record.promotions,
        )
    every = parameters.values()
    elements = sum(one.elements for one in every)
    return SessionStats(
        steps=session.steps,
        skipped_steps=session.skipped_steps,
        held_steps=session.held_steps,
        elements=elements,
        fp16_share=sum(one.elements for one in every if one.format == "fp16") / max(elements, 1),
        bytes=sum(one.bytes for one in every),
        bytes_fp32=4 * elements,
        step_norm=sum(one.step_norm**2 for one in every) ** 0.5,
        promotions=sum(one.promotions for one in every),
        parameters=parameters,
    )
