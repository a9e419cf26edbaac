"""Objectives: forward(model, batch) -> (terms {name: (sum, weight)}, stats {name: detached sum}).

The loop divides every sum by the name's global count of the step, which the host knows, and adds up weight * mean.
"""
