"""A controller package for the twin's planar arm, written by hand: no run is needed to drill a controller."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

CHUNK = 8


def write_package(folder: Path, target, *, step: float = 0.15, nan_above: float | None = None, obs_dim: int = 10,
                  reach: float = 2.6) -> Path:
    """A policy that goes `step` of the rest of the way to `target` a tick, and is NaN above a shoulder angle."""
    size = len(target)
    constants = {
        "first": np.array([0]), "last": np.array([size]), "axis": np.array([1]),
        "target": np.array([target], np.float32),
        "shares": (1 - (1 - step) ** np.arange(1, CHUNK + 1, dtype=np.float32))[None, :, None],
        "bound": np.array([[99.0 if nan_above is None else nan_above]], np.float32), "one": np.array([1]),
        "nothing": np.array(0, np.float32)}
    nodes = [helper.make_node("Slice", ["obs", "first", "last", "axis"], ["now"]),
             helper.make_node("Sub", ["target", "now"], ["rest"]),
             helper.make_node("Unsqueeze", ["rest", "axis"], ["rest1"]),
             helper.make_node("Unsqueeze", ["now", "axis"], ["now1"]),
             helper.make_node("Mul", ["shares", "rest1"], ["way"]),
             helper.make_node("Add", ["now1", "way"], ["places"]),
             helper.make_node("Slice", ["now", "first", "one", "axis"], ["shoulder"]),
             helper.make_node("Sub", ["bound", "shoulder"], ["below"]),
             helper.make_node("Sqrt", ["below"], ["root"]),
             helper.make_node("Mul", ["root", "nothing"], ["zero_or_nan"]),
             helper.make_node("Add", ["places", "zero_or_nan"], ["chunk"])]
    inputs = [helper.make_tensor_value_info("obs", onnx.TensorProto.FLOAT, [1, obs_dim])]
    outputs = [helper.make_tensor_value_info("chunk", onnx.TensorProto.FLOAT, [1, CHUNK, size])]
    graph = helper.make_graph(nodes, "arm", inputs, outputs,
                              [numpy_helper.from_array(value, name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir(parents=True)
    (folder / "policy.onnx").write_bytes(model.SerializeToString())
    manifest = {"format": 1, "inputs": [{"name": "obs", "shape": [1, obs_dim]}],
                "outputs": [{"name": "chunk", "shape": [1, CHUNK, size]}], "chunk": CHUNK,
                "action": {"low": [-reach] * size, "high": [reach] * size}, "control_rate_hz": 50.0,
                "sha256": {"policy.onnx": hashlib.sha256((folder / "policy.onnx").read_bytes()).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
