"""A policy as files for other programs: an ONNX graph in three precisions, and an archive of torch.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from diffalign_robot.exported import ExportedPolicy
from diffalign_robot.graphs import record

Precision = Literal["fp32", "fp16", "int8"]
Array = NDArray[np.float32]
Decide = Callable[[Mapping[str, Array]], Array]
"""The chunk [1, Ta, Da] for one decision's inputs by name, in the policy's order."""

OPSET = 18
_HALVED = {"Gemm", "MatMul", "Conv"}


def write_graph(policy: ExportedPolicy, file: Path, precision: Precision = "fp32") -> None:
    """policy.onnx: one decision, the chain unrolled; what depends on no input is a constant.

    fp16 and int8 are of the networks' products and their weights (int8: Gemm and MatMul, one scale a column of weights
    of 7 bits, those of the activations at run time; fp16: also Conv). Everything between them, inputs and outputs stay
    float32, for the chain's own arithmetic divides by small noise levels.

    Raises: ValueError naming a part that no graph can hold.
    """
    import onnx
    import onnxscript  # noqa: F401 - says which extra is missing before the work

    graph, examples = _recorded(policy)
    with _quiet("torch.onnx._internal.exporter._registration"):  # it misses torchvision, of which nothing is used
        torch.onnx.export(graph, tuple(examples.values()), str(file), input_names=list(examples),
                          output_names=["chunk"], opset_version=OPSET, dynamo=True, external_data=False, verbose=False)
    if precision == "int8":
        _quantize(onnx.load(file), file)
    if precision == "fp16":
        model = onnx.load(file)
        _halve(model)
        onnx.save(model, file)


def write_archive(policy: ExportedPolicy, file: Path) -> None:
    """policy.pt2: what policy.onnx computes, by torch.export, in float32.

    `torch.export.load(file).module()` takes the same inputs by position and needs torch alone.
    """
    graph, examples = _recorded(policy)
    torch.export.save(torch.export.export(graph, tuple(examples.values())), file)


def open_graph(file: Path) -> Decide:
    """The decision of an ONNX file by onnxruntime on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def decide(inputs: Mapping[str, Array]) -> Array:
        chunk: Array = session.run(None, dict(inputs))[0]
        return chunk

    return decide


def open_archive(file: Path) -> Decide:
    """The decision of a policy.pt2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that its weights are read from memory that is not writable
        module = torch.export.load(file).module()

    def decide(inputs: Mapping[str, Array]) -> Array:
        with torch.no_grad():
            chunk: Array = module(*(torch.from_numpy(values) for values in inputs.values())).numpy()
        return chunk

    return decide


def _recorded(policy: ExportedPolicy) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    examples = {name: torch.randn(shape) for name, shape in policy.shapes.items()}
    return record(policy, examples).eval(), examples


def _quantize(model: Any, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(None):  # 7 bits: with 8, processors without VNNI saturate
        quantize_dynamic(model, file, op_types_to_quantize=["Gemm", "MatMul"], weight_type=QuantType.QInt8,
                         per_channel=True, reduce_range=True)


def _halve(model: Any) -> None:
    """In place: the products read and write float16, between casts; their weights are stored as float16.

    (onnxruntime's own conversion rounds every tensor of the graph, also between operations that it leaves alone.)
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    half: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type not in _HALVED:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if name and name not in half:
                half[name] = f"{name}_fp16"
                if name in weights:
                    values = numpy_helper.to_array(weights[name]).astype(np.float16)
                    graph.initializer.append(numpy_helper.from_array(values, half[name]))
                else:
                    nodes.append(helper.make_node("Cast", [name], [half[name]], to=TensorProto.FLOAT16))
            node.input[i] = half.get(name, "")
        (result,) = node.output
        node.output[0] = f"{result}_product"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [result], to=TensorProto.FLOAT)]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, values in (("node", nodes), ("initializer", kept), ("value_info", [])):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


@contextmanager
def _quiet(logger: str | None) -> Iterator[None]:
    """Without the advice of torch's and onnxruntime's own parts to each other; errors are shown."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
