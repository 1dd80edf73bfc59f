"""The peers of ``benchmarks.quantize``: the same layer as FBGEMM, torchao and ONNX Runtime run it in int8."""

import copy
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

PEERS = ("fbgemm", "torchao", "onnxruntime", "fp32")


def build_peers(layer: nn.Module, x: torch.Tensor, threads: int, compiled: bool) -> tuple[dict, dict]:
    """Name -> a call that runs the layer on x and returns a tensor, and name -> why there is none."""
    calls, missing = {"fp32": lambda: layer(x)}, {}
    builders = {
        "fbgemm": build_fbgemm,
        "torchao": lambda layer, x, _: build_torchao(layer, x, compiled),
        "onnxruntime": build_onnxruntime,
    }
    for name, build in builders.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call = build(layer, x, threads)
                call()
            calls[name] = call
        except Exception as error:  # whatever a peer raises: the run goes on without it, and says so
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return calls, missing


def build_fbgemm(layer, x, threads):
    if isinstance(layer, nn.Conv2d):
        return build_fbgemm_convolution(layer, x)
    torch.backends.quantized.engine = "fbgemm"
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {nn.Linear}, dtype=torch.qint8)
    return lambda: model(x)


def build_fbgemm_convolution(layer, x):
    """Static: the scales are fixed in advance, so no pass over x looks for them; x is rounded and out is widened."""
    torch.backends.quantized.engine = "fbgemm"
    model = torch.ao.quantization.QuantWrapper(copy.deepcopy(layer)).eval()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    torch.ao.quantization.prepare(model, inplace=True)
    model(x)
    torch.ao.quantization.convert(model, inplace=True)
    return lambda: model(x)


def build_torchao(layer, x, compiled):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if isinstance(layer, nn.Conv2d):
        raise NotImplementedError("torchao's int8 dynamic quantisation is for linear layers")
    model = nn.Sequential(copy.deepcopy(layer))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model)
    return lambda: model(x)


def build_onnxruntime(layer, x, threads):
    import numpy
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    if isinstance(layer, nn.Conv2d):
        pads = [*layer.padding, *layer.padding]
        nodes = [
            helper.make_node(
                "Conv",
                ["x", "w", "b"],
                ["y"],
                strides=layer.stride,
                pads=pads,
                dilations=layer.dilation,
                group=layer.groups,
            )
        ]
    else:
        weight = numpy.ascontiguousarray(weight.T)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder, "plain.onnx"), Path(folder, "quantised.onnx")
        onnx.save(model, plain)
        logging.disable(logging.WARNING)
        # Seven bits for weights: with eight, its AVX2 kernels saturate, and the error is ten times as large.
        signed = QuantType.QUInt8 if isinstance(layer, nn.Conv2d) else QuantType.QInt8
        quantize_dynamic(
            plain, quantised, weight_type=signed, per_channel=not isinstance(layer, nn.Conv2d), reduce_range=True
        )
        logging.disable(logging.NOTSET)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads must not slow who comes next
        session = onnxruntime.InferenceSession(quantised, options, providers=["CPUExecutionProvider"])
    inputs = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])
