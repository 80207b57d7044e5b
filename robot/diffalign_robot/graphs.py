"""A computation as a graph of exactly those operations that depend on its inputs.

The function is run once on examples. What does not depend on the inputs (noise levels, table look-ups, embeddings of
time, Python's branches on them) happens then and enters the graph as constants, so that nothing of it is left to be
executed on the robot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Recorder(TorchDispatchMode):
    """Runs every operation and writes down those with an input, or a result of one, among their arguments."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.root, self.graph = nn.Module(), fx.Graph()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []  # ids are those of living tensors
        self.constants: dict[tuple[Any, ...], str] = {}
        for name, tensor in inputs.items():
            self._keep(tensor, self.graph.placeholder(name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        depends = any(id(leaf) in self.nodes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"the policy draws random numbers inside ({func}); noise must be an input of an export")
        if not depends:
            return out
        if func._schema.is_mutable:
            raise ValueError(f"{func} changes a tensor in place, which cannot be exported; write it as a new tensor")
        results = out if isinstance(out, tuple | list) else (out,)
        if not any(isinstance(result, Tensor) for result in results):
            raise ValueError(f"the policy branches on the values of its inputs ({func}), so that no one graph is right "
                             "for all of them; write the choice as a tensor operation")
        node = self.graph.call_function(func, *self._arguments((args, kwargs)))
        if isinstance(out, Tensor):
            self._keep(out, node)
        else:
            for number, result in enumerate(out):
                if isinstance(result, Tensor):
                    self._keep(result, self.graph.call_function(_item, (node, number)))
        return out

    def constant(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor that depends on no input; the same memory is one constant."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self.constants:
            self.constants[key] = name = f"constant_{len(self.constants)}"
            self.root.register_buffer(name, tensor.detach().clone(memory_format=torch.contiguous_format))
            self.alive.append(tensor)
        return self.graph.get_attr(self.constants[key])

    def node(self, tensor: Tensor) -> fx.Node:
        """The node of any tensor."""
        return self.nodes[id(tensor)] if id(tensor) in self.nodes else self.constant(tensor)

    def _arguments(self, values: Any) -> Any:
        return tree_map(lambda leaf: self.node(leaf) if isinstance(leaf, Tensor) else leaf, values)

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)


def _item(values: Any, number: int) -> Any:
    return values[number]


def record(function: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> fx.GraphModule:
    """`function(**inputs)` as a module with the same inputs by position, for the shapes of these examples.

    Attention enters as products and a softmax: torch's fused kernels are no operations of ONNX, and may draw dropout.

    Raises: ValueError if the function draws random numbers, changes an input in place, or branches on a value that
    depends on an input.
    """
    recorder = _Recorder(inputs)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), recorder:
        out = function(**inputs)
    recorder.graph.output(recorder.node(out))
    recorder.graph.eliminate_dead_code()
    recorder.graph.lint()
    return fx.GraphModule(recorder.root, recorder.graph)
