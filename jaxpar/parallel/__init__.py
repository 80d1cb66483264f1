"""The mesh, and what lies where on it: devices, parameters, layers, batches.

Everything is imported from its own file, because `placement` and `zigzag` are used where jax is not wanted.
"""
