"""Checks of every op against the slow float64 truth, for tests, benches and `python -m vkernels.check`."""
