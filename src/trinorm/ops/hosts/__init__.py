"""The host side of the kernels: shapes, outputs and scratch, and which launch a problem gets."""
