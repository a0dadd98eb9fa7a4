"""Architectures and symmetries read from a function's jaxpr."""

from ngjax.trace.tracing import trace_spec

__all__ = ["trace_spec"]
