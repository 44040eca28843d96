"""ferrum-ref: what ferrum's inference contracts mean, exactly, in numpy.

`import ferrum_ref` loads numpy-level code only; frameworks live in backends that are found by entry point.
"""

__version__ = "0.1.0"
