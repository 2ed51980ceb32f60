"""Benchmarks of torch_bn against the builtin layer, other peers and a plain copy.

`python -m benchmarks --help` says what can be chosen.
"""
