"""One small model with random weights of every architecture: transformers' and torch's own kinds.

``architectures()`` lists them without building any. ``entry.build()`` gives a model in eval mode and the inputs of one
call; ``entry.batches(n, rows)`` fresh inputs of the same kind. Weights, inputs and all else come from fixed seeds, and
nothing is read from the network. An architecture that can't be built or run says why with ``Unbuildable``.
"""

import importlib
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import zoo_configs, zoo_inputs
from benchmarks.zoo_inputs import Plan

ROWS = 2
_ATTEMPTS = 40  # ways of calling a model that are tried
# Heads by preference; what none of them has is taken by any other, and last without a head.
_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION", "SEQUENCE_CLASSIFICATION",
)  # fmt: skip


class Unbuildable(Exception):
    """Why an architecture can't be built small or can't be run, in one sentence."""


@dataclass
class Entry:
    """An architecture. ``family`` is "transformers" or "torch"; what ``build()`` finds is kept but for the model."""

    name: str
    family: str
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module, int, int, bool], Any]]] = field(repr=False)
    _draw: Callable | None = field(default=None, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)

    def build(self) -> tuple[nn.Module, Any]:
        """The model, in eval mode, and inputs of one call with two rows: a dict, a tensor, or a tuple.

        Raises:
            Unbuildable: it can't be built or run; the message says why.
        """
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            self._model, self._draw = self.make()
        return self._model, self._draw(self._model, ROWS, 0, False)

    def batches(self, count: int, rows: int = ROWS, seed: int = 1) -> list[tuple[Any, None]]:
        """Fresh inputs of the kind of the example, after ``build()``; every other batch of text has rows that are
        padded on the left."""
        return [(self._draw(self._model, rows, 1000 * seed + n, n % 2 == 1), None) for n in range(count)]

    @property
    def can_generate(self) -> bool:
        """Whether the built model has ``generate()``."""
        ask = getattr(self._model, "can_generate", None)
        return bool(ask and ask())


def architectures() -> list[Entry]:
    """All of them, transformers' in order of their names."""
    from benchmarks.zoo_torch import MODELS

    own = [Entry(name, "torch", make) for name, make in MODELS.items()]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return own + [
        Entry(name, "transformers", lambda name=name: make_transformer(name)) for name in sorted(CONFIG_MAPPING_NAMES)
    ]


def find(name: str) -> Entry:
    """The entry of this name."""
    return next(entry for entry in architectures() if entry.name == name)


def _classes(model_type: str, config_class: type) -> Iterator[type]:
    """The model classes of a configuration class, by preference."""
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto

    mappings = {n[10:-14] if n.startswith("MODEL_FOR_") else "": getattr(modeling_auto, n)
                for n in dir(modeling_auto) if n.endswith("_MAPPING_NAMES") and n.startswith("MODEL_")}  # fmt: skip
    seen = set()
    home = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    for head in (*_HEADS, *sorted(set(mappings) - {*_HEADS, ""}), ""):
        names = mappings.get(head.removeprefix("MODEL_FOR_"), {}).get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            cls = getattr(home, name, None)
            if cls is not None and cls not in seen:
                seen.add(cls)
                yield cls
    for cls in vars(home).values():  # parts of larger models are in no mapping
        is_model = inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and "forward" in vars(cls)
        if is_model and getattr(cls, "config_class", None) is config_class and cls not in seen:
            seen.add(cls)
            yield cls


def make_transformer(model_type: str) -> tuple[nn.Module, Callable]:
    """A small model of a type of transformers, and what draws its inputs.

    Raises:
        Unbuildable: none of its classes can be built and run.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config_class = CONFIG_MAPPING[model_type]
        classes = list(_classes(model_type, config_class))
    except (ImportError, ValueError) as error:
        raise Unbuildable(_sentence(error)) from error
    problem = None
    for cls in [*classes[:3], *classes[3:][-1:]]:
        try:
            config = zoo_configs.small_config(config_class)
            for inner in zoo_inputs.configs_within(config):
                inner.use_cache = False
            model = cls(config).eval()
        except Exception as error:  # whatever a configuration or a model raises is the reason
            problem = problem or f"{cls.__name__} can't be built: {_sentence(error)}"
            continue
        _enliven(model)
        try:
            return model, _find_plan(model).draw
        except Exception as error:
            problem = problem or f"{cls.__name__} can't be run: {_sentence(error)}"
    raise Unbuildable(problem or "no model class belongs to its configuration")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def _find_plan(model: nn.Module) -> Plan:
    """The first plan by which the model runs and gives finite numbers, the same twice."""
    first = None
    for plan in itertools.islice(zoo_inputs.plans(model), _ATTEMPTS):
        for _ in range(3):  # an error may say how many tokens of an image the text must hold
            try:
                check_runs(model, plan.draw(model, ROWS, 0))
                if "attention_mask" in plan.variants:
                    check_runs(model, plan.draw(model, ROWS, 1, True))
                _check_rows(model, plan)
                return plan
            except Exception as error:
                first = first or error
                asked = zoo_inputs.tokens_asked_for(error, model, ROWS)
                if not asked or asked.items() <= plan.special.items():
                    break
                plan.special |= asked
    raise first


def _check_rows(model: nn.Module, plan: Plan) -> None:
    """Raises ValueError if the model runs on inputs of this plan only for ROWS rows: what is drawn in the wrong shape
    may be broadcast by chance."""
    try:
        with torch.no_grad():
            call(model, plan.draw(model, 4 * ROWS, 0))
    except Exception as error:
        raise ValueError(f"it runs with {ROWS} rows, and not with {4 * ROWS}: {_sentence(error)}") from error


def check_runs(model: nn.Module, inputs: Any) -> None:
    """Raises ValueError for outputs that aren't finite, aren't there, or differ from call to call."""
    with torch.no_grad():
        once, twice = (outputs_of(call(model, inputs)) for _ in range(2))
    if not once:
        raise ValueError("its forward returns no floating-point tensor")
    if not all(torch.isfinite(out).all() for out in once):
        raise ValueError("its outputs are not finite with random weights")
    if any(a.shape != b.shape or not torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(once, twice, strict=True)):
        raise ValueError("its forward is random in eval mode: two calls differ")


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def outputs_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output; caches are no output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [out for value in output for out in outputs_of(value)] if isinstance(output, (list, tuple)) else []


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    """Gives each weight what its layer needs to pass on as much as it gets, and norms and biases a life: transformers'
    initial weights of .02 leave small layers without effect, so that a mistake in them would not show."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.is_floating_point() or weight.numel() < 2 or "running" in name:
                continue
            spread = float(weight.std())
            if weight.dim() >= 2 and spread > 0:
                inputs = weight.shape[-2] if type(module).__name__ == "Conv1D" else weight[0].numel()
                if weight.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                    inputs = weight.shape[-1]
                wanted = 0.5 if isinstance(module, nn.Embedding) else min(1, inputs**-0.5)
                if spread < 0.7 * wanted:
                    weight.mul_(wanted / spread)
            elif weight.dim() == 1 and name == "bias" and spread == 0:
                weight.normal_(float(weight[0]), 0.1)
            elif weight.dim() == 1 and name == "weight" and spread == 0:
                weight.mul_(torch.empty_like(weight).uniform_(0.7, 1.3)).add_(0.05 * (weight == 0))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
