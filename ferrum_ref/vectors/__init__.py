"""Golden vectors: inputs, float64 results and derived bounds in files that any language reads.  [specs/vectors.md]"""
