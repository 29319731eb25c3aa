"""Trace: model -> LayerGraph, on fake tensors.

The glue between layers is recorded as torch operators with `make_fx` (the tracer under
`torch.export`); every layer stays one call of the user's own module.
"""

from planner.trace.interpret import Context, run_statements
from planner.trace.scaled import same_graph
from planner.trace.traced import TracedModel, patterns_of, trace

__all__ = ["Context", "TracedModel", "patterns_of", "run_statements", "same_graph", "trace"]
