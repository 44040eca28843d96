"""The Numba backends of ferrum-ref: `ferrum_numba.cpu` compiles for this machine's processor, `ferrum_numba.gpu` for
NVIDIA GPUs.  Importing this package imports no Numba; each part's `make_backend` does.
"""
