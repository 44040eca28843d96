"""Every packed form of a weight that `quantized_linear` is told of: how it is drawn, and what its numbers are.

scheme     what the judge needs to know of a form
rows       ggml's blocks, and rows of plain numbers      words    GPTQ and AWQ
groups     integers by groups, FP8 with scales           catalogue   all of them
"""
