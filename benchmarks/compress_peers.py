"""The peers of ``benchmarks.compress_models``: the same model by the paths that its users would take.

Each peer is a callable on the model's inputs, with the bytes of what it is stored as. A peer that cannot be had says
why. All may use ``torch.get_num_threads()`` threads. Those that are calibrated see what ``compress()`` sees.
"""

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.models.task import Task, call

# In the order of the table. "onnxruntime" is its int8, the faster of dynamic and static where both keep the metric.
PEERS = ("eager", "compile", "fbgemm", "fx", "onnxruntime fp32", "onnxruntime", "openvino fp32", "openvino")


@dataclass
class Peer:
    """``run``: the model, or a callable on its inputs; None, with ``problem`` in words, where it cannot be had."""

    name: str
    run: Callable | None = None
    bytes: int | None = None
    how: str = ""
    problem: str | None = None


def build_peer(name: str, task: Task, folder: Path) -> list[Peer]:
    """The peers of this name; several where one is to be chosen by measurement. Files go into ``folder``."""
    model = task.dense or task.model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = _BUILDERS[name](model, task, folder)
            for peer in made:
                if peer.run is not None:
                    check_peer(peer, task)
    except ImportError as error:
        return [Peer(name, problem=f"{error.name or error} is not installed")]
    except Exception as error:  # exporters and converters raise anything
        lines = str(error).strip().splitlines() or [""]
        return [Peer(name, problem=f"{type(error).__name__}: {lines[0][:200]}")]
    return made


def check_peer(peer: Peer, task: Task) -> None:
    """Runs it once on each size that is timed."""
    for batch in (1, 8):
        output = call(peer.run, task.draw_inputs(batch))
        if len(output) != batch:
            raise RuntimeError(f"it gives {len(output)} outputs for {batch} inputs")


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the module's state dict as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.tell()


def _eager(model, task, folder):
    return [Peer("eager", model, stored_bytes(model), "float32")]


def _compile(model, task, folder):
    return compiled_peers("compile", model, stored_bytes(model), "float32", task, folder)


def compiled_peers(name: str, model: nn.Module, size: int, how: str, task: Task, folder: Path) -> list[Peer]:
    """The model by all of torch's compilers; one that fails says why."""
    made = []
    for way, build in _COMPILERS.items():
        peer = Peer(name, bytes=size, how=f"{how}, {way}")
        try:
            peer.run = build(copy.deepcopy(model).eval(), task, folder / f"{name}.pt2")
            check_peer(peer, task)
        except Exception as error:  # compilers raise anything
            peer.run, peer.problem = None, f"{type(error).__name__}: {str(error).strip()[:200]}"
        made.append(peer)
    return made


def _freeze(model, task, path):
    """With weights as constants, which it may then pack and fold."""
    return torch.compile(model, dynamic=False, options={"freezing": True})


def _compile_ahead(model, task, path):
    """Exported, and compiled to a library that is called without Python's part of each operator."""
    example = _as_tuple(task.draw_inputs(2))
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=tuple({0: batch} for _ in example))
        return torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        )


_COMPILERS = {
    "compiled": lambda model, task, path: torch.compile(model, dynamic=False),
    "compiled, freezing": _freeze,
    "exported, AOTInductor": _compile_ahead,
}


def _fbgemm(model, task, folder):
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return [Peer("fbgemm", problem="it quantises linear layers, of which the model has none")]
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return [Peer("fbgemm", quantized, stored_bytes(quantized), "int8 dynamic, linear layers only")]


