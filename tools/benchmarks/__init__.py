"""Benchmarks. Each `measure` returns figures, and for some of them a target: name -> (comparison, bound)."""

Figures = dict[str, float]
Targets = dict[str, tuple[str, float]]
