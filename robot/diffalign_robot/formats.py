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
_PRODUCTS = {"fp16": {"Gemm", "MatMul", "Conv"}, "int8": {"Gemm", "MatMul"}}


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
    if precision != "fp32":
        _lower(onnx.load(file), file, precision)


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


def _lower(model: Any, file: Path, precision: Literal["fp16", "int8"]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    kinds = {node.op_type for node in model.graph.node}
    lowered = kinds & _PRODUCTS[precision]
    with _quiet(None):
        if precision == "fp16":
            import onnx

            half = convert_float_to_float16(model, keep_io_types=True, op_block_list=sorted(kinds - lowered))
            onnx.save(half, file)
        else:  # 7 bits: with 8, processors without VNNI saturate
            quantize_dynamic(model, file, op_types_to_quantize=sorted(lowered), weight_type=QuantType.QInt8,
                             per_channel=True, reduce_range=True)


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