def _fx(model, task, folder):
    """Static int8 by FX graph mode, the way that convolutions take."""
    if not _is_convolutional(model):
        return [Peer("fx", problem="fx is measured on convolutional models only")]
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    # Wrapped, so that optional arguments of its forward keep their defaults instead of being traced.
    prepared = prepare_fx(
        _Wrapped(copy.deepcopy(model)).eval(), get_default_qconfig_mapping("x86"), (task.draw_inputs(1),)
    )
    for inputs, _ in task.selection:
        call(prepared, inputs)
    quantized = convert_fx(prepared)
    return [Peer("fx", quantized, stored_bytes(quantized), "int8 static")]


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def _is_convolutional(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _as_tuple(inputs) -> tuple[torch.Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def export_onnx(model: nn.Module, task: Task, folder: Path) -> Path:
    """The float32 model as ONNX, with a batch of any size; made once for a folder."""
    path = folder / f"{task.name}.onnx"
    if not path.exists():
        example = _as_tuple(task.draw_inputs(2))
        batch = torch.export.Dim("batch", min=1, max=1024)
        program = torch.onnx.export(
            copy.deepcopy(model).eval(),
            example,
            dynamo=True,
            input_names=[f"input{i}" for i in range(len(example))],
            dynamic_shapes=tuple({0: batch} for _ in example),
            verbose=False,
        )
        program.save(path, external_data=False)
    return path


class OnnxModel:
    """An ONNX file as a callable on tensors."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, *inputs):
        feed = {name: tensor.numpy() for name, tensor in zip(self.names, inputs, strict=True)}
        return torch.from_numpy(self.session.run(None, feed)[0])


def _onnxruntime_fp32(model, task, folder):
    path = export_onnx(model, task, folder)
    return [Peer("onnxruntime fp32", OnnxModel(path), path.stat().st_size, "float32")]


def _onnxruntime(model, task, folder):
    """int8: dynamic, and for convolutions static too, since dynamic ones are slow there."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared = export_onnx(model, task, folder), folder / f"{task.name}.prepared.onnx"
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    except Exception:  # its shape inference does not take every model, and is not needed
        prepared = source
    dynamic = folder / f"{task.name}.dynamic.onnx"
    quantize_dynamic(str(prepared), str(dynamic), weight_type=QuantType.QInt8, per_channel=True)
    made = [Peer("onnxruntime", OnnxModel(dynamic), dynamic.stat().st_size, "int8 dynamic")]
    if not _is_convolutional(model):
        return made

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.names = OnnxModel(source).names
            self.batches = iter(task.selection)

        def get_next(self):
            inputs, _ = next(self.batches, (None, None))
            if inputs is None:
                return None
            return {name: tensor.numpy() for name, tensor in zip(self.names, _as_tuple(inputs), strict=True)}

    static = folder / f"{task.name}.static.onnx"
    # reduce_range: on processors without VNNI, sums of 8-bit products saturate without it.
    quantize_static(
        str(prepared),
        str(static),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not torch.cpu._is_vnni_supported(),
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return [*made, Peer("onnxruntime", OnnxModel(static), static.stat().st_size, "int8 static")]


class OpenVinoModel:
    """A model of OpenVINO as a callable on tensors."""

    def __init__(self, model):
        import openvino

        self.compiled = openvino.compile_model(
            model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        )

    def __call__(self, *inputs):
        result = self.compiled([tensor.numpy() for tensor in inputs])
        return torch.from_numpy(result[0].copy())


def _save_openvino(model, path: Path) -> int:
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size


def _openvino_fp32(model, task, folder):
    import openvino

    converted = openvino.convert_model(export_onnx(model, task, folder))
    size = _save_openvino(converted, folder / f"{task.name}.xml")
    return [Peer("openvino fp32", OpenVinoModel(converted), size, "float32")]


def _openvino(model, task, folder):
    """Static int8 by NNCF's post-training quantisation."""
    import logging

    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    converted = openvino.convert_model(export_onnx(model, task, folder))
    samples = [[tensor.numpy() for tensor in _as_tuple(inputs)] for inputs, _ in task.selection]
    kind = None if _is_convolutional(model) else nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(converted, nncf.Dataset(samples), model_type=kind, subset_size=len(samples))
    size = _save_openvino(quantized, folder / f"{task.name}.int8.xml")
    return [Peer("openvino", OpenVinoModel(quantized), size, "int8 static, by NNCF")]


_BUILDERS = {
    "eager": _eager,
    "compile": _compile,
    "fbgemm": _fbgemm,
    "fx": _fx,
    "onnxruntime fp32": _onnxruntime_fp32,
    "onnxruntime": _onnxruntime,
    "openvino fp32": _openvino_fp32,
    "openvino": _openvino,
}
